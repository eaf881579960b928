"""What a step stores of each row: types, sizes, and which part of its queries and keys goes where."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tracer.records import LayerInfo
from tracer.worker.attention import FEATURES
from tracer.worker.work import Work

__all__ = ["STORED", "aligned", "keep_qk", "qk_dtype", "qk_shapes", "row_bytes"]

STORED: Final[dict[str, tuple[int, Any]]] = {"f32": (0, np.dtype(np.float32)), "f16": (2, np.dtype(np.float16))}
"""Element types on disk: their number in kernels.c, and NumPy's."""
ALIGN: Final = 64


def aligned(size: int) -> int:
    """`size` rounded up, so that what follows begins on a cache line."""
    return -(-size // ALIGN) * ALIGN


def row_bytes(work: Work) -> tuple[int, int, int]:
    """Aligned bytes of a row's weights, features and tops."""
    traced = work.traced
    cells = len(traced.slots) * len(traced.heads)
    weights = 0
    if traced.attention is not None:
        weights = cells * (work.row.position + 1) * int(STORED[traced.attention.dtype][1].itemsize)
    return aligned(weights), aligned(cells * len(FEATURES) * 4), aligned(cells * 2 * 4)


def qk_dtype(work: Work, engine_f32: bool) -> str:
    """`f16` or `f32`: what was asked for, or what holds the engine's values."""
    spec = work.traced.qk
    assert spec is not None
    return spec.dtype or ("f32" if engine_f32 else "f16")


def keep_qk(work: Work, queries: Any, keys: Any) -> None:
    """Split queries and keys [positions, layers, heads, head_size] into the step's own row and those of the prompt."""
    row = work.row
    first, start = work.queries[0], work.keys[0]
    for name, values, position in (("query", queries, row.computed + first - row.first), ("key", keys, start)):
        before = max(min(row.prompt_tokens - 1, row.position + 1) - position, 0)
        if min(before, len(values)):
            work.blocks.append((f"{name}_prompt", values[:before], (position, 0, 0, 0)))
        if row.samples and len(values) and position + len(values) == row.position + 1:
            work.arrays.append((name, values[-1], (0, 0, 0)))


def qk_shapes(work: Work, layer: LayerInfo) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes [positions, layers, heads, head_size] of a row's queries and keys."""
    layers = len(work.traced.qk_slots)
    queries, keys = work.queries[1], work.keys[1]
    return (queries, layers, layer.num_heads, layer.head_size), (keys, layers, layer.num_kv_heads, layer.head_size)
