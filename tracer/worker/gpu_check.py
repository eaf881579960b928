"""The check at a worker's start: a layer's rows, queries and keys, all the way to the host, must be torch's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.records import AttentionSpec, CaptureSpec, QKSpec, TraceRequest
from tracer.worker.attention import attention_last_rows, row_features
from tracer.worker.batch import Row
from tracer.worker.layers import Layer
from tracer.worker.triton_layer import GpuError
from tracer.worker.work import Step, Traced, Work

if TYPE_CHECKING:
    from tracer.worker.maths import Maths

__all__ = ["check_layer"]

TOLERANCE: Final = 2e-5
"""Largest difference of a weight: a GPU's `exp` is good to about 1e-6, times the weight."""
FEATURE_TOLERANCE: Final = 1e-3
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
    step, metadata = Step(0, works=works), _Metadata(table.to(real.device))
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
        _compare(info.name, "weights", found["attention"][0], weights, TOLERANCE)
        _compare(info.name, "features", found["attention_summary"][0], row_features(weights, 1), FEATURE_TOLERANCE)
        _compare(info.name, "queries", found["query"][:, 0], query[place : place + 1].float(), 0.0)
        first = max(length - (layer.math.sliding_window or length), 0)
        expected = read[:, place, first:length].transpose(0, 1).float()
        _compare(info.name, "keys", found["key"][first:, 0], expected, 0.0)
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
            Row(str(place), place, place, 1, length - 1, 1, samples=True),
            Traced(request, {index: 0}, list(range(heads)), {index: 0}),
        )
        for place, length in enumerate(LENGTHS)
    ]


def _cpu(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.detach().cpu()


def _compare(layer: str, what: str, got: NDArray[np.float32], wanted: torch.Tensor, tolerance: float) -> None:
    if got.shape != wanted.shape or not np.allclose(got, wanted.numpy(), rtol=0, atol=tolerance, equal_nan=True):
        raise GpuError(f"layer {layer}: the Triton kernels' {what} are not those of torch")
