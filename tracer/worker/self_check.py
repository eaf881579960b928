"""The check at a worker's start: rows, queries, keys and logits, all the way to the host, must be torch's.

Each kind of layer is checked as it is configured, with its window, soft cap, sinks, slopes and scales, over a cache
with the real one's strides, and at lengths around the ends of a block and of its window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.records import AttentionSpec, CaptureSpec, LogitsSpec, QKSpec, TraceRequest
from tracer.statistics import logits_statistics, logits_summaries
from tracer.worker.attention import LayerMath, attention_rows, row_features
from tracer.worker.batch import Row
from tracer.worker.layers import Layer
from tracer.worker.rows import plain_query
from tracer.worker.work import Step, Traced, Work

if TYPE_CHECKING:
    from tracer.worker.maths import Maths

__all__ = ["CheckError", "check_layer", "check_logits", "checked_lengths", "distinct"]

FEATURE_TOLERANCE: Final = 1e-3
VOCAB: Final = 5000
LENGTHS: Final = (1, 33, 70)
LONGEST: Final = 4200
"""Keys of the longest row: the largest common window, 4,096, and some."""
SPREAD: Final = 2.0
"""Standard deviation of the scores: uneven rows, and far enough for a soft cap to matter."""
ASKED: Final = CaptureSpec(None, AttentionSpec(dtype="f32"), qk=QKSpec(dtype="f32"))


class CheckError(RuntimeError):
    """Kernels disagree with torch; the message says where."""


@dataclass(frozen=True, slots=True)
class _Metadata:
    """What a step reads of a backend's metadata."""

    block_table: torch.Tensor
    causal: bool = True


def distinct(layers: Sequence[Layer]) -> Iterator[Layer]:
    """One layer of each kind: those after it are the same to the kernels, to the last number."""
    seen = set()
    for layer in layers:
        assert layer.math is not None
        info, math, cache = layer.info, layer.math, layer.module.kv_cache
        shape = (info.num_heads, info.num_kv_heads, info.head_size, info.sliding_window)
        memory = (cache.dtype, tuple(cache.shape[1:]), cache.stride(), id(layer.keys), layer.query)
        kind = (*shape, *memory, math.scale, math.sliding_window, math.soft_cap)
        if math.alibi_slopes is None and math.sinks is None and kind in seen:
            continue
        seen.add(kind)
        yield layer


