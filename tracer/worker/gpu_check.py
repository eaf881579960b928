"""The check at a worker's start: rows, queries, keys and logits, all the way to the host, must be torch's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.records import AttentionSpec, CaptureSpec, LogitsSpec, QKSpec, TraceRequest
from tracer.statistics import logits_statistics, logits_summaries
from tracer.worker.attention import attention_last_rows, row_features
from tracer.worker.batch import Row
from tracer.worker.layers import Layer
from tracer.worker.triton_layer import GpuError
from tracer.worker.work import Step, Traced, Work

if TYPE_CHECKING:
    from tracer.worker.maths import Maths

__all__ = ["check_layer", "check_logits"]

TOLERANCE: Final = 2e-5
"""Largest difference of a weight: a GPU's `exp` is good to about 1e-6, times the weight."""
FEATURE_TOLERANCE: Final = 1e-3
VOCAB: Final = 5000
LENGTHS: Final = (1, 33, 70)
ASKED: Final = CaptureSpec(None, AttentionSpec(dtype="f32"), qk=QKSpec(dtype="f32"))


@dataclass(frozen=True, slots=True)
class _Metadata:
    """What a step reads of a backend's metadata."""

    block_table: torch.Tensor
    causal: bool = True


def check_layer(maths: Maths, layer: Layer) -> None:
    """Rows of several lengths over a cache of random numbers; compiles the kernels, too. Raises GpuError."""
    assert layer.math is not None
    assert layer.keys is not None
    real, info, index = layer.module.kv_cache, layer.info, layer.info.index
    keys, query, table = _random(layer)
    cache = torch.empty_strided(keys.shape, real.stride(), dtype=real.dtype, device=real.device)
    cache.copy_(keys)
    works = _works(index, info.num_heads)
    step, metadata = Step(0), _Metadata(table.to(real.device))
    step.hold(works)
    for action in (maths.attention, maths.collect):
        action(step, layer, works, query.to(real.device), cache, metadata)
    maths.copy(step)
    maths.finish(step)
    # On the CPU: there torch multiplies in float32, whatever a GPU has been told about TF32.
    read = replace(layer.keys, offsets=layer.keys.offsets.cpu()).read(keys, table.flatten().to(torch.int64))
    read = read.view(read.shape[0], len(works), -1, read.shape[2])
    plain = replace(layer.math, alibi_slopes=_cpu(layer.math.alibi_slopes), sinks=_cpu(layer.math.sinks))
    wanted = attention_last_rows(query, read, torch.tensor(LENGTHS) - 1, plain)
    for place, (work, length) in enumerate(zip(works, LENGTHS, strict=True)):
        weights = wanted[:, place, :length]
        found: dict[str, Any] = {name: values for name, values, _ in work.arrays + work.blocks}
        _compare(f"layer {info.name}", "weights", found["attention"][0], weights, TOLERANCE)
        _compare(
            f"layer {info.name}",
            "features",
            found["attention_summary"][0],
            row_features(weights, length),
            FEATURE_TOLERANCE,
        )
        _compare(f"layer {info.name}", "queries", found["query"], query[place : place + 1].float(), 0.0)
        first = max(length - (layer.math.sliding_window or length), 0)
        expected = read[:, place, first:length].transpose(0, 1).float()
        keys = found["key"]  # Of one layer; the prompt's other positions come before it.
        if length > 1:
            keys = np.concatenate([found["key_prompt"][:, 0], keys])
        _compare(f"layer {info.name}", "keys", keys[first:], expected, 0.0)
    maths.release(step)


def check_logits(maths: Maths, device: torch.device, topk: int) -> None:
    """Statistics and ranks of random rows, with and without the sampler's tokens on the device. Raises GpuError."""
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
                raise GpuError(f"the rank of a token is not that of torch: {work.logits}, {summary}")
            for name in ("entropy", "varentropy", "margin", "logprob"):
                if abs(getattr(work.logits, name) - getattr(summary, name)) > FEATURE_TOLERANCE:
                    raise GpuError(f"the {name} of a row of logits is not that of torch: {work.logits}, {summary}")
        maths.release(step)


def _random(layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On the host: a cache, queries [rows, heads, head_size] in its type, and a block table."""
    assert layer.keys is not None
    real, info, count = layer.module.kv_cache, layer.info, len(LENGTHS)
    generator = torch.Generator().manual_seed(3)
    per_row = -(-max(LENGTHS) // layer.keys.block_size)
    keys = torch.randn((per_row * count, *real.shape[1:]), generator=generator).to(real.dtype)
    query = torch.randn((count, info.num_heads, info.head_size), generator=generator).to(real.dtype)
    table = torch.randperm(per_row * count, generator=generator).to(torch.int32).view(count, per_row)
    return keys, query, table


def _works(index: int, heads: int) -> list[Work]:
    request = TraceRequest("0" * 32, "0" * 16, sampled=False, capture=ASKED)
    return [
        Work(
            Row(str(place), place, place, 1, length - 1, length, samples=True),
            Traced(request, {index: 0}, list(range(heads)), {index: 0}),
        )
        for place, length in enumerate(LENGTHS)
    ]


def _cpu(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.detach().cpu()


def _compare(where: str, what: str, got: NDArray[np.float32], wanted: torch.Tensor, tolerance: float) -> None:
    if got.shape != wanted.shape or not np.allclose(got, wanted.numpy(), rtol=0, atol=tolerance, equal_nan=True):
        raise GpuError(f"{where}: the {what} are not those of torch")
