"""The spans of one trace, as a tree: from the store's OTLP-JSON lines, else rebuilt from its captures.

A server without a collector writes `<store>/spans/*.jsonl`, one OTLP message per line; if its store is a bucket, into
the bucket's spool. Spans that went to a collector
are not there; captures know the same steps, so that a tree can be drawn in either case.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from tracer import config, schema, semconv
from tracer.errors import CaptureNotFoundError

if TYPE_CHECKING:
    from tracer.reader import Capture

__all__ = [
    "Span",
    "Trace",
    "newest_trace",
    "read_spans",
    "read_trace",
    "spans_directory",
    "spans_of_capture",
    "trace_of_span",
]

STATUS_ERROR: Final = 2
"""`STATUS_CODE_ERROR` of OTLP."""
STEP_NAMES: Final = ("prefill", "decode")
ATTENTION_NAMES: Final = {
    "entropy": semconv.ATTENTION_ENTROPY,
    "sink_mass": semconv.ATTENTION_SINK_MASS,
    "prompt_mass": semconv.ATTENTION_PROMPT_MASS,
    "self_weight": semconv.ATTENTION_SELF_WEIGHT,
}


NO_SPANS: Final = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What a line raises that is not a message of spans."""


@dataclass(slots=True)
class Span:
    """One span and the spans below it."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    error: str | None = None
    """Status description of a span that failed."""
    children: list[Span] = field(default_factory=list)

    @property
    def step(self) -> int | None:
        """Index of the output token that a step span predicted."""
        value = self.attributes.get(semconv.STEP_INDEX)
        return value if isinstance(value, int) else None

    @property
    def is_step(self) -> bool:
        """True for a prefill or decode span."""
        return semconv.STEP_PHASE in self.attributes

    @property
    def is_generation(self) -> bool:
        """True for a span of one engine sequence."""
        return semconv.OPERATION_NAME in self.attributes

    def walk(self) -> Iterator[Span]:
        """This span and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class Trace:
    """All that a store knows of one trace."""

    trace_id: str
    roots: tuple[Span, ...]
    """Spans whose parent is not in the store: the caller's own spans never are."""
    source: Literal["spans", "captures"]

    def generations(self) -> list[Span]:
        """The generation spans in order."""
        return [span for root in self.roots for span in root.walk() if span.is_generation]


def read_trace(store: str, trace_id: str) -> Trace:
    """The trace from the spans file, else from its captures; CaptureNotFoundError if the store knows neither."""
    spans = [span for span in read_spans(store, trace_id) if span.trace_id == trace_id]
    if any(span.is_generation for span in spans):
        return Trace(trace_id, _roots(spans), "spans")
    spans = [span for capture in _captures(store, trace_id) for span in spans_of_capture(capture)]
    if not spans:
        raise CaptureNotFoundError(
            f"{store} knows no trace {trace_id}: neither spans/*.jsonl nor a capture names it; "
            "spans that went to a collector are there only"
        )
    return Trace(trace_id, _roots(spans), "captures")


def newest_trace(store: str) -> str:
    """The trace that began last; CaptureNotFoundError if the store has none."""
    from tracer.reader import find_captures

    best = max(read_spans(store, newest_file=True), key=lambda span: span.start_ns, default=None)
    captures = find_captures(store)
    if captures and (best is None or captures[0].start_ns > best.start_ns):
        return captures[0].trace_id
    if best is None:
        raise CaptureNotFoundError(f"no trace in {store}: it has neither spans nor captures; is it the server's store?")
    return best.trace_id


def trace_of_span(store: str, span_id: str) -> str | None:
    """The trace that holds a span of that ID, from the spans files; None if none of them names it."""
    return next((span.trace_id for span in read_spans(store, span_id) if span.span_id == span_id), None)


def read_spans(store: str, needle: str = "", *, newest_file: bool = False) -> Iterator[Span]:
    """Spans of `<store>/spans/*.jsonl`, newest file first; only lines that contain `needle` are parsed.

    A line that is cut off (its writer was killed) or holds no spans is skipped.
    """
    files = sorted(spans_directory(store).glob("*.jsonl"), reverse=True)
    for path in files[:1] if newest_file else files:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if needle in line:
                    yield from _spans_of_line(line)


def spans_directory(store: str) -> Path:
    """Where a server on this machine writes spans if it has no collector: the spool's folder for a bucket."""
    settings = config.load() if config.is_remote(store) else config.Settings()
    return config.local_store(replace(settings, store=store)) / "spans"


