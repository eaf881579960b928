"""A step's numbers on a GPU: Triton kernels queued behind the model, results copied beside it.

Nothing here waits for the device during a step. Tables for the kernels go up once a step, results come down into
page-locked memory on a stream of their own; `finish` waits for that copy alone, which vLLM's own wait for its sampled
tokens has as good as outlasted. Both memories go back to a pool when the step has been sent.

Unproven on a GPU: the kernels are compiled for several and run by Triton's interpreter in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.records import AttentionSummary
from tracer.worker.attention import FEATURES
from tracer.worker.device import Area, Device, Mark, lasting
from tracer.worker.gpu_check import check_layer, check_logits
from tracer.worker.gpu_logits import (
    LogitsPlan,
    ask_for_ranks,
    logits_plan,
    on_device,
    queue_logits,
    ranks_of,
    summaries,
)
from tracer.worker.gpu_plan import PickPlan, RowPlan, pick_plan, row_plan
from tracer.worker.layers import Layer
from tracer.worker.places import keep_qk
from tracer.worker.rows import require_causal
from tracer.worker.triton_layer import TYPES, GpuError, TritonLayer, as_results
from tracer.worker.work import Step, Work

__all__ = ["GpuMaths", "summarise_rows"]

STRIDE: Final = 1024
"""Score rows grow by this many keys, so that a growing context does not ask for memory at every step."""


@dataclass(slots=True)
class _Buffers:
    """Memory of one step; goes back to the pool when the step has been sent."""

    row_tables: Area
    rows: Area
    pick_tables: Area
    picks: Area
    logit_rows: Area
    logits: Area
    ranks: Area
    raw: torch.Tensor
    """uint8: the sampled rows' logits, which never leave the device as they are."""
    row_plan: RowPlan | None = None
    pick_plan: PickPlan | None = None
    logits_plan: LogitsPlan | None = None
    done: Mark | None = None
    """When the last copy to the host has arrived."""

    def clear(self) -> None:
        """Forget the step, keep its memory."""
        self.row_plan = self.pick_plan = self.logits_plan = self.done = None
        for area in (self.rows, self.picks, self.logits, self.ranks):
            area.used = 0


