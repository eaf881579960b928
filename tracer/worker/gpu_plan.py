"""Where a step's rows go on a GPU: tables for the kernels, made once a step, and the host's side of what returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tracer.records import LayerInfo
from tracer.worker.attention import FEATURES
from tracer.worker.device import Area, Device
from tracer.worker.places import STORED, aligned, qk_dtype, qk_shapes, row_bytes
from tracer.worker.work import Work

__all__ = ["PickPlan", "RowPlan", "carve", "pick_plan", "row_plan"]

FACTS: Final = 9
"""Numbers per row, in the order that `triton_kernels` reads them."""
NOT_STORED: Final = -1
FLOAT: Final = np.dtype(np.float32)
LONG: Final = np.dtype(np.int64)


@dataclass(slots=True)
class RowPlan:
    """The last rows of a step's requests."""

    places: dict[int, int]
    """`id` of a work → its place among the rows."""
    arrays: list[tuple[NDArray[Any] | None, NDArray[Any], NDArray[Any]]]
    """Weights (None if only summaries are wanted), features and tops of each row, on the host."""
    most: int
    """Heads of the longest list."""
    width: int
    """Heads of the widest layer."""
    longest: int
    """Keys of the longest row."""
    slots_at: int
    heads_at: int
    places_at: int

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.arrays)


@dataclass(slots=True)
class PickPlan:
    """The queries and keys of a step's requests."""

    places: dict[int, int]
    arrays: list[tuple[NDArray[Any], NDArray[Any]]]
    queries: int
    """Query positions of all rows."""
    keys: int
    slots_at: int
    queries_at: int
    keys_at: int


def carve(area: Area, at: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of that shape inside the area's host memory."""
    return np.ndarray(shape, dtype, area.bytes, at)


def row_plan(
    works: Sequence[Work], layers: int, width: int, results: Area, tables: Area, device: Device
) -> tuple[RowPlan, Area, Area]:
    """The plan and its two areas, which may be new and larger ones; layers: of the model."""
    most = max(len(work.traced.heads) for work in works)
    count, slots_at = len(works), len(works) * FACTS
    heads_at = slots_at + layers * count
    places_at = heads_at + count * most
    tables, numbers = _numbers(tables, places_at + count * width, device)
    results = results.room(device, sum(sum(row_bytes(work)) for work in works))
    facts = numbers[:slots_at].reshape(count, FACTS)
    slots = numbers[slots_at:heads_at].reshape(layers, count)
    heads = numbers[heads_at:places_at].reshape(count, most)
    places = numbers[places_at:].reshape(count, width)
    slots.fill(-1)
    places.fill(-1)
    at, arrays = 0, []
    for place, work in enumerate(works):
        traced, row = work.traced, work.row
        slots[traced.layer_index, place] = traced.slot_index
        own = traced.head_index
        heads[place, : len(own)] = own
        known = own[own < width]
        places[place, known] = np.arange(len(known))
        parts, starts, code = _row_arrays(work, results, at)
        arrays.append(parts)
        last = row.first + row.tokens - 1
        facts[place] = (last, row.index, row.position, row.prompt_tokens, len(own), code, *starts)
        at += sum(row_bytes(work))
    longest = max(work.row.position + 1 for work in works)
    named = {id(work): place for place, work in enumerate(works)}
    return RowPlan(named, arrays, most, width, longest, slots_at, heads_at, places_at), results, tables


def pick_plan(
    works: Sequence[Work], layer: LayerInfo, layers: int, results: Area, tables: Area, device: Device, *, f32: bool
) -> tuple[PickPlan, Area, Area]:
    """layer: any of those that are stored, which have one shape; f32: the engine's own type is that."""
    count = len(works)
    queries_at = count * FACTS + layers * count
    keys_at = queries_at + 2 * sum(work.queries[1] for work in works)
    tables, numbers = _numbers(tables, keys_at + 2 * sum(work.keys[1] for work in works), device)
    facts = numbers[: count * FACTS].reshape(count, FACTS)
    slots = numbers[count * FACTS : queries_at].reshape(layers, count)
    slots.fill(-1)
    kinds = [STORED[qk_dtype(work, f32)] for work in works]
    shapes = [qk_shapes(work, layer) for work in works]
    results = results.room(device, sum(sum(_pair_bytes(*pair)) for pair in zip(shapes, kinds, strict=True)))
    at, arrays = 0, []
    for place, (work, pair, (code, dtype)) in enumerate(zip(works, shapes, kinds, strict=True)):
        slots[work.traced.qk_index, place] = np.arange(len(work.traced.qk_index))
        room = _pair_bytes(pair, (code, dtype))
        starts = (at // dtype.itemsize, (at + room[0]) // dtype.itemsize)
        strides = [int(np.prod(shape[1:], dtype=np.int64)) for shape in pair]
        (query, _), (key, _) = work.queries, work.keys
        facts[place] = (
            starts[0], query, strides[0], starts[1], key, strides[1], work.row.index, work.row.computed, code,
        )  # fmt: skip
        arrays.append((carve(results, at, dtype, pair[0]), carve(results, at + room[0], dtype, pair[1])))
        at += sum(room)
    queries = _entries(numbers[queries_at:keys_at], [work.queries for work in works])
    keys = _entries(numbers[keys_at:], [work.keys for work in works])
    named = {id(work): place for place, work in enumerate(works)}
    return PickPlan(named, arrays, queries, keys, count * FACTS, queries_at, keys_at), results, tables


def _entries(numbers: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> int:
    """Fill [entries, 2] with each row's place and what it picks; returns how many."""
    pairs, at = numbers.reshape(-1, 2), 0
    for place, (first, count) in enumerate(spans):
        pairs[at : at + count, 0] = place
        pairs[at : at + count, 1] = np.arange(first, first + count)
        at += count
    return at


def _numbers(tables: Area, count: int, device: Device) -> tuple[Area, NDArray[np.int64]]:
    tables = tables.room(device, count * LONG.itemsize)
    return tables, carve(tables, 0, LONG, (count,))


def _row_arrays(
    work: Work, results: Area, at: int
) -> tuple[tuple[NDArray[Any] | None, NDArray[Any], NDArray[Any]], tuple[int, int, int], int]:
    """A row's arrays on the host, where each starts in the buffer (in elements), and the type of its weights."""
    traced = work.traced
    layers, heads = len(traced.slots), len(traced.heads)
    room = row_bytes(work)
    features = carve(results, at + room[0], FLOAT, (layers, heads, len(FEATURES)))
    tops = carve(results, at + room[0] + room[1], FLOAT, (layers, heads, 2))
    starts = ((at + room[0]) // FLOAT.itemsize, (at + room[0] + room[1]) // FLOAT.itemsize)
    if traced.attention is None:
        return (None, features, tops), (0, *starts), NOT_STORED
    code, dtype = STORED[traced.attention.dtype]
    weights = carve(results, at, dtype, (layers, heads, work.row.position + 1))
    return (weights, features, tops), (at // dtype.itemsize, *starts), code


def _pair_bytes(shapes: tuple[tuple[int, ...], tuple[int, ...]], kind: tuple[int, Any]) -> tuple[int, int]:
    queries, keys = (aligned(int(np.prod(shape, dtype=np.int64)) * int(kind[1].itemsize)) for shape in shapes)
    return queries, keys
