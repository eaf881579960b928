"""A finished row of a step as a record, handed to the queue."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tracer.context import step_span_id
from tracer.export import Channel
from tracer.records import ArrayRecord, ArraySlice, StepRecord
from tracer.worker.pack import pack
from tracer.worker.work import Step, Work

__all__ = ["send_blocks", "send_step"]

POSITIONS: Final = 256
"""Positions per record of queries and keys: bounds a record's size."""


def send_step(channel: Channel, step: Step, work: Work, end_ns: int) -> None:
    """Hand the record over whole; without its arrays if the queue is full; else count it."""
    traced = work.traced
    slots, payload = pack(work.arrays)
    # Taken before sending: the next step's forward pass may add to the list meanwhile.
    problems, traced.problems = traced.problems, []
    record = _record(step, work, end_ns, slots, tuple(problems))
    if channel.send(record, payload):
        return
    problems += [f"{name}: queue full" for name, _, _ in work.arrays]
    if work.arrays and channel.send(replace(record, arrays=(), dropped=tuple(problems))):
        return
    traced.lost += 1
    traced.problems = [*problems, "step: queue full", *traced.problems]


def send_blocks(channel: Channel, work: Work) -> None:
    """Queries and keys, a bounded number of positions at a time; what does not fit is said by position."""
    traced = work.traced
    for name, values, (first, *rest) in work.blocks:
        for start in range(0, len(values), POSITIONS):
            part = values[start : start + POSITIONS]
            arrays, payload = pack([(name, part, (first + start, *rest))])
            record = ArrayRecord(traced.request.trace_id, traced.request.span_id, work.attempt, arrays)
            if not channel.send(record, payload):
                stop = first + start + len(part) - 1
                traced.problems.append(f"{name}: queue full at positions {first + start} to {stop}")


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
        sampled=traced.request.sampled,
        batch_requests=len(view.rows),
        batch_tokens=view.tokens,
        cuda_graph=view.cuda_graph,
        drafts=row.drafts,
        drafts_accepted=work.accepted if row.drafts else 0,
        token_id=work.token,
        logits=work.logits,
        attention=work.attention,
        capture=traced.request.capture is not None,
        arrays=arrays,
        dropped=dropped,
    )
