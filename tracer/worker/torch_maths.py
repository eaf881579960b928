"""A step's numbers in plain torch, on any device: the reference, and what is used where no kernels are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tracer.statistics import logits_statistics, logits_summaries
from tracer.worker.attention import row_features, summarise
from tracer.worker.device import indices
from tracer.worker.layers import Layer
from tracer.worker.pack import DTYPES
from tracer.worker.places import keep_qk, qk_dtype
from tracer.worker.rows import last_row_weights, past_keys, row_weights, worth_batching
from tracer.worker.work import Step, Stored, Work

__all__ = ["TorchMaths"]


class TorchMaths:
    """See `maths.Maths`."""

    name = "torch"

    def __init__(self, topk: int) -> None:
        self._topk = topk

    def attention(
        self, step: Step, layer: Layer, works: Sequence[Work], query: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> None:
        """See `maths.Maths`: requests of like length in one pass, others one by one."""
        if worth_batching([work.row for work in works]):
            rows = last_row_weights(layer, [work.row for work in works], query, cache, metadata)
        else:
            rows = [_last_row(layer, work, query, cache, metadata) for work in works]
        for work, weights in zip(works, rows, strict=True):
            _keep(work, layer.info.index, weights)

    def collect(
        self, step: Step, layer: Layer, works: Sequence[Work], query: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> None:
        """See `maths.Maths`."""
        assert layer.keys is not None
        for work in works:
            keys = past_keys(layer, work.row, cache, metadata)
            (first, count), (start, more) = work.queries, work.keys
            if work.qk is None:
                work.qk = _qk_room(work, layer, keys)
            slot = work.traced.qk_slots[layer.info.index]
            work.qk[0][:, slot] = query[first : first + count]
            work.qk[1][:, slot] = keys[:, start : start + more].transpose(0, 1)
            # A block that a window gave back may hold another request's keys.
            window = layer.info.sliding_window
            if window is not None:
                work.qk[1][: max(work.row.computed + 1 - window - start, 0), slot] = torch.nan
            work.qk_seen += 1

    def logits(self, step: Step, sampling: Sequence[Work], logits: torch.Tensor) -> None:
        """See `maths.Maths`."""
        picked = indices([work.row.logits_row for work in sampling], logits.device)
        step.logits = logits.index_select(0, picked).to(torch.float32)
        step.statistics = logits_statistics(step.logits, self._topk)

    def copy(self, step: Step) -> None:
        """See `maths.Maths`: `pack` copies what is stored."""

    def sampled(self, step: Step, tokens: torch.Tensor) -> None:
        """See `maths.Maths`: `finish` looks at the tokens on the host."""

    def finish(self, step: Step) -> None:
        """See `maths.Maths`."""
        if step.logits is not None and step.statistics is not None:
            works = [work for work in step.works if work.logits_row >= 0]  # In the order of their rows.
            summaries = logits_summaries(step.logits, step.statistics, [work.token for work in works])
            for work, summary in zip(works, summaries, strict=True):
                work.logits = summary
                work.arrays += _logits_arrays(work, step.logits[work.logits_row])
        for work in step.works:
            _finish_attention(work)
            if work.has_qk and work.qk is not None:
                keep_qk(work, *work.qk)

    def release(self, step: Step) -> None:
        """See `maths.Maths`: torch frees by itself."""


def _last_row(layer: Layer, work: Work, query: torch.Tensor, cache: torch.Tensor, metadata: Any) -> torch.Tensor:
    row = work.row
    keys = past_keys(layer, row, cache, metadata)
    last = query[row.first + row.tokens - 1 : row.first + row.tokens]
    return row_weights(layer, last, keys, torch.full((1,), row.position, device=keys.device))[:, 0]


def _keep(work: Work, index: int, weights: torch.Tensor) -> None:
    """Put one layer's row [heads, keys] in its place of the step's block."""
    traced = work.traced
    if work.weights is None:
        shape = (len(traced.slots), len(traced.heads), weights.shape[-1])
        work.weights = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    chosen = [head for head in traced.heads if head < weights.shape[0]]
    work.layers_seen += 1
    every = len(chosen) == weights.shape[0]
    work.weights[traced.slots[index], : len(chosen)] = weights if every else weights[indices(chosen, weights.device)]


def _qk_room(work: Work, layer: Layer, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for [positions, layers, heads, head_size] queries and keys of this step."""
    dtype = DTYPES[qk_dtype(work, keys.dtype == torch.float32)]
    info, layers = layer.info, len(work.traced.qk_slots)
    sizes = ((work.queries[1], info.num_heads), (work.keys[1], info.num_kv_heads))
    queries, own = [
        torch.empty((count, layers, heads, info.head_size), dtype=dtype, device=keys.device) for count, heads in sizes
    ]
    return queries, own


def _finish_attention(work: Work) -> None:
    if not work.has_row or work.weights is None:
        return
    traced = work.traced
    features = row_features(work.weights, work.row.prompt_tokens)
    work.attention = summarise(work.weights, features, list(traced.slots), traced.heads)
    if traced.attention is not None:
        work.arrays.append(("attention", work.weights.to(DTYPES[traced.attention.dtype]), (0, 0, 0)))
    work.arrays.append(("attention_summary", features, (0, 0, 0)))


def _logits_arrays(work: Work, row: torch.Tensor) -> list[Stored]:
    """What the request stores of its float32 row [vocab]."""
    capture = work.traced.request.capture
    if capture is None or capture.logits is None:
        return []
    dtype = DTYPES[capture.logits.dtype]
    if capture.logits.top is None:
        return [("logits", row.to(dtype), (0,))]
    values, ids = torch.topk(row, capture.logits.top)
    return [("logits_topk", values.to(dtype), (0,)), ("logits_topk_id", ids.to(torch.int32), (0,))]
