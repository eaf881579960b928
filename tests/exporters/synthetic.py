"""Synthetic generations: records and payloads as a worker would send them, and the values they should store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from exporters.zarr_writer import ZarrExporter
from tracer.config import Settings
from tracer.records import (
    ArrayRecord,
    ArraySlice,
    AttentionSpec,
    CaptureSpec,
    EngineInfo,
    GenerationEnd,
    GenerationStart,
    LayerInfo,
    LogitsSpec,
    LogitsSummary,
    Record,
    Region,
    StepRecord,
)

Array = NDArray[Any]
NOTHING = memoryview(b"")
TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
FULL = CaptureSpec(LogitsSpec(), AttentionSpec(rows="all"))
DECODE = CaptureSpec(LogitsSpec(), AttentionSpec())
DTYPES: dict[str, Any] = {"f16": np.float16, "f32": np.float32}


def engine(layers: int = 3, heads: int = 2, refused: Sequence[int] = (), **changes: Any) -> EngineInfo:
    infos = tuple(
        LayerInfo(i, f"model.layers.{i}.attn", heads, 1, 8, 0.35, unsupported="MLA" if i in refused else None)
        for i in range(layers)
    )
    return replace(EngineInfo("tiny", "0.32.0", "V1", "cpu", "bfloat16", 50, 2048, infos), **changes)


@dataclass
class Synthetic:
    """One generation; arrays are drawn once and kept, so that tests compare bits."""

    steps: int = 5
    prompt: int = 7
    vocab: int = 50
    layers: int = 3
    heads: int = 2
    spec: CaptureSpec = FULL
    trace_id: str = TRACE
    span_id: str = SPAN
    max_tokens: int | None = 600
    seed: int = 0
    logits: Array = field(init=False)
    rows: list[Array] = field(init=False)
    """Per step [layers, heads, kv_len]."""
    summaries: Array = field(init=False)
    prefill: Array = field(init=False)
    """[layers, heads, prompt, prompt], causal."""

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        attention = self.spec.attention or AttentionSpec()
        dtype, kind = DTYPES[attention.dtype], (self.spec.logits or LogitsSpec()).dtype
        self.logits = random.normal(0, 4, (self.steps, self.vocab)).astype(DTYPES[kind])
        shape = (self.layers, self.heads)
        self.rows = [(random.random((*shape, self.prompt + i)) + 0.01).astype(dtype) for i in range(self.steps)]
        self.summaries = random.random((self.steps, *shape, 4), dtype=np.float32)
        whole = random.random((*shape, self.prompt, self.prompt)) + 0.01
        self.prefill = np.tril(whole).astype(dtype)

    def start(self, **changes: Any) -> GenerationStart:
        start = GenerationStart(
            self.trace_id, self.span_id, None, True, 1_000, "req-1", "tiny", "chat",
            prompt_tokens=self.prompt, max_tokens=self.max_tokens, capture=self.spec,
            prompt_token_ids=tuple(range(100, 100 + self.prompt)),
            prompt_token_bytes=tuple(b"p%d " % i for i in range(self.prompt)),
            regions=(Region("system", 0, 2), Region("user", 2, self.prompt)),
        )  # fmt: skip
        return replace(start, **changes)

    def end(self, output_tokens: int | None = None, **changes: Any) -> GenerationEnd:
        count = self.steps if output_tokens is None else output_tokens
        end = GenerationEnd(
            self.trace_id, self.span_id, 9_000, "ok", "stop", count,
            output_token_ids=tuple(range(count)), output_token_bytes=tuple(b"o%d" % i for i in range(count)),
        )  # fmt: skip
        return replace(end, **changes)

    def step_span(self, step: int) -> str:
        return f"{0xF000000000000000 + step:016x}"

    def arrays(self, step: int) -> dict[str, Array]:
        out: dict[str, Array] = {}
        if self.spec.logits is not None and self.spec.logits.top is None:
            out["logits"] = self.logits[step]
        elif self.spec.logits is not None:
            ids = np.argsort(-self.logits[step], kind="stable")[: self.spec.logits.top].astype(np.int32)
            out |= {"logits_topk": self.logits[step][ids], "logits_topk_id": ids}
        if self.spec.attention is not None:
            out["attention"] = self.rows[step]
        if self.spec.wants_attention:
            out["attention_summary"] = self.summaries[step]
        return out

    def step(self, step: int, without: Sequence[str] = (), **changes: Any) -> tuple[StepRecord, memoryview]:
        slices, payload = pack({k: v for k, v in self.arrays(step).items() if k not in without})
        record = StepRecord(
            self.trace_id, self.span_id, self.step_span(step), step, "decode" if step else "prefill", 1,
            self.prompt + step - 1, 1, self.prompt + step, 2_000 + step, 3_000 + step, token_id=step,
            logits=LogitsSummary(0.5 + step, 0.25, 0.125, -0.5 - step, step), capture=True, arrays=slices,
        )  # fmt: skip
        return replace(record, **changes), payload

    def block(self, layer: int, first: int, stop: int, attempt: int = 1) -> tuple[ArrayRecord, memoryview]:
        block = np.ascontiguousarray(self.prefill[layer, :, first:stop, :stop])
        slices, payload = pack({"attention_prefill": block}, (layer, 0, first, 0))
        return ArrayRecord(self.trace_id, self.span_id, attempt, slices), payload

    def records(self, chunks: Sequence[int] = ()) -> Iterator[tuple[Record, memoryview]]:
        """Everything in order; chunks: where prefill chunks after the first begin."""
        yield engine(self.layers, self.heads), NOTHING
        yield self.start(), NOTHING
        if self.spec.attention is not None and self.spec.attention.rows == "all":
            edges = [0, *chunks, self.prompt]
            for first, stop in pairwise(edges):
                for layer in range(self.layers):
                    yield self.block(layer, first, stop)
        for step in range(self.steps):
            yield self.step(step)
        yield self.end(), NOTHING

    def path(self, root: Path) -> Path:
        return root / self.trace_id / self.span_id


def pack(arrays: dict[str, Array], start: tuple[int, ...] = ()) -> tuple[tuple[ArraySlice, ...], memoryview]:
    slices, payload = [], bytearray()
    for name, array in arrays.items():
        slices.append(ArraySlice(name, array.dtype.name, array.shape, len(payload), start))
        payload += array.tobytes()
    return tuple(slices), memoryview(payload)


def exporter(root: Path, **settings: Any) -> ZarrExporter:
    return ZarrExporter(Settings(store=str(root), **settings))


def write(root: Path, generation: Synthetic, **settings: Any) -> Path:
    """Store the whole generation; returns the capture's path."""
    out = exporter(root, **settings)
    for record, payload in generation.records():
        out.export(record, payload)
        wipe(payload)
    assert out.problem is None
    assert out.shutdown(1.0)
    return generation.path(root)


def wipe(payload: memoryview) -> None:
    """What the ring does after the call: the bytes become something else."""
    if not payload.readonly:
        payload[:] = b"\xff" * payload.nbytes


def opened(path: Path) -> Any:
    """The capture as a plain Zarr group, without any code of ours."""
    return zarr.open_group(path, mode="r")


def attributes(path: Path) -> dict[str, Any]:
    out: dict[str, Any] = json.loads((path / "zarr.json").read_text())["attributes"]
    return out
