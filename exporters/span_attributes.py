"""Records to span attributes: pure functions, plain Python numbers, no third-party import.

A step carries at most 28 attributes; with the bounds below it stays under 4 KB as OTLP. Values that OTLP or JSON cannot
hold as numbers (NaN, infinity) are left out. Names and their meaning: `tracer.semconv`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Final

from tracer import semconv as name
from tracer.config import Settings
from tracer.records import (
    AttentionSummary,
    GenerationEnd,
    GenerationStart,
    LogitsSummary,
    RequestSpan,
    StepRecord,
)

__all__ = [
    "ABORTED",
    "Attributes",
    "Style",
    "Tally",
    "error_type",
    "generation_attributes",
    "generation_failure",
    "missing_attributes",
    "request_attributes",
    "request_failure",
    "step_attributes",
    "store_uri",
]

Attributes = dict[str, str | bool | int | float | list[str] | list[int] | list[float]]

ABORTED: Final = "aborted by the client"
MAX_TEXT: Final = 512
"""Characters of any string; error texts and routes come from outside."""
SERVER_ERROR: Final = 500
"""First HTTP status code that is the server's fault."""
MAX_CAUSES: Final = 8
MAX_CAUSE_TEXT: Final = 120
MAX_TOPK: Final = 64
"""Alternatives on a span, whatever the setting says: 64 of them take 1.3 KB."""
MAX_FOREIGN: Final = 64
"""Parameters of a request, and attributes that the middleware put on a request span."""


@dataclass(frozen=True, slots=True)
class Style:
    """What the settings say about attributes."""

    uri: str
    """Root of the captures as a URI without a trailing slash."""
    content: bool = False
    topk: int = 5

    @classmethod
    def of(cls, settings: Settings) -> Style:
        """The style that `settings` ask for."""
        return cls(store_uri(settings.store), settings.content, min(settings.topk, MAX_TOPK))


@dataclass(slots=True)
class Tally:
    """What happened to one generation's steps, counted while they passed."""

    steps: int = 0
    omitted: int = 0
    spans: int = 0
    """Step spans refused by the queue towards the collector."""
    records: int = 0
    arrays: int = 0
    causes: dict[str, None] | None = None
    """Distinct causes in order of appearance."""

    def add(self, dropped: tuple[str, ...]) -> None:
        """Count arrays that were not stored."""
        if dropped:
            self.arrays += len(dropped)
            self.causes = dict.fromkeys(_causes([*(self.causes or ()), *dropped]))


def store_uri(store: str) -> str:
    """`store` as a URI: unchanged if it is one, else the absolute path as `file:///...`."""
    return store.rstrip("/") if "://" in store else Path(store).resolve().as_uri()


def step_attributes(record: StepRecord, style: Style) -> Attributes:
    """Attributes of a step span."""
    out: Attributes = {
        name.STEP_PHASE: record.phase,
        name.STEP_ATTEMPT: int(record.attempt),
        name.STEP_TOKENS: int(record.tokens),
        name.STEP_POSITION: int(record.position),
        name.BATCH_REQUESTS: int(record.batch_requests),
        name.BATCH_TOKENS: int(record.batch_tokens),
        name.CUDA_GRAPH: record.cuda_graph,
    }
    if record.step is not None:
        out[name.STEP_INDEX] = int(record.step)
    if record.drafts:
        out |= {name.DRAFTS: int(record.drafts), name.DRAFTS_ACCEPTED: int(record.drafts_accepted)}
    if record.token_id is not None and style.content:
        out[name.CHOSEN_ID] = int(record.token_id)
    if record.logits is not None:
        _put_logits(out, record.logits, style)
    if record.attention is not None:
        _put_attention(out, record.attention)
    if record.capture:
        _put_capture(out, record.trace_id, record.span_id, record.step, style)
    if record.dropped:
        out[name.DROPPED_ARRAYS] = len(record.dropped)
        out[name.DROPPED_CAUSES] = _causes(record.dropped)
    return out


def generation_attributes(start: GenerationStart, end: GenerationEnd, tally: Tally, style: Style) -> Attributes:
    """Attributes of a generation span: the GenAI conventions', and ours.

    Only the first of a request's `n` generations carries the input tokens: backends sum usage over spans.
    """
    out: Attributes = {
        name.OPERATION_NAME: start.operation,
        name.PROVIDER_NAME: name.PROVIDER,
        name.REQUEST_MODEL: start.model,
        name.RESPONSE_MODEL: start.model,
        name.RESPONSE_ID: start.request_id,
        name.RESPONSE_FINISH_REASONS: [end.finish_reason],
        name.USAGE_OUTPUT_TOKENS: end.output_tokens,
        name.GENERATION_CHOICE: start.choice,
        name.GENERATION_PROMPT_TOKENS: start.prompt_tokens,
        name.STEPS_COUNT: tally.steps,
    }
    if start.choice == 0:
        out[name.USAGE_INPUT_TOKENS] = start.prompt_tokens
        out[name.USAGE_CACHED_TOKENS] = end.cached_tokens
    if start.max_tokens is not None:
        out[name.REQUEST_MAX_TOKENS] = start.max_tokens
    if end.first_token_ns is not None:
        out[name.RESPONSE_TIME_TO_FIRST_CHUNK] = max(end.first_token_ns - start.start_ns, 0) / 1e9
    if (error := _generation_error(end)) is not None:
        out[name.ERROR_TYPE] = error
    if start.capture is not None:
        _put_capture(out, start.trace_id, start.span_id, None, style)
    _put_tally(out, tally)
    return _put_foreign(out, {_parameter(key): value for key, value in start.params.items()})