def spans_of_capture(capture: Capture) -> list[Span]:
    """The generation span and its step spans, as far as a capture knows them: no request span, no batch."""
    steps = capture.steps
    start_ns = int(capture.attrs["start_ns"])
    times = [int(step.time.astype("int64")) for step in steps]
    ends = [time if time > 0 else start_ns for time in times]
    generation = Span(
        capture.trace_id,
        capture.span_id,
        None,
        f"{capture.attrs['operation']} {capture.attrs['model']}",
        start_ns,
        int(capture.attrs.get("end_ns") or max(ends, default=start_ns)),
        {
            semconv.OPERATION_NAME: capture.attrs["operation"],
            semconv.REQUEST_MODEL: capture.attrs["model"],
            semconv.USAGE_INPUT_TOKENS: capture.prompt_tokens,
            semconv.USAGE_OUTPUT_TOKENS: capture.attrs.get("output_tokens", capture.num_steps),
            semconv.RESPONSE_FINISH_REASONS: [capture.attrs.get("finish_reason", "")],
            semconv.CAPTURE_REF: f"{capture.trace_id}/{capture.span_id}",
        },
        capture.attrs.get("error") or None,
    )
    summary = _attention_means(capture)
    spans = [generation]
    for step, begin, end in zip(steps, [start_ns, *ends], ends, strict=False):
        attributes = {**_step_attributes(step), **(summary[step.index] if summary else {})}
        name = STEP_NAMES[step.index > 0]
        attributes[semconv.STEP_PHASE] = name
        identity = step.span_id or "0" * 16
        spans.append(Span(capture.trace_id, identity, capture.span_id, name, min(begin, end), end, attributes))
    return spans


def _step_attributes(step: Any) -> dict[str, Any]:
    """What a stored step says, under the names that its span has."""
    numbers = {
        semconv.STEP_INDEX: step.index,
        semconv.STEP_POSITION: step.position,
        semconv.STEP_ATTEMPT: step.attempt,
        semconv.CHOSEN_ID: step.token_id,
        semconv.CHOSEN_RANK: step.rank,
        semconv.CHOSEN_LOGPROB: step.logprob,
        semconv.LOGITS_ENTROPY: step.entropy,
        semconv.LOGITS_VARENTROPY: step.varentropy,
        semconv.LOGITS_MARGIN: step.margin,
    }
    return {name: value for name, value in numbers.items() if isfinite(value)}


def _attention_means(capture: Capture) -> list[dict[str, float]]:
    """Per step the means of `attention_summary` over layers and heads; empty if it was not stored."""
    data = capture.to_xarray()
    if schema.ATTENTION_SUMMARY not in data:
        return []
    means = data[schema.ATTENTION_SUMMARY].mean(["layer", "head"]).to_numpy().tolist()
    names = [ATTENTION_NAMES[feature] for feature in schema.FEATURES]
    return [{n: v for n, v in zip(names, row, strict=True) if isfinite(v)} for row in means]


def _captures(store: str, trace_id: str) -> list[Capture]:
    from tracer.reader import find_captures, open_capture

    found = find_captures(f"{store.rstrip('/')}/{trace_id}")
    return [open_capture(entry.path) for entry in sorted(found, key=lambda entry: entry.start_ns)]


def _roots(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Hang each span under its parent; what has none here is a root."""
    by_id = {span.span_id: span for span in spans}
    roots: list[Span] = []
    # Steps of one generation can share a start (a step that waited): their index decides.
    for span in sorted(by_id.values(), key=lambda item: (item.start_ns, item.step or 0)):
        parent = by_id.get(span.parent_id or "")
        (roots if parent is None or parent is span else parent.children).append(span)
    return tuple(roots)


def _spans_of_line(line: str) -> list[Span]:
    try:
        message = json.loads(line)
        scopes = [scope for resource in message.get("resourceSpans", ()) for scope in resource.get("scopeSpans", ())]
        return [_span(item) for scope in scopes for item in scope.get("spans", ())]
    except NO_SPANS:
        return []


def _span(item: dict[str, Any]) -> Span:
    status = item.get("status", {})
    failed = status.get("code") in (STATUS_ERROR, "STATUS_CODE_ERROR")
    return Span(
        trace_id=item["traceId"],
        span_id=item["spanId"],
        parent_id=item.get("parentSpanId") or None,
        name=item["name"],
        start_ns=int(item["startTimeUnixNano"]),
        end_ns=int(item["endTimeUnixNano"]),
        attributes={entry["key"]: _value(entry["value"]) for entry in item.get("attributes", ())},
        error=(status.get("message") or "error") if failed else None,
    )


def _value(item: dict[str, Any]) -> Any:
    """A value of OTLP-JSON: 64-bit integers are strings there."""
    for kind, value in item.items():
        if kind == "intValue":
            return int(value)
        if kind == "arrayValue":
            return [_value(entry) for entry in value.get("values", ())]
        return value
    return None
