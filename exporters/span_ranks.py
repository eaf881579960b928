"""One step span out of what several tensor parallel ranks report of a step: rank 0's, with the means of all heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from tracer.records import AttentionSummary, StepRecord

__all__ = ["StepRanks", "join_steps"]

LATE: Final = "not received in time"


@dataclass(slots=True)
class StepRanks:
    """Which ranks have reported the steps of one generation whose spans have not been made."""

    count: int
    """Ranks that report each step."""
    seen: dict[str, set[int]] = field(default_factory=dict)
    """By step span ID."""
    gone: set[str] = field(default_factory=set)
    """Steps whose spans were made without one of the ranks."""

    def join(self, waiting: list[StepRecord], record: StepRecord) -> StepRecord | None:
        """Put the record where it belongs: into a waiting one of its step, else at the end.

        Returns the record if it came too late for its span.
        """
        step = record.step_span_id
        if step in self.gone:
            return record
        known = self.seen.setdefault(step, set())
        if not known:
            waiting.append(record)
        elif record.rank not in known:
            at = next(at for at in range(len(waiting) - 1, -1, -1) if waiting[at].step_span_id == step)
            waiting[at] = join_steps(waiting[at], record)
        known.add(record.rank)
        return None

    def whole(self, waiting: Sequence[StepRecord]) -> int:
        """How many records from the front on every rank has reported."""
        counts = (len(self.seen.get(record.step_span_id, ())) for record in waiting)
        return next((at for at, count in enumerate(counts) if count < self.count), len(waiting))

    def take(self, steps: Sequence[StepRecord]) -> list[StepRecord]:
        """These steps leave; what a rank has not reported of them is said."""
        out = []
        for record in steps:
            known = self.seen.pop(record.step_span_id, set())
            absent = [rank for rank in range(self.count) if rank not in known]
            if absent:
                self.gone.add(record.step_span_id)
            said = (f"{'attention' if rank else 'logits'}: rank {rank}: {LATE}" for rank in absent)
            out.append(replace(record, dropped=(*record.dropped, *said)) if absent else record)
        return out


def join_steps(one: StepRecord, other: StepRecord) -> StepRecord:
    """The same step by two ranks: the lower one's record, with the heads and losses of both."""
    first, second = (one, other) if one.rank < other.rank else (other, one)
    attention = _join(first.attention, second.attention)
    return replace(first, attention=attention, dropped=(*first.dropped, *second.dropped))


def _join(one: AttentionSummary | None, other: AttentionSummary | None) -> AttentionSummary | None:
    """Means over the heads of both, and the larger of the two largest weights."""
    if one is None or other is None:
        return one or other
    pairs = one.pairs + other.pairs
    top = max(one, other, key=lambda found: (found.top_position >= 0, found.top_weight))

    def mean(mine: float, theirs: float) -> float:
        return (mine * one.pairs + theirs * other.pairs) / pairs

    return replace(
        top,
        entropy=mean(one.entropy, other.entropy),
        sink_mass=mean(one.sink_mass, other.sink_mass),
        prompt_mass=mean(one.prompt_mass, other.prompt_mass),
        self_weight=mean(one.self_weight, other.self_weight),
        pairs=pairs,
    )
