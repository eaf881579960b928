"""The flattened batch as request rows: what both model runners are reduced to. Pure data, no vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

__all__ = ["Arrival", "Row", "Runner", "StepPlan", "StepView"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as the scheduler first hands it to the worker."""

    request_id: str
    extra_args: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler announces before the model runs."""

    arrived: tuple[Arrival, ...]
    resumed: frozenset[str]
    """Requests that were preempted and start again."""
    finished: frozenset[str]
    """Requests that will never be scheduled again, aborted ones included."""
    scheduled: frozenset[str]


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part of a step."""

    request_id: str
    index: int
    """Its place in the batch: in `query_start_loc` and the block table."""
    first: int
    """Its first row in the flattened query tensor."""
    tokens: int
    """Its query rows."""
    computed: int
    """Absolute position of its first query row."""
    prompt_tokens: int
    samples: bool
    """False for a prefill chunk that is not the last: nothing is sampled from it."""
    drafts: int = 0
    """Draft tokens at the end of its query rows, which the sampler may still reject; a part keeps their number."""
    draft: int = 0
    """How many of them its last row takes for granted; see `parts`."""
    first_logits: int | None = None
    """Its first row of the logits; None where each request has one, at its `index`."""

    def parts(self) -> Iterator[Row]:
        """The row up to its last verified token, and one more for each draft token: each may give an output token.

        Which of them do is known when the sampler has spoken: with n draft tokens accepted, the first n + 1. Behind a
        prefill chunk that samples nothing drafts are placeholders.
        """
        verified = self.tokens - self.drafts
        yield replace(self, tokens=verified) if self.drafts else self
        for draft in range(1, self.drafts + 1 if self.samples else 1):
            skipped = verified + draft - 1
            first, computed = self.first + skipped, self.computed + skipped
            yield replace(self, first=first, tokens=1, computed=computed, draft=draft)

    @property
    def logits_row(self) -> int:
        """Its row of the logits."""
        return self.index if self.first_logits is None else self.first_logits + self.draft

    @property
    def position(self) -> int:
        """Absolute position of the last query row."""
        return self.computed + self.tokens - 1

    @property
    def step(self) -> int | None:
        """Index of the output token that the last row predicts; None if nothing is sampled."""
        return self.position + 1 - self.prompt_tokens if self.samples else None

    @property
    def is_prefill(self) -> bool:
        """True if the step (re)computes rows other than the newest token's."""
        return self.tokens > 1 or self.computed < self.prompt_tokens


@dataclass(frozen=True, slots=True)
class StepView:
    """The batch of one step."""

    rows: tuple[Row, ...]
    cuda_graph: str = "NONE"
    settled: bool = True
    """False if each row's `computed` counts draft tokens of the step before that may yet be rejected."""

    @property
    def tokens(self) -> int:
        """Query rows of all requests."""
        return sum(row.tokens for row in self.rows)


class Runner(Protocol):
    """A model runner adapter: `runner_v1.RunnerV1` or `runner_v2.RunnerV2`."""

    version: str

    def plan(self, scheduler_output: Any) -> StepPlan:
        """What is about to run."""

    def view(self, *, exact: bool) -> StepView:
        """The batch as the model sees it; valid from the first attention layer until sampling.

        exact: its positions are needed now, even if only the device knows them; else they may come unsettled.
        """

    def demote(self, demoted: bool) -> None:
        """Keep (or stop keeping) the coming steps off FULL CUDA graphs, under which no Python runs."""
