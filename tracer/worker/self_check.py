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
from tracer.worker.attention import attention_rows, row_features
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
    real, info, lengths = layer.module.kv_cache, layer.info, checked_lengths(layer)
    stored, query, table = _random(layer, lengths)
    cache = torch.empty_strided(stored.shape, real.stride(), dtype=real.dtype, device=real.device)
    cache.copy_(stored)
    works = _works(info.index, info.num_heads, lengths)
    step, metadata = Step(0), _Metadata(table.to(real.device))
    step.hold(works)
    for action in (maths.attention, maths.collect):
        action(step, layer, works, query.to(real.device), cache, metadata)
    maths.copy(step)
    maths.finish(step)
    for place, work in enumerate(works):
        _check_row(layer, work, query[place : place + 1], stored, table[place], tolerance)
    maths.release(step)


def _check_row(
    layer: Layer, work: Work, query: torch.Tensor, stored: torch.Tensor, table: torch.Tensor, tolerance: float
) -> None:
    """One row [1, heads, head_size] of `check_layer`, its keys read through `table` [blocks]."""
    assert layer.math is not None
    assert layer.keys is not None
    length, where = work.row.position + 1, f"layer {layer.info.name}"
    # On the CPU: there torch multiplies in float32, whatever a GPU has been told about TF32.
    layout = replace(layer.keys, offsets=layer.keys.offsets.cpu())
    read = layout.read(stored, table[: -(-length // layout.block_size)].to(torch.int64))[:, :length]
    plain = replace(layer.math, alibi_slopes=_cpu(layer.math.alibi_slopes), sinks=_cpu(layer.math.sinks))
    numbers = plain_query(layer, query).float()
    weights = attention_rows(numbers, read, torch.tensor([length - 1]), plain)[:, 0]
    found: dict[str, Any] = {name: values for name, values, _ in work.arrays + work.blocks}
    _compare(where, "weights", found["attention"][0], weights, tolerance)
    _compare(where, "features", found["attention_summary"][0], row_features(weights, length), FEATURE_TOLERANCE)
    _compare(where, "queries", found["query"], numbers, 0.0)
    first = max(length - (layer.math.sliding_window or length), 0)
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


def _random(layer: Layer, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On the host: a cache, queries [rows, heads, head_size] and a block table, each row in an order of its own."""
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
    if layer.query is not None:
        return stored, layer.query.encode(query).view(layer.query.dtype), table
    return stored, query.to(layer.query_dtype), table


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
