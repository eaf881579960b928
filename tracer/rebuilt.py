"""Attention rebuilt on reading, from stored queries and keys: the same softmax as the worker's, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tracer import schema

__all__ = ["RebuiltLayers", "rebuild_rows"]

Array = NDArray[Any]
PREFILL: Final = ("head", "query_pos", "key_pos")
ROWS: Final = ("step", "head", "key_pos")


def rebuild_rows(query: Array, key: Array, positions: Array, layer: Mapping[str, Any]) -> Array:
    """Attention weights, float32 [heads, rows, keys], of causal softmax attention.

    query: [rows, heads, head_size] and key: [keys, kv_heads, head_size], after rotary embedding, key j at position j;
    positions: int [rows]; layer: an entry of the capture's `engine.layers` (scale, sliding_window, soft_cap,
    alibi_slopes, sink_logits). A row whose query or one of whose visible keys is not known (NaN) is all zeros.
    """
    rows, heads, size = query.shape
    groups = key.shape[1]
    grouped = query.astype(np.float32).transpose(1, 0, 2).reshape(groups, heads // groups * rows, size)
    scores = grouped @ key.astype(np.float32).transpose(1, 2, 0)
    scores = scores.reshape(heads, rows, len(key)) * np.float32(layer["scale"])
    if layer.get("soft_cap"):
        cap = np.float32(layer["soft_cap"])
        scores = cap * np.tanh(scores / cap)
    distance = np.arange(len(key)) - positions[:, None]
    if layer.get("alibi_slopes"):
        scores = scores + np.array(layer["alibi_slopes"], np.float32)[:, None, None] * distance
    hidden = distance > 0
    if layer.get("sliding_window"):
        hidden |= distance <= -layer["sliding_window"]
    scores = np.where(hidden, np.float32(-np.inf), scores)
    weights = _softmax(scores, layer.get("sink_logits") or ())
    weights[np.isnan(weights).any(axis=-1)] = 0.0
    return weights


def _softmax(scores: Array, sinks: Sequence[float]) -> Array:
    """Over the keys, with one more score per head in the denominator if the layer has learned sinks."""
    top = scores.max(axis=-1, keepdims=True)
    extra: Array | float = 0.0
    if sinks:
        sink = np.array(sinks, np.float32)[:, None, None]
        top = np.maximum(top, sink)
        extra = np.exp(sink - top)
    weights = np.exp(scores - top)
    out: Array = weights / (weights.sum(axis=-1, keepdims=True) + extra)
    return out


class RebuiltLayers(Mapping[int, xr.DataArray]):
    """Like `AttentionLayers`; each layer is computed whole when it is asked for.

    That takes about 1 s and 4 bytes per weight for a billion multiplications; `Capture.row` computes one row alone.
    """

    def __init__(
        self, data: xr.Dataset, layers: Sequence[Mapping[str, Any]], dims: tuple[str, ...], rows: Array, prompt: int
    ) -> None:
        self._data = data
        self._prompt = prompt
        self._facts = {int(layer["index"]): layer for layer in layers}
        self._dims = dims
        self._rows = rows
        """Absolute positions of the queries."""

    @classmethod
    def decode(cls, data: xr.Dataset, layers: Sequence[Mapping[str, Any]], prompt: int, steps: int) -> RebuiltLayers:
        """Rows that predict the output tokens."""
        return cls(data, layers, ROWS, np.arange(prompt - 1, prompt - 1 + steps), prompt)

    @classmethod
    def prefill(cls, data: xr.Dataset, layers: Sequence[Mapping[str, Any]], prompt: int) -> RebuiltLayers:
        """The prompt's own map."""
        return cls(data, layers, PREFILL, np.arange(prompt), prompt)

    def __getitem__(self, layer: int) -> xr.DataArray:
        """One layer, float32; KeyError names the layers that exist."""
        weights = self._rebuild(layer, self._rows)
        values = weights.transpose(1, 0, 2) if self._dims == ROWS else weights
        heads = np.arange(len(weights), dtype=np.int32)
        return xr.DataArray(values, dims=self._dims, coords={"head": heads, "layer": layer}, name="attention")

    def row(self, layer: int, head: int, place: int) -> Array:
        """One row with exactly its visible keys, without the rest of the layer."""
        position = self._rows[place]
        heads = int(self._data.sizes["qk_head"])
        if not 0 <= head < heads:
            raise KeyError(f"head {head} is not in this capture; it has {list(range(heads))}")
        weights = self._rebuild(layer, self._rows[place : place + 1])
        return weights[head, 0, : position + 1]

    def _rebuild(self, layer: int, rows: Array) -> Array:
        if layer not in list(self):
            raise KeyError(f"layer {layer} is not among the queries and keys of this capture; it has {list(self)}")
        slot = list(self).index(layer)
        stop = int(rows.max(initial=-1)) + 1
        key = self._positions(schema.KEY_PROMPT, schema.KEY, slot, 0, stop)
        first = int(rows.min(initial=stop))
        query = self._positions(schema.QUERY_PROMPT, schema.QUERY, slot, first, stop)
        return rebuild_rows(query[rows - first], key, rows, self._facts[layer])

    def _positions(self, early: str, late: str, slot: int, start: int, stop: int) -> Array:
        """[position, heads, dim] of positions start … stop - 1: the prompt's, then those of the steps; NaN if lost."""
        steps, before = self._data[late].isel(qk_layer=slot), self._prompt - 1
        out = np.full((stop - start, *steps.shape[1:]), np.nan, np.float32)
        if early in self._data and start < before:
            values = self._data[early].isel(qk_layer=slot, prompt_row=slice(start, min(stop, before))).to_numpy()
            out[: len(values)] = values
        low, high = max(start, before), min(stop, before + steps.shape[0])
        if low < high:
            out[low - start : high - start] = steps.isel(step=slice(low - before, high - before)).to_numpy()
        return out

    def __iter__(self) -> Iterator[int]:
        """The model's layer indices, ascending."""
        return iter(self._data["qk_layer"].to_numpy().tolist())

    def __len__(self) -> int:
        """How many layers can be rebuilt."""
        return int(self._data.sizes["qk_layer"])

    def __repr__(self) -> str:
        """Layers and sizes."""
        return f"<attention of layers {list(self)}, rebuilt from queries and keys: {len(self._rows)} rows>"
