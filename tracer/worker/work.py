"""What a worker remembers: of a traced request, of one step, and of one request's row in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.records import AttentionSpec, AttentionSummary, LogitsSummary, QKSpec, TraceRequest
from tracer.statistics import RowStatistics
from tracer.worker.batch import Row, StepView

__all__ = ["Step", "Stored", "Traced", "Work"]

Stored = tuple[str, NDArray[Any] | torch.Tensor, tuple[int, ...]]
"""Name, values and start of an array to be stored, see `records.ArraySlice`."""


@dataclass(slots=True)
class Traced:
    """A request that has a TraceRequest, for as long as the scheduler knows it."""

    request: TraceRequest
    slots: dict[int, int]
    """Layer index → place on the stored layer axis; empty without attention."""
    heads: list[int]
    qk_slots: dict[int, int] = field(default_factory=dict)
    """Likewise for queries and keys."""
    keys_sent: int = 0
    """Keys 0 … that the store has been given."""
    attempt: int = 1
    reached: tuple[int, int] | None = None
    """Attempt and tokens whose keys are valid after the last step whose tokens are known."""
    problems: list[str] = field(default_factory=list)
    """`name: cause` of what was lost and not yet said."""
    lost: int = 0
    """Records that could not be handed over even without arrays."""
    pending: int = 0
    """Steps that have run and whose tokens are not known yet."""
    finished: bool = False
    """The scheduler has forgotten the request."""
    layer_index: NDArray[np.int64] = field(init=False)
    """`slots` in their order, for indexing."""
    qk_index: NDArray[np.int64] = field(init=False)
    slot_index: NDArray[np.int64] = field(init=False)
    head_index: NDArray[np.int64] = field(init=False)
    heads_at: int = field(init=False)
    """Address of `head_index`, for the C kernels."""

    def __post_init__(self) -> None:
        """Index arrays are made once: steps use them as they are."""
        self.layer_index = np.fromiter(self.slots, np.int64, len(self.slots))
        self.slot_index = np.fromiter(self.slots.values(), np.int64, len(self.slots))
        self.qk_index = np.fromiter(self.qk_slots, np.int64, len(self.qk_slots))
        self.head_index = np.array(self.heads, np.int64)
        self.heads_at = self.head_index.__array_interface__["data"][0]

    @property
    def attention(self) -> AttentionSpec | None:
        """The attention rows to store; None for summaries alone and for no attention."""
        return self.request.capture.attention if self.request.capture else None

    @property
    def qk(self) -> QKSpec | None:
        """The queries and keys to store."""
        return self.request.capture.qk if self.request.capture else None

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
    """Row among the step's sampled traced rows; -1 if nothing is sampled."""
    weights: torch.Tensor | None = None
    """float32 [layers, heads, keys] of the last query row, where torch computes it."""
    qk: tuple[torch.Tensor, torch.Tensor] | None = None
    """Queries and keys [positions, layers, heads, head_size], where torch collects them."""
    token: int | None = None
    """What was sampled from the row."""
    accepted: int = 0
    """Draft tokens of the step that the sampler accepted."""
    logits: LogitsSummary | None = None
    attention: AttentionSummary | None = None
    arrays: list[Stored] = field(default_factory=list)
    """What this row stores; filled once its token is known."""
    blocks: list[Stored] = field(default_factory=list)
    """Queries and keys of the prompt that this step brought, by position."""
    layers_seen: int = 0
    """Layers that have given this row its weights."""
    qk_seen: int = 0
    """Layers whose queries and keys have been collected."""
    keys_sent: int = field(init=False)
    """`Traced.keys_sent` before this step: the next one may have begun when this one is sent."""
    attempt: int = field(init=False)
    """Likewise."""

    def __post_init__(self) -> None:
        """Keep what later steps change."""
        self.attempt = self.traced.attempt
        # Keys before a draft token go with the row before it.
        self.keys_sent = self.row.position if self.row.draft else self.traced.keys_sent

    @property
    def queries(self) -> tuple[int, int]:
        """First row of the query tensor whose query is stored, and how many: the last one, or all of the step's."""
        row, spec = self.row, self.traced.qk
        if spec is not None and spec.rows == "all":
            return row.first, row.tokens
        return row.first + row.tokens - 1, int(row.samples)

    @property
    def keys(self) -> tuple[int, int]:
        """First position whose key is stored, and how many: all that the store has not been given yet."""
        stop = self.row.position + 1
        start = min(self.keys_sent, stop - self.row.samples)
        return start, stop - start

    def take(self, tokens: Sequence[int], *, settled: bool) -> None:
        """Its own of the tokens that its request got in this step: the accepted drafts, and one of the model's choice.

        settled: see `StepView`; where positions are not, they follow from the steps before, taken in their order.
        """
        row, draft = self.row, self.row.draft
        self.accepted = max(len(tokens) - 1, 0)
        self.token = tokens[draft] if draft < len(tokens) else None
        if draft:
            if not settled and self.traced.reached is not None:  # as the first part of this row has set it
                self.row = replace(row, computed=self.traced.reached[1] - 1 - self.accepted + draft)
            return
        if not settled and self.traced.reached is not None and self.traced.reached[0] == self.attempt:
            self.row = row = replace(row, computed=self.traced.reached[1])
        self.traced.reached = (self.attempt, row.position + 1 + self.accepted)

    @property
    def rejected(self) -> bool:
        """True for the row after a draft token that was not accepted: it predicts nothing."""
        return self.row.draft > self.accepted

    @property
    def wants_row(self) -> bool:
        """True if the attention of the row's last query was asked for."""
        return self.row.samples and bool(self.traced.slots)

    @property
    def has_qk(self) -> bool:
        """True if queries and keys of every layer that was asked for have been collected."""
        return bool(self.traced.qk_slots) and self.qk_seen == len(self.traced.qk_slots)

    @property
    def wants_prompt(self) -> bool:
        """True if this step holds rows of the prompt's own map that were asked for."""
        return self.traced.all_rows and self.row.computed < self.row.prompt_tokens

    @property
    def has_row(self) -> bool:
        """True if every layer that was asked for has been seen: a row with a layer missing is no row."""
        return self.wants_row and self.layers_seen == len(self.traced.slots)


@dataclass(slots=True)
class Step:
    """A step between its forward pass and its sampled tokens."""

    start_ns: int
    view: StepView | None = None
    works: list[Work] = field(default_factory=list)
    rows: list[Work] = field(default_factory=list)
    """The works that want attention of their last row; worked out once, not in every layer. Likewise the next two."""
    sources: list[Work] = field(default_factory=list)
    """Those that want queries and keys."""
    prompts: list[Work] = field(default_factory=list)
    """Those that want rows of the prompt's own map."""
    logits: torch.Tensor | None = None
    """[sampled traced rows, vocab], a copy from before grammar, penalties and temperature."""
    statistics: RowStatistics | None = None
    buffers: Any = None
    """What the step's `Maths` keeps for it."""

    @property
    def settled(self) -> bool:
        """See `StepView`."""
        return self.view is None or self.view.settled

    def hold(self, works: list[Work]) -> None:
        """The batch is final: these are its traced rows, sorted once by what they want."""
        self.works = works
        self.rows = [work for work in works if work.wants_row]
        self.sources = [work for work in works if work.traced.qk_slots]
        self.prompts = [work for work in works if work.wants_prompt]
