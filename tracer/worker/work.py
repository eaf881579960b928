"""What a worker remembers: of a traced request, of one step, and of one request's row in it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tracer.records import AttentionSpec, LogitsSummary, TraceRequest
from tracer.statistics import RowStatistics
from tracer.worker.batch import Row, StepView

__all__ = ["Step", "Traced", "Work"]


@dataclass(slots=True)
class Traced:
    """A request that has a TraceRequest, for as long as the scheduler knows it."""

    request: TraceRequest
    slots: dict[int, int]
    """Layer index → place on the stored layer axis; empty without attention."""
    heads: list[int]
    attempt: int = 1
    problems: list[str] = field(default_factory=list)
    """`name: cause` of what was lost and not yet said."""
    lost: int = 0
    """Records that could not be handed over even without arrays."""
    pending: int = 0
    """Steps that have run and whose tokens are not known yet."""
    finished: bool = False
    """The scheduler has forgotten the request."""

    @property
    def attention(self) -> AttentionSpec | None:
        """The attention rows to store; None for summaries alone and for no attention."""
        return self.request.capture.attention if self.request.capture else None

    @property
    def all_rows(self) -> bool:
        """True if the prompt's rows are to be stored too."""
        return self.attention is not None and self.attention.rows == "all"


@dataclass(slots=True, eq=False)
class Work:
    """One traced row of a step."""

    row: Row
    traced: Traced
    logits_row: int = -1
    """Row of `Step.logits`; -1 if nothing is sampled."""
    weights: torch.Tensor | None = None
    """float32 [layers, heads, keys] of the last query row."""
    features: torch.Tensor | None = None
    """float32 [layers, heads, 4] of `weights`, see `attention.FEATURES`."""
    token: int | None = None
    """What was sampled from the row."""
    logits: LogitsSummary | None = None
    layers_seen: int = 0
    """Layers that have put their row into `weights`."""

    @property
    def wants_prompt(self) -> bool:
        """True if this step holds rows of the prompt's own map that were asked for."""
        return self.traced.all_rows and self.row.computed < self.row.prompt_tokens


@dataclass(slots=True)
class Step:
    """A step between its forward pass and its sampled tokens."""

    start_ns: int
    view: StepView | None = None
    works: list[Work] = field(default_factory=list)
    logits: torch.Tensor | None = None
    """float32 [sampled traced rows, vocab], a copy from before grammar, penalties and temperature."""
    statistics: RowStatistics | None = None
