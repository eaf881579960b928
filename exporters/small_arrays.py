"""The one-dimensional arrays of a capture: tokens, the numbers of each step, and what its axes stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from exporters.shards import make_directory, write_json, write_new
from exporters.zarr_arrays import METADATA
from exporters.zarr_facts import AttentionAxes, attention_axes, token_text
from tracer import schema
from tracer.member_layouts import hidden_layers, router_layers
from tracer.records import AttentionSpec, EngineInfo, GenerationEnd, GenerationStart
from tracer.schema import ArrayLayout, flat_metadata

__all__ = ["SmallArrays"]

Array = NDArray[Any]


class SmallArrays:
    """Each is written whole, data before metadata."""

    def __init__(
        self, directory: Path, start: GenerationStart, engine: EngineInfo | None, axes: AttentionAxes | None
    ) -> None:
        self.metadata: dict[str, dict[str, Any]] = {}
        """`zarr.json` of each that has been written."""
        self.checksums: dict[str, int] = {}
        """CRC-32C of the values of each, as they were written."""
        self._directory = directory
        self._start = start
        self._engine = engine
        self._axes = axes

    def prompt(self) -> None:
        """Token IDs of the prompt."""
        if self._start.prompt_token_ids:
            self._write("prompt_token_id", "prompt_pos", np.array(self._start.prompt_token_ids, np.int32))

    def axes(self, layout: ArrayLayout) -> None:
        """Coordinates of that array's axes which stand for layers and heads: the model's indices."""
        sizes = dict(zip(layout.dims, layout.shard, strict=True))
        if "layer" in sizes and "layer" not in self.metadata:
            axes = self._axes
            self._write("layer", "layer", np.array(axes.layers if axes else range(sizes["layer"]), np.int32))
            self._write("head", "head", np.array(axes.heads if axes else range(sizes["head"]), np.int32))
        spec = self._start.capture.qk if self._start.capture is not None else None
        if "qk_layer" in sizes and "qk_layer" not in self.metadata and spec is not None:
            known = attention_axes(AttentionSpec(spec.layers), self._engine)
            layers = known.layers if known is not None else range(sizes["qk_layer"])
            self._write("qk_layer", "qk_layer", np.array(layers, np.int32))
        for dim, known_layers in (("hidden_layer", hidden_layers), ("router_layer", router_layers)):
            if dim in sizes and dim not in self.metadata and self._start.capture is not None:
                indices = known_layers(self._start.capture, self._engine) or range(sizes[dim])
                self._write(dim, dim, np.array(indices, np.int32))

    def end(self, columns: Mapping[str, Array], end: GenerationEnd, *, text: bool) -> None:
        """The numbers of each step and, with `text`, the bytes of all tokens."""
        for name, column in columns.items():
            number = schema.STEP_NUMBERS[name]
            self._write(name, "step", column, number.fill, number.attributes)
        tokens = token_text(self._start, end) if text else None
        if tokens is not None:
            self._write("token_bytes", "token_byte", tokens[0])
            self._write("token_offset", "token_edge", tokens[1])

    def _write(
        self, name: str, dim: str, values: Array, fill: float = 0, attributes: dict[str, Any] | None = None
    ) -> None:
        path = self._directory / name
        with contextlib.suppress(FileExistsError):  # A writer that was killed had made it.
            make_directory(path)
        if len(values):
            data = values.tobytes()
            write_new(path / "c.0", data)
            self.checksums[name] = google_crc32c.value(data)
        self.metadata[name] = flat_metadata(dim, values.dtype.name, len(values), fill, attributes)
        write_json(path / METADATA, self.metadata[name])
