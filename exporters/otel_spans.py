"""Records to OpenTelemetry spans: request (SERVER), generation, prefill and decode steps.

Spans are built as `ReadableSpan` with the IDs that the records carry (11 microseconds with the attributes of a full
step; 28 to 37 through a tracer) and handed to `exporters.otlp_sender`, whose thread encodes them (120 microseconds
each). What `ReadableSpan` skips is done here: sampling, limits, and times of children inside those of their parents
(Jaeger marks every span that overhangs).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from exporters.lost_spans import LostSpans
from exporters.otel_resource import resource, version
from exporters.otlp_sender import Sender
from exporters.span_attributes import (
    Style,
    Tally,
    exception_attributes,
    generation_attributes,
    generation_failure,
    missing_attributes,
    request_attributes,
    request_failure,
    step_attributes,
    steps_attributes,
)
from exporters.span_ranks import StepRanks
from exporters.span_transport import open_transport
from exporters.step_sums import Plan, StepSum, TraceBudget
from exporters.zarr_facts import limits_said
from tracer import semconv
from tracer.config import Settings
from tracer.figures import Figure
from tracer.records import (
    ArrayRecord,
    EngineInfo,
    GenerationEnd,
    GenerationStart,
    Record,
    RequestSpan,
    StepRecord,
    WorkerEnd,
)

__all__ = ["OtelExporter"]

WAITING: Final = 64
"""Step spans of one generation are passed on when so many have gathered ..."""
PATIENT: Final = 256
"""... or so many, where a rank is late ..."""
HELD_BACK: Final = 8
"""... except the newest: async scheduling runs a step or two past the end, and they must never be seen."""
MAX_REQUESTS: Final = 4096
"""Parents whose request span has not come (an offline caller sends none): remembered so many."""
SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)


@dataclass(slots=True)
class _Generation:
    """A sampled generation that has not ended."""

    start: GenerationStart
    context: SpanContext
    plan: Plan
    waiting: list[StepRecord] = field(default_factory=list)
    ranks: StepRanks | None = None
    """Where several workers report the same step."""
    tally: Tally = field(default_factory=Tally)


@dataclass(slots=True)
class _Family:
    """The generations of one request, and its own span once that has come."""

    running: int = 0
    failed: bool = False
    """The exception of a generation is recorded there, and not once more on the request."""
    start_ns: int | None = None
    end_ns: int = 0
    span: RequestSpan | None = None


class OtelExporter:
    """Implements `tracer.export.Exporter`; with a dead collector nothing here waits longer than it is told to."""

    def __init__(self, settings: Settings) -> None:
        self._enabled = settings.trace
        self._budget = TraceBudget(settings.steps)
        self._style = Style.of(settings)
        self._lost = LostSpans(settings)
        self._sender = Sender(open_transport(settings), on_loss=self._lost.note)
        scope = InstrumentationScope(semconv.SCOPE, version(), semconv.SCHEMA_URL)
        self._span = partial(ReadableSpan, resource=resource(), instrumentation_scope=scope)
        self._open: dict[str, _Generation] = {}
        self._families: OrderedDict[str, _Family] = OrderedDict()
        self._ranks = 1
        """Tensor parallel ranks of each engine."""
        self._engine: EngineInfo | None = None

    @property
    def dropped(self) -> int:
        """Spans that will not arrive: the queue was full, or the collector did not take them."""
        return self._sender.dropped

    def figures(self) -> Iterable[Figure]:
        """Spans that will not arrive; asked for about once a second, which is when their captures are told."""
        self._lost.say()
        yield from self._lost.figures()

    def export(self, record: Record, payload: memoryview) -> None:
        """Take one record; never waits."""
        if not self._enabled:
            return
        match record:
            case StepRecord():
                self._step(record)
            case GenerationStart():
                self._generation_start(record)
            case GenerationEnd():
                self._generation_end(record)
            case RequestSpan() if record.sampled:
                self._request(record)
            case ArrayRecord():
                self._array(record)
            case WorkerEnd():
                self._worker_end(record)
            case EngineInfo():
                self._ranks = record.world_size if record.rank == 0 else self._ranks
                if record.rank == 0 or self._engine is None:
                    self._engine = record

    def force_flush(self, timeout_s: float) -> bool:
        """Send the spans that are finished; False if that took longer than `timeout_s` or the collector failed."""
        return self._sender.flush(timeout_s)

    def pending(self) -> tuple[str, ...]:
        """Nothing that a flush waits for: a collector may be away for hours."""
        return ()

    def shutdown(self, timeout_s: float) -> bool:
        """Send what is finished and stop; False if something was left after `timeout_s`."""
        for family in self._families.values():
            if family.span is not None:
                self._emit_request(family.span, family)
        self._families.clear()
        self._open.clear()
        sent = self._sender.close(timeout_s)
        self._lost.say()
        return sent

    def _generation_start(self, record: GenerationStart) -> None:
        if not record.sampled:
            return
        several = self._ranks > 1 and record.capture is not None and record.capture.wants_layers
        ranks = StepRanks(self._ranks) if several else None  # Else rank 0 alone reports.
        plan = Plan(record.step_spans, self._budget)
        self._open[record.span_id] = _Generation(record, _context(record.trace_id, record.span_id), plan, ranks=ranks)
        if record.parent_span_id is not None:
            family = self._families.setdefault(record.parent_span_id, _Family())
            family.running += 1
            family.start_ns = min(family.start_ns or record.start_ns, record.start_ns)

    def _step(self, record: StepRecord) -> None:
        item = self._open.get(record.span_id)
        if item is None or not record.sampled:
            return
        if item.ranks is None:
            item.waiting.append(record)
        elif (late := item.ranks.join(item.waiting, record)) is not None:
            item.tally.add(late.dropped)
        if len(item.waiting) >= WAITING:
            self._pass_on(item)

    def _pass_on(self, item: _Generation) -> None:
        """Make spans of all but the newest steps; a step waits for every rank, up to a bound."""
        count = len(item.waiting) - HELD_BACK
        if item.ranks is not None and len(item.waiting) < PATIENT:
            count = min(count, item.ranks.whole(item.waiting))
        self._emit_steps(item, item.waiting[:count], None)
        del item.waiting[:count]

    def _array(self, record: ArrayRecord) -> None:
        if (item := self._open.get(record.span_id)) is not None:
            item.tally.add(record.dropped)

    def _worker_end(self, record: WorkerEnd) -> None:
        if (item := self._open.get(record.span_id)) is not None:
            item.tally.records += record.records_lost

    def _generation_end(self, record: GenerationEnd) -> None:
        item = self._open.pop(record.span_id, None)
        if item is None:
            return
        end_ns = max(record.end_ns, item.start.start_ns)
        real = [step for step in item.waiting if not _is_surplus(step, record.output_tokens, end_ns)]
        self._emit_steps(item, real, end_ns)
        for rest in item.plan.close():
            self._emit_step(item, rest, end_ns)
        attributes = generation_attributes(item.start, record, item.tally, self._style)
        if item.start.capture is not None:
            attributes |= missing_attributes(limits_said(item.start.capture, self._engine))
        span = self._span(
            f"{item.start.operation} {item.start.model}",
            item.context,
            _parent(item.start.trace_id, item.start.parent_span_id, remote=False),
            attributes=attributes,
            status=_status(generation_failure(record, self._style)),
            events=self._exception(record.error if record.status == "error" else "", end_ns),
            start_time=item.start.start_ns,
            end_time=end_ns,
        )
        self._sender.offer(span, reserve=True)
        if item.start.parent_span_id is not None:
            self._leave_family(item.start.parent_span_id, end_ns, failed=record.status == "error")

    def _exception(self, error: str, at_ns: int) -> list[Event]:
        """The event that records an error, if it is an exception's."""
        attributes = exception_attributes(error, self._style)
        return [Event(semconv.EXCEPTION, attributes, at_ns)] if attributes else []

    def _leave_family(self, parent_span_id: str, end_ns: int, *, failed: bool) -> None:
        """A generation has ended: the request span that waited for its last one goes out."""
        family = self._families.get(parent_span_id)
        if family is None:
            return
        family.running -= 1
        family.failed = family.failed or failed
        family.end_ns = max(family.end_ns, end_ns)
        if family.span is not None and not family.running:
            del self._families[parent_span_id]
            self._emit_request(family.span, family)
        elif len(self._families) > MAX_REQUESTS:
            self._forget_families()

    def _forget_families(self) -> None:
        """Drop the oldest parents that nobody runs under: their request span came from elsewhere, or never will."""
        idle = [key for key, family in self._families.items() if not family.running]
        for key in idle[: len(idle) // 2 + 1]:
            del self._families[key]

    def _request(self, record: RequestSpan) -> None:
        """Emit the request span after its generations, so that it can enclose them."""
        family = self._families.get(record.span_id)
        if family is not None and family.running:
            family.span = record
            return
        self._families.pop(record.span_id, None)
        self._emit_request(record, family or _Family())

    def _emit_request(self, record: RequestSpan, family: _Family) -> None:
        start_ns = min(record.start_ns, family.start_ns or record.start_ns)
        end_ns = max(record.end_ns, family.end_ns, start_ns)
        span = self._span(
            f"{record.method} {record.route}",
            _context(record.trace_id, record.span_id),
            _parent(record.trace_id, record.parent_span_id, remote=True),
            attributes=request_attributes(record),
            kind=SpanKind.SERVER,
            status=_status(request_failure(record, self._style)),
            events=[] if family.failed else self._exception(record.error, end_ns),
            start_time=start_ns,
            end_time=end_ns,
        )
        self._sender.offer(span, reserve=True)

    def _emit_steps(self, item: _Generation, steps: list[StepRecord], limit_ns: int | None) -> None:
        """Step spans inside the generation's times; `limit_ns` is its end where that is known."""
        if item.ranks is not None:
            steps = item.ranks.take(steps)
        for record in steps:
            if item.tally.first_step_ns is None:
                item.tally.first_step_ns = record.start_ns
            item.tally.add(record.dropped)
            for span in item.plan.place(record):
                self._emit_step(item, span, limit_ns)

    def _emit_step(self, item: _Generation, steps: StepRecord | StepSum, limit_ns: int | None) -> None:
        """The span of one step, or of several, which then has the ID that the first one's would have."""
        if isinstance(steps, StepSum):
            first, last = steps.first, steps.last
            name, attributes = f"{first.phase} steps", steps_attributes(steps, self._style)
            item.tally.shared += steps.count
        else:
            first = last = steps
            name, attributes = first.phase, step_attributes(first, self._style)
            item.tally.steps += 1
        start_ns = max(first.start_ns, item.start.start_ns)
        span = self._span(
            name,
            SpanContext(item.context.trace_id, int(first.step_span_id, 16), is_remote=False, trace_flags=SAMPLED),
            item.context,
            attributes=attributes,
            start_time=start_ns,
            end_time=max(last.end_ns if limit_ns is None else min(last.end_ns, limit_ns), start_ns),
        )
        item.tally.spans += not self._sender.offer(span)


def _is_surplus(record: StepRecord, output_tokens: int, end_ns: int) -> bool:
    """True for a step that ran after the generation was over: nobody got its token."""
    return record.start_ns > end_ns or (record.step is not None and record.step >= output_tokens)


def _context(trace_id: str, span_id: str, *, remote: bool = False) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=remote, trace_flags=SAMPLED)


def _parent(trace_id: str, span_id: str | None, *, remote: bool) -> SpanContext | None:
    return None if span_id is None else _context(trace_id, span_id, remote=remote)


def _status(failure: str | None) -> Status:
    """Unset means well: the guidance of OpenTelemetry keeps OK for applications."""
    return Status() if failure is None else Status(StatusCode.ERROR, failure)
