"""Raw logits of a step on a GPU: a copy in the engine's own precision, statistics, and what is stored of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.records import LogitsSummary
from tracer.statistics import ROWS_AT_ONCE, logits_statistics
from tracer.worker.device import Area, Device
from tracer.worker.gpu_plan import carve
from tracer.worker.pack import DTYPES
from tracer.worker.places import STORED, aligned
from tracer.worker.work import Stored, Work

__all__ = ["LogitsPlan", "ask_for_ranks", "logits_plan", "queue_logits", "summaries"]

FLOAT: Final = np.dtype(np.float32)
LONG: Final = np.dtype(np.int64)
INT: Final = np.dtype(np.int32)
NUMBERS: Final = 3
"""Log-sum-exp, entropy, varentropy."""


@dataclass(slots=True)
class LogitsPlan:
    """Where the sampled rows' results lie, in the same place of an area's two memories."""

    count: int
    topk: int
    best_at: int
    ids_at: int
    stored: list[list[tuple[str, int, Any, tuple[int, ...]]]]
    """Of each row: array, place, type as the settings name it (None for IDs) and shape."""
    ranked: bool = False
    """The ranks of the sampled tokens have been asked for."""


def logits_plan(
    sampling: Sequence[Work], vocab: int, topk: int, results: Area, device: Device
) -> tuple[LogitsPlan, Area]:
    """The plan and its area, which may be a new and larger one."""
    count = len(sampling)
    best_at = aligned(count * NUMBERS * 4)
    ids_at = best_at + aligned(count * topk * 4)
    at = ids_at + aligned(count * topk * 4)
    stored = []
    for work in sampling:
        arrays = []
        for name, dtype, shape in _wanted(work, vocab):
            arrays.append((name, at, dtype, shape))
            at += aligned(shape[0] * _numpy(dtype).itemsize)
        stored.append(arrays)
    return LogitsPlan(count, topk, best_at, ids_at, stored), results.room(device, at)


def _wanted(work: Work, vocab: int) -> list[tuple[str, Any, tuple[int, ...]]]:
    """What the request stores of its row."""
    capture = work.traced.request.capture
    if capture is None or capture.logits is None:
        return []
    dtype, top = capture.logits.dtype, capture.logits.top
    if top is None:
        return [("logits", dtype, (vocab,))]
    return [("logits_topk", dtype, (top,)), ("logits_topk_id", None, (top,))]


def _numpy(dtype: str | None) -> np.dtype[Any]:
    return INT if dtype is None else STORED[dtype][1]


def queue_logits(plan: LogitsPlan, raw: torch.Tensor, results: Area) -> None:
    """Queue the statistics and copies of these rows [rows, vocab], which hold what the sampler is about to get."""
    for start in range(0, plan.count, ROWS_AT_ONCE):
        part = raw[start : start + ROWS_AT_ONCE]
        _queue_statistics(plan, part.float(), results, slice(start, start + len(part)))
    for row, arrays in zip(raw, plan.stored, strict=True):
        views = [on_device(results, at, DTYPES.get(dtype, torch.int32), shape) for _, at, dtype, shape in arrays]
        if len(views) == 1:
            views[0].copy_(row)
        elif views:
            values, ids = torch.topk(row.float(), len(views[0]))
            views[0].copy_(values)
            views[1].copy_(ids)


def _queue_statistics(plan: LogitsPlan, logits: torch.Tensor, results: Area, rows: slice) -> None:
    found = logits_statistics(logits, plan.topk)
    numbers = on_device(results, 0, torch.float32, (plan.count, NUMBERS))
    for column, values in enumerate((found.normaliser, found.entropy, found.varentropy)):
        numbers[rows, column] = values
    on_device(results, plan.best_at, torch.float32, (plan.count, plan.topk))[rows] = found.top_logits
    on_device(results, plan.ids_at, torch.int32, (plan.count, plan.topk))[rows] = found.top_ids


def on_device(area: Area, at: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """What `gpu_plan.carve` gives of the host's memory, of the device's."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    view: torch.Tensor = area.device[at : at + size].view(dtype).view(shape)
    return view


def ask_for_ranks(raw: torch.Tensor, ranks: Area) -> None:
    """Queue, for the tokens in `ranks`, each one's logit and how many tokens have a larger one.

    ranks: int64 tokens, int64 counts, float32 logits, each [rows]; a token below 0 gives numbers without a meaning.
    """
    count = len(raw)
    tokens = on_device(ranks, 0, torch.int64, (count,))
    picked = raw.gather(1, tokens.clamp(min=0)[:, None])
    on_device(ranks, 8 * count, torch.int64, (count,)).copy_((raw > picked).sum(dim=-1))
    on_device(ranks, 16 * count, torch.float32, (count,)).copy_(picked[:, 0])


def ranks_of(ranks: Area, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The host's side of `ask_for_ranks`: tokens, counts, logits."""
    tokens, larger = carve(ranks, 0, LONG, (count,)), carve(ranks, 8 * count, LONG, (count,))
    return tokens, larger, carve(ranks, 16 * count, FLOAT, (count,))


def summaries(
    plan: LogitsPlan, results: Area, ranks: Area, tokens: Sequence[int | None]
) -> list[tuple[LogitsSummary | None, list[Stored]]]:
    """Of each row its summary, None where nothing was sampled, and its arrays; everything has arrived."""
    numbers = carve(results, 0, FLOAT, (plan.count, NUMBERS))
    best = carve(results, plan.best_at, FLOAT, (plan.count, plan.topk)) - numbers[:, :1]
    ids = carve(results, plan.ids_at, INT, (plan.count, plan.topk)).tolist()
    _, larger, picked = ranks_of(ranks, plan.count)
    logprobs = (picked - numbers[:, 0]).tolist()
    out = []
    for place, (token, arrays) in enumerate(zip(tokens, plan.stored, strict=True)):
        stored: list[Stored] = [
            (name, carve(results, at, _numpy(dtype), shape), (0,)) for name, at, dtype, shape in arrays
        ]
        summary, top = None, best[place].tolist()
        if token is not None:
            entropy, varentropy = numbers[place, 1:].tolist()
            rank = int(larger[place])
            summary = LogitsSummary(
                entropy, varentropy, top[0] - top[1], logprobs[place], rank, tuple(ids[place]), tuple(top)
            )
        out.append((summary, stored))
    return out
