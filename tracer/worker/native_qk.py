"""Queries and keys of a step through the C kernels, into memory that is used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracer.records import LayerInfo
from tracer.worker.native_layer import address_of
from tracer.worker.places import STORED, qk_dtype, qk_shapes
from tracer.worker.work import Work

__all__ = ["QKPlan", "at_least", "qk_plan"]

Bytes = NDArray[np.uint8]


@dataclass(slots=True)
class QKPlan:
    """Where each row's queries and keys go, as the kernel wants to know it."""

    buffer: Bytes
    picks: NDArray[np.int64]
    """[rows, 9]: `Pick` of kernels.c."""
    addresses: NDArray[np.int64]
    """[2, layers, rows]: queries and keys; 0 for a layer that is not wanted."""
    arrays: list[tuple[NDArray[Any], NDArray[Any]]]
    places: dict[int, int]
    """`id` of a work → its place among the rows."""


def qk_plan(works: Sequence[Work], layer: LayerInfo, count: int, buffer: Bytes, *, engine_f32: bool) -> QKPlan:
    """layer: any of the layers that are stored, which have one shape; count: layers of the model."""
    shapes = [qk_shapes(work, layer) for work in works]
    kinds = [STORED[qk_dtype(work, engine_f32)] for work in works]
    sizes = [sum(_size(shape) for shape in pair) * kind[1].itemsize for pair, kind in zip(shapes, kinds, strict=True)]
    buffer = at_least(buffer, sum(sizes))
    base, at = address_of(buffer), 0
    picks = np.empty((len(works), 9), np.int64)
    addresses = np.zeros((2, count, len(works)), np.int64)
    arrays = []
    for place, (work, pair, (code, dtype)) in enumerate(zip(works, shapes, kinds, strict=True)):
        strides = [_size(shape[1:]) for shape in pair]
        picks[place] = (*work.queries, work.row.index, *work.keys, work.row.computed, code, *strides)
        parts = []
        for kind, shape in enumerate(pair):
            parts.append(np.ndarray(shape, dtype, buffer, at))
            if shape[0]:
                slots = np.arange(shape[1]) * (shape[2] * shape[3] * dtype.itemsize)
                addresses[kind, work.traced.qk_index, place] = base + at + slots
            at += _size(shape) * dtype.itemsize
        arrays.append((parts[0], parts[1]))
    return QKPlan(buffer, picks, addresses, arrays, {id(work): place for place, work in enumerate(works)})


def at_least(buffer: Bytes, size: int) -> Bytes:
    """`buffer`, or a larger one with room for some growth."""
    return buffer if len(buffer) >= size else np.empty(size + size // 4, np.uint8)


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
