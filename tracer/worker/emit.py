"""A finished row of a step as a record, handed to the queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from tracer.context import step_span_id
from tracer.export import Channel
from tracer.records import ArrayRecord, ArraySlice, AttentionSummary, StepRecord
from tracer.worker.pack import pack
from tracer.worker.work import Step, Stored, Work

__all__ = ["send_blocks", "send_step"]

POSITIONS: Final = 256
"""Positions per record of queries and keys: bounds a record's size."""


def send_step(channel: Channel, step: Step, work: Work, end_ns: int) -> None:
    """Hand the record over whole; without its arrays if the queue is full; else count it."""
    traced = work.traced
    arrays = _placed(work, work.arrays)
    slots, payload = pack(arrays)
    # Taken before sending: the next step's forward pass may add to the list meanwhile.
    problems, traced.problems = traced.problems, []
    record = _record(step, work, end_ns, slots, _said(work, problems))
    if channel.send(record, payload):
        return
    problems += [f"{name}: queue full" for name, _, _ in arrays]
    if arrays and channel.send(replace(record, arrays=(), dropped=_said(work, problems))):
        return
    traced.lost += 1
    traced.problems = [*problems, "step: queue full", *traced.problems]


def send_blocks(channel: Channel, work: Work) -> None:
    """Queries and keys, a bounded number of positions at a time; what does not fit is said by position."""
    traced = work.traced
    for name, values, (first, *rest) in _placed(work, work.blocks):
        for start in range(0, len(values), POSITIONS):
            part = values[start : start + POSITIONS]
            arrays, payload = pack([(name, part, (first + start, *rest))])
            record = ArrayRecord(traced.request.trace_id, traced.request.span_id, work.attempt, arrays)
            if not channel.send(record, payload):
                stop = first + start + len(part) - 1
                traced.problems.append(f"{name}: queue full at positions {first + start} to {stop}")


def _placed(work: Work, arrays: Sequence[Stored]) -> Sequence[Stored]:
    """Arrays of this rank's heads at their places among all heads; without keys that another rank stores."""
    own = work.traced.own
    if own.ranks == 1:
        return arrays
    out: list[Stored] = []
    for name, values, start in arrays:
        kind, _, prompt = name.partition("_")
        places = {"attention": own.slot, "query": own.first_head, "key": own.first_key}
        if kind not in places:
            out.append((name, values, start))
        elif (head := places[kind]) is not None:
            axis = 2 if prompt == "prompt" else 1
            out.append((name, values, (*start[:axis], head, *start[axis + 1 :])))
    return out


def _said(work: Work, problems: Sequence[str]) -> tuple[str, ...]:
    """Causes with the rank's name where there are several."""
    own = work.traced.own
    if own.ranks == 1:
        return tuple(problems)
    parts = [problem.partition(": ") for problem in problems]
    return tuple(f"{name}: rank {own.rank}: {cause}" for name, _, cause in parts)


def _summary(work: Work) -> AttentionSummary | None:
    """The row's summary in the model's numbers, with what it weighs beside other ranks'."""
    own, found = work.traced.own, work.attention
    if found is None or own.ranks == 1:
        return found
    pairs = len(work.traced.slots) * len(work.traced.heads)
    head = found.top_head + own.first_head if found.top_head >= 0 else -1
    return replace(found, top_head=head, pairs=pairs)


def _record(
    step: Step, work: Work, end_ns: int, arrays: tuple[ArraySlice, ...], dropped: tuple[str, ...]
) -> StepRecord:
    row, traced, view = work.row, work.traced, step.view
    assert view is not None
    return StepRecord(
        trace_id=traced.request.trace_id,
        span_id=traced.request.span_id,
        step_span_id=step_span_id(traced.request.span_id, row.position, work.attempt),
        step=row.step,
        phase="prefill" if row.is_prefill else "decode",
        attempt=work.attempt,
        position=row.position,
        tokens=row.tokens,
        kv_len=row.position + 1,
        start_ns=step.start_ns,
        end_ns=end_ns,
        rank=traced.own.rank,
        sampled=traced.request.sampled,
        batch_requests=len(view.rows),
        batch_tokens=view.tokens,
        cuda_graph=view.cuda_graph,
        drafts=row.drafts,
        drafts_accepted=work.accepted if row.drafts else 0,
        token_id=work.token,
        logits=work.logits,
        attention=_summary(work),
        capture=traced.request.capture is not None,
        arrays=arrays,
        dropped=dropped,
    )
