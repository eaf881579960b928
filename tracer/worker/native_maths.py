"""A step's numbers through the C kernels: the whole step in a few calls, into memory that is used again.

The weights are written once, in the precision they are stored in, and copied once, into the queue.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.records import AttentionSummary, LogitsSummary
from tracer.worker.attention import FEATURES
from tracer.worker.layers import Layer
from tracer.worker.native_layer import CODES, NativeLayer, address_of, addresses_of
from tracer.worker.native_qk import QKPlan, at_least, qk_plan
from tracer.worker.places import STORED, aligned, keep_qk, row_bytes
from tracer.worker.rows import prompt_parts, require_causal
from tracer.worker.self_check import check_layer, check_logits, distinct
from tracer.worker.work import Step, Work

__all__ = ["NativeMaths"]

FLOAT: Final = np.dtype(np.float32)
STRIDE: Final = 1024
"""Score rows grow by this many keys, so that a growing context does not ask for memory at every step."""
SEEN: Final = 7
"""Numbers that the kernel's `summarise` gives."""
TOLERANCE: Final = 1e-5
"""Largest difference of a weight from torch's, at start."""

Bytes = NDArray[np.uint8]


@dataclass(slots=True)
class _Plan:
    """Where each row's results of this step go, as the kernel wants to know it."""

    places: dict[int, int]
    """`id` of a work → its place among the rows."""
    rows: NDArray[np.int64]
    """[rows, 7]: `Row` of kernels.c."""
    addresses: NDArray[np.int64]
    """[3, layers, rows]: where each layer's weights, features and tops go; 0 for what is not wanted."""
    arrays: list[tuple[Any, ...]]
    """Weights (None if only summaries are wanted), features and tops of each row."""
    longest: int
    at: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Addresses of `rows` and of the three parts of `addresses`."""

    def __post_init__(self) -> None:
        """Asking NumPy for an address costs a microsecond: once a step is enough, not once a layer."""
        base = address_of(self.addresses)
        part = self.addresses.strides[0]
        self.at = (address_of(self.rows), base, base + part, base + 2 * part)


@dataclass(slots=True)
class _LogitsPlan:
    """Results of the sampled rows."""

    numbers: NDArray[np.float32]
    """[rows, 3]: logsumexp, entropy, varentropy."""
    best: NDArray[np.float32]
    """[rows, k], descending."""
    ids: NDArray[np.int32]
    copies: list[NDArray[Any] | None]
    """What is stored of each row, if all of it is."""


@dataclass(slots=True)
class _Buffers:
    """Memory of one step; goes back to the pool when the step has been sent."""

    rows: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    logits: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    qk: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    plan: _Plan | None = None
    qk_plan: QKPlan | None = None
    logits_plan: _LogitsPlan | None = None


class NativeMaths:
    """See `maths.Maths`. Raises NativeError if a layer's cache cannot be read, CheckError if torch disagrees."""

    name = "native"

    def __init__(self, library: ctypes.PyDLL, layers: Sequence[Layer], topk: int) -> None:
        self._library: Any = library
        self._topk = topk
        usable = [layer for layer in layers if layer.math is not None]
        self._layers = {layer.info.index: NativeLayer.of(layer) for layer in usable}
        self._count = max(self._layers, default=-1) + 1
        self._threads = int(library.threads())  # There is scratch for so many, however many there are later.
        self._scratch = np.empty(0, np.float32)
        self._scratch_at = self._per_thread = self._stride = 0
        self._maps, self._map_scratch = np.empty(0, np.uint8), np.empty(0, np.float32)
        self._pool: list[_Buffers] = []
        for layer in distinct(usable):
            check_layer(self, layer, TOLERANCE)
        check_logits(self, torch.device("cpu"), topk)
        self._pool.clear()

    # -- attention ---------------------------------------------------------------------------------------------

    def attention(
        self, step: Step, layer: Layer, works: Sequence[Work], query: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> None:
        """See `maths.Maths`."""
        require_causal(metadata)
        buffers = self._buffers(step)
        if buffers.plan is None:
            buffers.plan = self._plan(step, buffers)
        self._attend(layer, buffers.plan, query, cache, metadata.block_table)
        for work in works:
            work.layers_seen += 1

    def collect(
        self, step: Step, layer: Layer, works: Sequence[Work], query: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> None:
        """See `maths.Maths`."""
        require_causal(metadata)
        buffers, native, table = self._buffers(step), self._layers[layer.info.index], metadata.block_table
        native.check(query, cache, table)
        plan = buffers.qk_plan
        if plan is None:
            f32 = layer.needs_f32
            plan = buffers.qk_plan = qk_plan(step.sources, layer.info, self._count, buffers.qk, engine_f32=f32)
            buffers.qk = plan.buffer
        places = addresses_of(*plan.addresses[:, layer.info.index])
        self._library.collect(
            native.address, address_of(plan.picks), len(plan.picks), *places,
            query.data_ptr(), query.stride(0), query.stride(1), cache.data_ptr(), table.data_ptr(), table.stride(0),
        )  # fmt: skip
        for work in works:
            work.qk_seen += 1

    def prompt(
        self, layer: Layer, work: Work, query: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> Iterator[tuple[int, Any]]:
        """See `maths.Maths`: the blocks are parts of one buffer."""
        require_causal(metadata)
        native, table, row, traced = self._layers[layer.info.index], metadata.block_table, work.row, work.traced
        native.check(query, cache, table)
        assert traced.attention is not None
        code, dtype = STORED[traced.attention.dtype]
        heads = np.array([head for head in traced.heads if head < layer.info.num_heads], np.int64)
        parts = list(prompt_parts(row))
        most = max((stop - start) * stop for start, stop in parts) if parts else 0
        self._maps = at_least(self._maps, len(heads) * most * int(dtype.itemsize))
        struct = native.struct
        stride = -(-(row.position + 1 + native.margin) // STRIDE) * STRIDE
        each = self._library.prompt_floats(stride, struct.head_size, struct.block_size)
        if len(self._map_scratch) < self._threads * each:
            self._map_scratch = np.empty(self._threads * each, np.float32)
        for start, stop in parts:
            block = _carve(self._maps, 0, dtype, (len(heads), stop - start, stop))
            first = row.first + start - row.computed
            facts = np.array([first, 0, start, row.prompt_tokens, address_of(heads), len(heads), code], np.int64)
            self._library.attend_prompt(
                native.address, address_of(facts), stop - start, stop, address_of(block), query.data_ptr(),
                query.stride(0), query.stride(1), cache.data_ptr(), table[row.index].data_ptr(),
                address_of(self._map_scratch), stride, self._threads,
            )  # fmt: skip
            yield start, block

    def _attend(self, layer: Layer, plan: _Plan, query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor) -> None:
        native = self._layers[layer.info.index]
        native.check(query, cache, table)
        self._make_room(plan.longest, native)
        rows, outs, features, tops = plan.at
        count = len(plan.rows)
        skip = layer.info.index * count * 8
        stride, head_stride, _ = query.stride()
        self._library.attend(
            native.address, rows, count, outs + skip, features + skip, tops + skip, query.data_ptr(), stride,
            head_stride, cache.data_ptr(), table.data_ptr(), table.stride(0), self._scratch_at, self._stride,
            self._threads,
        )  # fmt: skip

    def _make_room(self, longest: int, native: NativeLayer) -> None:
        if longest + native.margin <= self._stride and native.floats <= self._per_thread:
            return
        self._stride = max(self._stride, -(-(longest + native.margin) // STRIDE) * STRIDE)
        for known in self._layers.values():
            struct = known.struct
            known.floats = self._library.scratch_floats(self._stride, struct.head_size, struct.block_size)
        self._per_thread = max(known.floats for known in self._layers.values())
        self._scratch = np.empty(self._threads * self._per_thread, np.float32)
        self._scratch_at = address_of(self._scratch)

    def _plan(self, step: Step, buffers: _Buffers) -> _Plan:
        works = step.rows
        sizes = [row_bytes(work) for work in works]
        buffers.rows = at_least(buffers.rows, sum(map(sum, sizes)))
        base, at = address_of(buffers.rows), 0
        addresses = np.zeros((3, self._count, len(works)), np.int64)
        facts, arrays = [], []
        for place, (work, size) in enumerate(zip(works, sizes, strict=True)):
            row, traced, spec = work.row, work.traced, work.traced.attention
            code, dtype = STORED[spec.dtype if spec is not None else "f32"]
            layers, heads, keys = len(traced.slots), len(traced.heads), row.position + 1
            last = row.first + row.tokens - 1
            facts.append((last, row.index, row.position, row.prompt_tokens, traced.heads_at, heads, code))
            shapes = (
                (dtype, (layers, heads, keys)),
                (FLOAT, (layers, heads, len(FEATURES))),
                (FLOAT, (layers, heads, 2)),
            )
            parts: list[Any] = []
            for kind, ((item, shape), room) in enumerate(zip(shapes, size, strict=True)):
                parts.append(_carve(buffers.rows, at, item, shape) if room else None)
                if room:
                    each = shape[1] * shape[2] * item.itemsize
                    addresses[kind, traced.layer_index, place] = base + at + each * traced.slot_index
                at += room
            arrays.append(tuple(parts))
        places = {id(work): place for place, work in enumerate(works)}
        longest = max((work.row.position + 1 for work in works), default=0)
        return _Plan(places, np.array(facts, np.int64).reshape(-1, 7), addresses, arrays, longest)

    # -- logits ------------------------------------------------------------------------------------------------

    def logits(self, step: Step, sampling: Sequence[Work], logits: torch.Tensor) -> None:
        """See `maths.Maths`: the copy keeps the engine's own precision."""
        if logits.dtype not in CODES:
            raise TypeError(f"logits of type {logits.dtype}")
        buffers, count, vocab = self._buffers(step), len(sampling), logits.shape[1]
        raw = count * vocab * logits.element_size()
        kept = [_kept_dtype(work) for work in sampling]
        sizes = [0 if dtype is None else aligned(vocab * dtype[1].itemsize) for dtype in kept]
        buffers.logits = at_least(buffers.logits, aligned(raw) + sum(sizes))
        copy = torch.from_numpy(buffers.logits[:raw]).view(logits.dtype).view(count, vocab)
        torch.index_select(logits, 0, torch.tensor([work.row.logits_row for work in sampling]), out=copy)
        step.logits = copy
        at, copies = aligned(raw), []
        for dtype, size in zip(kept, sizes, strict=True):
            copies.append(None if dtype is None else _carve(buffers.logits, at, dtype[1], (vocab,)))
            at += size
        plan = _LogitsPlan(
            np.empty((count, 3), np.float32), np.empty((count, self._topk), np.float32),
            np.empty((count, self._topk), np.int32), copies,
        )  # fmt: skip
        buffers.logits_plan = plan
        addresses = np.array([0 if item is None else address_of(item) for item in copies], np.int64)
        codes = np.array([0 if dtype is None else dtype[0] for dtype in kept], np.int64)
        self._library.logits(
            copy.data_ptr(), CODES[copy.dtype], count, vocab, vocab, self._topk,
            *addresses_of(plan.numbers, plan.best, plan.ids, addresses, codes),
        )  # fmt: skip

    def copy(self, step: Step) -> None:
        """See `maths.Maths`: everything is on the host already."""

    def sampled(self, step: Step, tokens: torch.Tensor) -> None:
        """See `maths.Maths`: tokens are on the host already."""

    # -- when tokens are known ---------------------------------------------------------------------------------

    def finish(self, step: Step) -> None:
        """See `maths.Maths`."""
        buffers = step.buffers
        if buffers is None:
            return
        if buffers.logits_plan is not None:
            self._finish_logits(step, buffers.logits_plan)
        if buffers.qk_plan is not None:
            for work in step.works:
                if work.has_qk:
                    keep_qk(work, *buffers.qk_plan.arrays[buffers.qk_plan.places[id(work)]])
        if buffers.plan is not None:
            for work in step.works:
                if work.has_row:
                    self._finish_attention(work, buffers.plan)

    def _finish_logits(self, step: Step, plan: _LogitsPlan) -> None:
        works = [work for work in step.works if work.logits_row >= 0]
        logits = step.logits
        assert logits is not None
        tokens = np.array([-1 if work.token is None else work.token for work in works], np.int64)
        picked, larger = np.empty(len(works), np.float32), np.empty(len(works), np.int64)
        self._library.ranks(
            logits.data_ptr(), CODES[logits.dtype], len(works), logits.shape[1], logits.shape[1],
            *addresses_of(tokens, picked, larger),
        )  # fmt: skip
        logprobs = (picked - plan.numbers[:, 0]).tolist()
        best = (plan.best - plan.numbers[:, :1]).tolist()
        ids, numbers, ranks = plan.ids.tolist(), plan.numbers.tolist(), larger.tolist()
        for place, work in enumerate(works):
            _, entropy, varentropy = numbers[place]
            if work.token is not None:
                top = best[place]
                work.logits = LogitsSummary(
                    entropy, varentropy, top[0] - top[1], logprobs[place], ranks[place], tuple(ids[place]), tuple(top)
                )
            copy = plan.copies[place]
            if copy is not None:
                work.arrays.append(("logits", copy, (0,)))
            else:
                _add_top(work, logits[place])

    def _finish_attention(self, work: Work, plan: _Plan) -> None:
        weights, features, tops = plan.arrays[plan.places[id(work)]]
        seen = np.empty(SEEN, np.float64)
        count = features.shape[0] * features.shape[1]
        self._library.summarise(address_of(features), address_of(tops), count, address_of(seen))
        entropy, sink, prompt, own, best, position, index = seen.tolist()
        layer, head = divmod(int(index), features.shape[1])
        traced = work.traced
        known = index >= 0
        work.attention = AttentionSummary(
            entropy, sink, prompt, own, int(position), best,
            int(traced.layer_index[layer]) if known else -1, traced.heads[head] if known else -1,
        )  # fmt: skip
        if weights is not None:
            work.arrays.append(("attention", weights, (0, 0, 0)))
        work.arrays.append(("attention_summary", features, (0, 0, 0)))

    def release(self, step: Step) -> None:
        """See `maths.Maths`."""
        buffers, step.buffers, step.logits = step.buffers, None, None
        if buffers is not None:
            buffers.plan = buffers.qk_plan = buffers.logits_plan = None
            self._pool.append(buffers)

    def _buffers(self, step: Step) -> _Buffers:
        if step.buffers is None:
            step.buffers = self._pool.pop() if self._pool else _Buffers()
        buffers: _Buffers = step.buffers
        return buffers


def _carve(buffer: Bytes, at: int, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of that shape inside `buffer`."""
    return np.ndarray(shape, dtype, buffer, at)


def _kept_dtype(work: Work) -> tuple[int, Any] | None:
    """Type in which the whole row is stored; None if it is not."""
    capture = work.traced.request.capture
    if capture is None or capture.logits is None or capture.logits.top is not None:
        return None
    return STORED[capture.logits.dtype]


def _add_top(work: Work, row: torch.Tensor) -> None:
    """The K best of a row [vocab], if the request stores those."""
    capture = work.traced.request.capture
    if capture is None or capture.logits is None or capture.logits.top is None:
        return
    values, ids = torch.topk(row.float(), capture.logits.top)
    dtype = STORED[capture.logits.dtype][1]
    work.arrays.append(("logits_topk", values.numpy().astype(dtype), (0,)))
    work.arrays.append(("logits_topk_id", ids.numpy().astype(np.int32), (0,)))
