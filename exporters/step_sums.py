"""Steps that share one span: what is kept of each, and how many of them go together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import Final

from tracer.records import StepRecord

__all__ = ["Plan", "StepSum", "TraceBudget"]

FIRST_WIDTH: Final = 16
"""Steps of the first span past the budget; each further one has four times as many ..."""
GROWTH: Final = 4
WIDEST: Final = 4096
"""... up to this."""
MAX_TRACES: Final = 4096
"""Traces whose step spans are counted; an older one that goes on begins anew."""


@dataclass(slots=True)
class Number:
    """Mean and extremes of one statistic, over the steps that have it."""

    count: int = 0
    total: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")

    def add(self, value: float) -> None:
        """NaN and infinity are left out, as on a step's own span."""
        if isfinite(value):
            self.count, self.total = self.count + 1, self.total + value
            self.least, self.most = min(self.least, value), max(self.most, value)

    @property
    def mean(self) -> float:
        """NaN without a value."""
        return self.total / self.count if self.count else float("nan")


@dataclass(slots=True)
class StepSum:
    """Consecutive steps of one phase of one generation."""

    first: StepRecord
    last: StepRecord
    count: int = 0
    tokens: int = 0
    sampled: int = 0
    """Steps that sampled a token."""
    drafts: int = 0
    drafts_accepted: int = 0
    dropped: list[str] = field(default_factory=list)
    logprob: Number = field(default_factory=Number)
    rank: Number = field(default_factory=Number)
    entropy: Number = field(default_factory=Number)
    margin: Number = field(default_factory=Number)
    sink_mass: Number = field(default_factory=Number)
    prompt_mass: Number = field(default_factory=Number)

    @classmethod
    def of(cls, record: StepRecord) -> StepSum:
        """A sum of one."""
        out = cls(record, record)
        out.add(record)
        return out

    def goes_on(self, record: StepRecord) -> bool:
        """True if that step is of the same kind."""
        return (self.last.phase, self.last.attempt) == (record.phase, record.attempt)

    def add(self, record: StepRecord) -> None:
        """Count one more step, the next of its generation."""
        self.last = record
        self.count += 1
        self.tokens += record.tokens
        self.sampled += record.step is not None
        self.drafts += record.drafts
        self.drafts_accepted += record.drafts_accepted
        self.dropped += record.dropped
        if (row := record.logits) is not None:
            self.logprob.add(row.logprob)
            self.rank.add(float(row.rank))
            self.entropy.add(row.entropy)
            self.margin.add(row.margin)
        if (attention := record.attention) is not None:
            self.sink_mass.add(attention.sink_mass)
            self.prompt_mass.add(attention.prompt_mass)


class TraceBudget:
    """Step spans that each trace may still have, whichever of its requests they belong to."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used: OrderedDict[str, int] = OrderedDict()

    def take(self, trace_id: str) -> bool:
        """True if the trace may have one more span of a single step."""
        used = self._used.pop(trace_id, 0)
        granted = used < self._limit
        self._used[trace_id] = used + granted
        if len(self._used) > MAX_TRACES:
            self._used.popitem(last=False)
        return granted


class Plan:
    """Which steps of one generation get a span of their own, and which go together."""

    def __init__(self, every: int, budget: TraceBudget) -> None:
        """every: 1 for a span per step, 0 for none, N for that of each N-th output token."""
        self._every = every
        self._budget = budget
        self._open: StepSum | None = None
        self._width = FIRST_WIDTH

    def place(self, record: StepRecord) -> Iterator[StepRecord | StepSum]:
        """The spans that can be made now, in order: of the next step, and of a sum that it closes."""
        if self._alone(record) and self._budget.take(record.trace_id):
            yield from self.close()
            yield record
            return
        if self._open is not None and not self._open.goes_on(record):
            yield from self.close()
        if self._open is None:
            self._open = StepSum.of(record)
        else:
            self._open.add(record)
        # A sum that is thinned ends at the next step with a span of its own, or with its phase.
        if self._alone(record) and self._open.count >= self._width:
            self._width = min(self._width * GROWTH, WIDEST)
            yield from self.close()

    def close(self) -> Iterator[StepSum]:
        """The sum that is still open, if there is one."""
        if self._open is not None:
            yield self._open
        self._open = None

    def _alone(self, record: StepRecord) -> bool:
        """True for a step that the request wants a span of; a prompt's chunk without a token counts as one."""
        return self._every > 0 and (record.step is None or record.step % self._every == 0)