def checked_lengths(layer: Layer) -> tuple[int, ...]:
    """Lengths of the rows that a layer is checked with, ascending; none that its cache has no room for."""
    assert layer.math is not None
    assert layer.keys is not None
    block, window = layer.keys.block_size, layer.math.sliding_window
    edges = (block, block + 1) if window is None else (block, block + 1, window, window + 1, window + block // 2)
    most = min(LONGEST, block * layer.module.kv_cache.shape[0])
    return tuple(sorted({length for length in (*LENGTHS, *edges) if length <= most}))


def check_layer(maths: Maths, layer: Layer, tolerance: float) -> None:
    """Rows of several lengths over a cache of random numbers; compiles a GPU's kernels, too. Raises CheckError.

    tolerance: largest difference of a weight.
    """
    real, info = layer.module.kv_cache, layer.info
    case = _random(layer, checked_lengths(layer))
    cache = torch.empty_strided(case.cache.shape, real.stride(), dtype=real.dtype, device=real.device)
    cache.copy_(case.cache)
    works = _works(info.index, info.num_heads, checked_lengths(layer))
    step, metadata, query = Step(0), _Metadata(case.table.to(real.device)), case.query.to(real.device)
    step.hold(works)
    for action in (maths.attention, maths.collect):
        action(step, layer, works, query, cache, metadata)
    maths.copy(step)
    maths.finish(step)
    for place, work in enumerate(works):
        _check_row(case, place, work, tolerance)
    maths.release(step)
    if real.device.type == "cpu":  # Elsewhere a prompt's map is torch's own.
        _check_prompt(case, works[-1], maths.prompt(layer, _prompt(works[-1]), query, cache, metadata), tolerance)


def _prompt(work: Work) -> Work:
    """All queries of a case as the last rows of the prompt of its longest row."""
    row, rows = work.row, min(work.row.index + 1, work.row.position + 1)
    return Work(replace(row, first=0, tokens=rows, computed=row.position + 1 - rows), work.traced)


def _check_prompt(case: _Case, work: Work, found: Iterator[tuple[int, Any]], tolerance: float) -> None:
    """Rows of the prompt's map, in one block."""
    for start, block in found:
        rows = work.row.position + 1 - start
        numbers, read = case.numbers(slice(0, rows)), case.keys(work.row.index, work.row.position + 1)
        weights = attention_rows(numbers, read, torch.arange(start, work.row.position + 1), case.plain)
        _compare(case.where, "rows of a prompt", np.asarray(block), weights, tolerance)


def _check_row(case: _Case, place: int, work: Work, tolerance: float) -> None:
    """One row of `check_layer`."""
    length, where = work.row.position + 1, case.where
    window = case.plain.sliding_window or length
    read, numbers = case.keys(place, length), case.numbers(slice(place, place + 1))
    weights = attention_rows(numbers, read, torch.tensor([length - 1]), case.plain)[:, 0]
    found: dict[str, Any] = {name: values for name, values, _ in work.arrays + work.blocks}
    _compare(where, "weights", found["attention"][0], weights, tolerance)
    _compare(where, "features", found["attention_summary"][0], row_features(weights, length), FEATURE_TOLERANCE)
    _compare(where, "queries", found["query"], numbers, 0.0)
    first = max(length - window, 0)
    keys = found["key"]  # Of one layer; the prompt's other positions come before it.
    if length > 1:
        keys = np.concatenate([found["key_prompt"][:, 0], keys])
    _compare(where, "keys", keys[first:], read[:, first:].transpose(0, 1).float(), 0.0)


def check_logits(maths: Maths, device: torch.device, topk: int) -> None:
    """Statistics and ranks of random rows, with and without the sampler's tokens on the device. Raises CheckError."""
    logits = torch.randn((3, max(VOCAB, topk)), generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    request = TraceRequest("0" * 32, "0" * 16, sampled=True, capture=CaptureSpec(LogitsSpec(dtype="f32")))
    tokens, rows = [5, 7], logits[1:].float()
    wanted = logits_summaries(rows, logits_statistics(rows, topk), tokens)
    for told in (True, False):
        works = [Work(Row(str(i), i + 1, i, 1, 1, 1, samples=True), Traced(request, {}, []), i) for i in range(2)]
        step = Step(0)
        step.hold(works)
        maths.logits(step, works, logits.to(device))
        maths.copy(step)
        if told:
            maths.sampled(step, torch.tensor([[0], *[[token] for token in tokens]]).to(device))
        for work, token in zip(works, tokens, strict=True):
            work.token = token
        maths.finish(step)
        for work, row, summary in zip(works, rows, wanted, strict=True):
            _compare("logits", "rows", np.asarray(work.arrays[0][1]), row, 0.0)
            assert summary is not None
            if work.logits is None or work.logits.rank != summary.rank:
                raise CheckError(f"the rank of a token is not that of torch: {work.logits}, {summary}")
            for name in ("entropy", "varentropy", "margin", "logprob"):
                if not abs(getattr(work.logits, name) - getattr(summary, name)) <= FEATURE_TOLERANCE:
                    raise CheckError(f"the {name} of a row of logits is not that of torch: {work.logits}, {summary}")
        maths.release(step)


@dataclass(frozen=True, slots=True)
class _Case:
    """What a layer is checked on, all of it on the host: there torch multiplies in float32, whatever a GPU was told."""

    layer: Layer
    plain: LayerMath
    cache: torch.Tensor
    query: torch.Tensor
    """[rows, heads, head_size]"""
    table: torch.Tensor
    """[rows, blocks], each row in an order of its own."""

    @property
    def where(self) -> str:
        return f"layer {self.layer.info.name}"

    def keys(self, place: int, length: int) -> torch.Tensor:
        """Keys of one row, [kv_heads, length, head_size]."""
        assert self.layer.keys is not None
        layout = replace(self.layer.keys, offsets=self.layer.keys.offsets.cpu())
        return layout.read(self.cache, self.table[place, : -(-length // layout.block_size)].to(torch.int64))[:, :length]

    def numbers(self, rows: slice) -> torch.Tensor:
        """Queries as numbers, float32."""
        return plain_query(self.layer, self.query[rows]).float()


def _random(layer: Layer, lengths: Sequence[int]) -> _Case:
    assert layer.math is not None
    assert layer.keys is not None
    real, info, quantised = layer.module.kv_cache, layer.info, layer.keys.quantised
    generator = torch.Generator().manual_seed(3)
    blocks = -(-max(lengths) // layer.keys.block_size)
    keys = torch.randn((blocks, *real.shape[1:]), generator=generator)
    query = torch.randn((len(lengths), info.num_heads, info.head_size), generator=generator)
    query *= SPREAD / (layer.math.scale * info.head_size**0.5 * (1.0 if quantised is None else quantised.scale))
    order = torch.randperm(blocks, generator=generator).to(torch.int32)
    table = torch.stack([order.roll(place) for place in range(len(lengths))])
    stored = keys.to(real.dtype) if quantised is None else quantised.encode(keys * quantised.scale)
    asked = layer.query.encode(query).view(layer.query.dtype) if layer.query else query.to(layer.query_dtype)
    plain = replace(layer.math, alibi_slopes=_cpu(layer.math.alibi_slopes), sinks=_cpu(layer.math.sinks))
    return _Case(layer, plain, stored, asked, table)


def _works(index: int, heads: int, lengths: Sequence[int]) -> list[Work]:
    request = TraceRequest("0" * 32, "0" * 16, sampled=False, capture=ASKED)
    return [
        Work(
            Row(str(place), place, place, 1, length - 1, length, samples=True),
            Traced(request, {index: 0}, list(range(heads)), {index: 0}),
        )
        for place, length in enumerate(lengths)
    ]


def _cpu(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.detach().cpu()


def _compare(where: str, what: str, got: NDArray[np.float32], wanted: torch.Tensor, tolerance: float) -> None:
    if got.shape != wanted.shape or not np.allclose(got, wanted.numpy(), rtol=0, atol=tolerance, equal_nan=True):
        raise CheckError(f"{where}: the {what} are not those of torch")