def missing_attributes(limits: list[str]) -> Attributes:
    """What of a capture the engine made impossible, in words; empty if nothing."""
    return {name.CAPTURE_MISSING: [_clip(text) for text in limits[:MAX_CAUSES]]} if limits else {}


def generation_failure(end: GenerationEnd) -> str | None:
    """Status description of a generation that did not end well; None leaves the status unset."""
    if end.status == "aborted":
        return ABORTED
    return _clip(end.error or "the engine reported an error") if end.status == "error" else None


def request_attributes(record: RequestSpan) -> Attributes:
    """Attributes of a request span: the HTTP conventions', and what the middleware adds."""
    out: Attributes = {name.HTTP_METHOD: record.method, name.HTTP_ROUTE: _clip(record.route)}
    if record.status_code:
        out[name.HTTP_STATUS_CODE] = record.status_code
    if record.error:
        out[name.ERROR_TYPE] = error_type(record.error)
    elif record.status_code >= SERVER_ERROR:
        out[name.ERROR_TYPE] = str(record.status_code)
    return _put_foreign(out, record.attributes)


def request_failure(record: RequestSpan) -> str | None:
    """Status description of a failed request: HTTP 5xx or an error; 4xx is the client's affair (HTTP conventions)."""
    failed = record.status_code >= SERVER_ERROR or record.error
    return _clip(record.error) if failed else None


def _put_logits(out: Attributes, logits: LogitsSummary, style: Style) -> None:
    _put_numbers(
        out,
        (
            (name.LOGITS_ENTROPY, logits.entropy),
            (name.LOGITS_VARENTROPY, logits.varentropy),
            (name.LOGITS_MARGIN, logits.margin),
            (name.CHOSEN_LOGPROB, logits.logprob),
        ),
    )
    out[name.CHOSEN_RANK] = int(logits.rank)
    pairs = zip(logits.topk_ids[: style.topk], logits.topk_logprobs, strict=False)
    best = [(int(token), float(logprob)) for token, logprob in pairs if isfinite(logprob)]
    if best:
        out[name.TOPK_LOGPROBS] = [logprob for _, logprob in best]
    if best and style.content:
        out[name.TOPK_IDS] = [token for token, _ in best]


def _put_attention(out: Attributes, attention: AttentionSummary) -> None:
    _put_numbers(
        out,
        (
            (name.ATTENTION_ENTROPY, attention.entropy),
            (name.ATTENTION_SINK_MASS, attention.sink_mass),
            (name.ATTENTION_PROMPT_MASS, attention.prompt_mass),
            (name.ATTENTION_SELF_WEIGHT, attention.self_weight),
        ),
    )
    if attention.top_position >= 0:
        out[name.ATTENTION_TOP_POSITION] = int(attention.top_position)
        out[name.ATTENTION_TOP_LAYER] = int(attention.top_layer)
        out[name.ATTENTION_TOP_HEAD] = int(attention.top_head)
        _put_numbers(out, ((name.ATTENTION_TOP_WEIGHT, attention.top_weight),))


def _put_numbers(out: Attributes, items: Iterable[tuple[str, float]]) -> None:
    """Finite numbers only; `float` also turns a numpy scalar into what OTLP takes for a number."""
    for key, value in items:
        if isfinite(value):
            out[key] = float(value)


def _put_capture(out: Attributes, trace_id: str, span_id: str, step: int | None, style: Style) -> None:
    group = f"{trace_id}/{span_id}"
    out[name.CAPTURE_REF] = group if step is None else f"{group}/{step}"
    out[name.CAPTURE_URI] = f"{style.uri}/{group}"


def _put_tally(out: Attributes, tally: Tally) -> None:
    counts = {
        name.STEPS_OMITTED: tally.omitted,
        name.DROPPED_SPANS: tally.spans,
        name.DROPPED_RECORDS: tally.records,
        name.DROPPED_ARRAYS: tally.arrays,
    }
    out.update({key: count for key, count in counts.items() if count})
    if tally.causes:
        out[name.DROPPED_CAUSES] = list(tally.causes)


def _put_foreign(out: Attributes, values: Mapping[str, Any]) -> Attributes:
    """Add values that others chose, without letting them replace ours."""
    for key, value in list(values.items())[:MAX_FOREIGN]:
        if key not in out and (clean := _clean(value)) is not None:
            out[key] = clean
    return out


def _clean(value: Any) -> str | bool | int | float | list[str] | None:
    if isinstance(value, str):
        return _clip(value)
    if isinstance(value, (list, tuple)):
        return [_clip(str(item)) for item in value[:MAX_CAUSES]]
    if isinstance(value, (bool, int)):
        return value
    return float(value) if isinstance(value, float) and isfinite(value) else None


def _parameter(suffix: str) -> str:
    """Full name of a sampling parameter; one that the GenAI conventions do not know gets our prefix."""
    return (name.REQUEST_PREFIX if suffix in name.REQUEST_SUFFIXES else name.OWN_REQUEST_PREFIX) + suffix


def _generation_error(end: GenerationEnd) -> str | None:
    if end.status == "aborted":
        return name.ERROR_TYPE_CANCELLED
    return error_type(end.error) if end.status == "error" else None


def error_type(text: str) -> str:
    """The class of an error as backends group it: `ValueError` of `ValueError: ...`, `_OTHER` of free text."""
    match = re.match(r"([A-Za-z_][\w.]{0,99})(?::|$)", text)
    return match[1] if match else name.ERROR_TYPE_OTHER


def _causes(dropped: Iterable[str]) -> list[str]:
    """The first few distinct causes, clipped."""
    return list(dict.fromkeys(cause[:MAX_CAUSE_TEXT] for cause in dropped))[:MAX_CAUSES]


def _clip(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