class GpuMaths:
    """See `maths.Maths`. Raises GpuError if a layer's cache cannot be read or the kernels disagree with torch."""

    name = "triton"

    def __init__(self, device: Device, layers: Sequence[Layer], topk: int) -> None:
        self._device = device
        self._topk = topk
        usable = [layer for layer in layers if layer.math is not None]
        self._layers = {layer.info.index: TritonLayer.of(layer) for layer in usable}
        self._count = max(self._layers, default=-1) + 1
        self._width = max((layer.info.num_heads for layer in usable), default=0)
        self._scores = device.empty(0).view(torch.float32)
        self._stride = 0
        self._pool: list[_Buffers] = []
        for layer in usable:
            check_layer(self, layer)
        check_logits(self, device.empty(0).device, topk)

    # -- during the forward pass -------------------------------------------------------------------------------

    def attention(
        self, step: Step, layer: Layer, works: Sequence[Work], query: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> None:
        """See `maths.Maths`."""
        require_causal(metadata)
        buffers = self._buffers(step)
        plan = buffers.row_plan
        if plan is None:
            made = row_plan(step.rows, self._count, self._width, buffers.rows, buffers.row_tables, self._device)
            plan, buffers.rows, buffers.row_tables = made
            buffers.row_tables.upload()
            self._make_room(plan)
            buffers.row_plan = plan
        self._layers[layer.info.index].attend(
            plan, _numbers(buffers.row_tables), as_results(buffers.rows.device), self._scores, self._stride, query,
            cache, metadata.block_table,
        )  # fmt: skip
        for work in works:
            work.layers_seen += 1

    def collect(
        self, step: Step, layer: Layer, works: Sequence[Work], query: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> None:
        """See `maths.Maths`."""
        require_causal(metadata)
        buffers, known = self._buffers(step), self._layers[layer.info.index]
        plan = buffers.pick_plan
        if plan is None:
            f32 = known.dtype == torch.float32
            made = pick_plan(
                step.sources, layer.info, self._count, buffers.picks, buffers.pick_tables, self._device, f32=f32
            )
            plan, buffers.picks, buffers.pick_tables = made
            buffers.pick_tables.upload()
            buffers.pick_plan = plan
        known.collect(
            plan, _numbers(buffers.pick_tables), as_results(buffers.picks.device), query, cache, metadata.block_table
        )
        for work in works:
            work.qk_seen += 1

    def logits(self, step: Step, sampling: Sequence[Work], logits: torch.Tensor) -> None:
        """See `maths.Maths`: the copy keeps the engine's own precision."""
        if logits.dtype not in TYPES:
            raise TypeError(f"logits of type {logits.dtype}")
        buffers, (count, vocab) = self._buffers(step), (len(sampling), logits.shape[1])
        plan, buffers.logits = logits_plan(sampling, vocab, self._topk, buffers.logits, self._device)
        buffers.logit_rows = buffers.logit_rows.room(self._device, 24 * count)
        buffers.logit_rows.bytes[: 24 * count].view(np.int64)[:] = [
            *(work.row.logits_row for work in sampling), *(work.row.index for work in sampling),
            *(work.row.draft for work in sampling),
        ]  # fmt: skip
        buffers.logit_rows.upload()
        size = count * vocab * logits.element_size()
        if len(buffers.raw) < size:
            buffers.raw = lasting(self._device.empty, size + size // 2)
        step.logits = buffers.raw[:size].view(logits.dtype).view(count, vocab)
        torch.index_select(logits, 0, _numbers(buffers.logit_rows)[:count], out=step.logits)
        queue_logits(plan, step.logits, buffers.logits)
        buffers.logits_plan = plan

    def copy(self, step: Step) -> None:
        """See `maths.Maths`."""
        buffers = step.buffers
        if buffers is None:
            return
        with self._device.aside(self._device.mark()):
            for area in (buffers.rows, buffers.picks, buffers.logits):
                area.fetch()
            buffers.done = self._device.mark()

    def sampled(self, step: Step, tokens: torch.Tensor) -> None:
        """See `maths.Maths`: ranks are counted on the device, so that the rows need not leave it."""
        buffers = step.buffers
        if buffers is None or buffers.logits_plan is None or step.logits is None:
            return
        count = buffers.logits_plan.count
        buffers.ranks = buffers.ranks.room(self._device, 20 * count)
        rows, drafts = _numbers(buffers.logit_rows)[count : 3 * count].view(2, count)
        on_device(buffers.ranks, 0, torch.int64, (count,)).copy_(tokens.view(len(tokens), -1)[rows, drafts])
        with self._device.aside(self._device.mark()):
            ask_for_ranks(step.logits, buffers.ranks)
            buffers.ranks.fetch()
            buffers.done = self._device.mark()
        buffers.logits_plan.ranked = True

    # -- when tokens are known ---------------------------------------------------------------------------------

    def finish(self, step: Step) -> None:
        """See `maths.Maths`."""
        buffers = step.buffers
        if buffers is None:
            return
        if buffers.done is None:
            for work in step.works:
                work.traced.problems.append("step: its results were not copied to the host")
            raise GpuError("the step's results were not copied to the host")
        buffers.done.synchronize()
        if buffers.logits_plan is not None:
            self._finish_logits(step, buffers, buffers.logits_plan)
        for work in step.works:
            if buffers.pick_plan is not None and work.has_qk:
                keep_qk(work, *buffers.pick_plan.arrays[buffers.pick_plan.places[id(work)]])
            if buffers.row_plan is not None and work.has_row:
                _finish_attention(work, buffers.row_plan)

    def _finish_logits(self, step: Step, buffers: _Buffers, plan: LogitsPlan) -> None:
        works = [work for work in step.works if work.logits_row >= 0]
        tokens = [work.token for work in works]
        known = np.array([-1 if token is None else token for token in tokens], np.int64)
        if not plan.ranked or bool(((known >= 0) & (ranks_of(buffers.ranks, plan.count)[0] != known)).any()):
            self._rank_late(step, buffers, known)
        for work, (summary, stored) in zip(works, summaries(plan, buffers.logits, buffers.ranks, tokens), strict=True):
            work.logits = summary
            work.arrays += stored

    def _rank_late(self, step: Step, buffers: _Buffers, tokens: NDArray[np.int64]) -> None:
        """Ranks where no sampler's tokens were seen on the device, on a stream that waits for no later step."""
        assert step.logits is not None
        assert buffers.done is not None
        buffers.ranks = buffers.ranks.room(self._device, 20 * len(tokens))
        ranks_of(buffers.ranks, len(tokens))[0][:] = tokens
        with self._device.aside(buffers.done, late=True):
            buffers.ranks.upload()
            ask_for_ranks(step.logits, buffers.ranks)
            buffers.ranks.fetch()
            arrived = self._device.mark()
        arrived.synchronize()

    def release(self, step: Step) -> None:
        """See `maths.Maths`."""
        buffers, step.buffers, step.logits = step.buffers, None, None
        if buffers is not None:
            buffers.clear()
            self._pool.append(buffers)

    # -- memory ------------------------------------------------------------------------------------------------

    def _buffers(self, step: Step) -> _Buffers:
        if step.buffers is None:
            step.buffers = self._pool.pop() if self._pool else self._new_buffers()
        buffers: _Buffers = step.buffers
        return buffers

    def _new_buffers(self) -> _Buffers:
        new = partial(Area.of, self._device, 0)
        return _Buffers(new(), new(), new(), new(), new(), new(), new(), lasting(self._device.empty, 0))

    def _make_room(self, plan: RowPlan) -> None:
        """Scratch for the scores of one layer; each layer uses it after the one before."""
        self._stride = max(self._stride, -(-plan.longest // STRIDE) * STRIDE)
        size = plan.count * plan.most * self._stride
        if self._scores.numel() < size:
            self._scores = lasting(self._device.empty, 4 * size).view(torch.float32)


def _numbers(area: Area) -> torch.Tensor:
    """An area of the device as int64."""
    numbers: torch.Tensor = area.device.view(torch.int64)
    return numbers


def _finish_attention(work: Work, plan: RowPlan) -> None:
    weights, features, tops = plan.arrays[plan.places[id(work)]]
    work.attention = summarise_rows(features, tops, list(work.traced.slots), work.traced.heads)
    if weights is not None:
        work.arrays.append(("attention", weights, (0, 0, 0)))
    work.arrays.append(("attention_summary", features, (0, 0, 0)))


def summarise_rows(
    features: NDArray[np.float32], tops: NDArray[np.float32], layers: list[int], heads: list[int]
) -> AttentionSummary:
    """Like `attention.summarise`, from features [layers, heads, 4] and each row's top [layers, heads, 2]."""
    seen = ~np.isnan(features[..., 0])
    means = features[seen].mean(axis=0, dtype=np.float64).tolist() if seen.any() else [math.nan] * len(FEATURES)
    entropy, sink, prompt, own = means
    weights = np.where(tops[..., 1] >= 0, tops[..., 0], -1.0)
    layer, head = (int(place) for place in np.unravel_index(int(weights.argmax()), weights.shape))
    weight, position = tops[layer, head].tolist()
    if position < 0:
        return AttentionSummary(entropy, sink, prompt, own, -1, 0.0, -1, -1)
    return AttentionSummary(entropy, sink, prompt, own, int(position), weight, layers[layer], heads[head])
