"""Metrics through OpenTelemetry's SDK: histograms of requests, and figures about ourselves.

OTLP goes out at the SDK's own interval, on the SDK's own thread, where `OTEL_*` names a collector. Beside that, what
vLLM's `/metrics` adds is written next to the exporter's socket, at most once a second (`exporters.metrics_page`).
Numbers of steps are counted here in plain integers, because an SDK instrument costs ten times a step record's reading.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricReader, PeriodicExportingMetricReader

from exporters.metrics_page import PageWriter
from exporters.otel_context import span_context
from exporters.otel_resource import resource, version
from exporters.otel_transport import bounded, metric_exporter
from exporters.span_attributes import error_type
from tracer import metric_names as names
from tracer import semconv
from tracer.config import Settings
from tracer.figures import Figure
from tracer.metric_names import METRICS, Instrument
from tracer.metrics_file import metrics_file
from tracer.records import (
    ArrayRecord,
    EngineInfo,
    GenerationEnd,
    GenerationStart,
    PlainGeneration,
    Record,
    RequestSpan,
    StepRecord,
    WorkerEnd,
)

__all__ = ["MetricsExporter"]

LOG: Final = logging.getLogger("tensorspan.metrics")
MAX_REQUESTS: Final = 4096
"""Requests whose generations have begun and whose own record has not come; more are measured without a LoRA's name."""
CLIENT_ERROR: Final = 400
DISCONNECTED: Final = "client disconnected"
IDLE_SECONDS: Final = 10.0
"""A writer that has read nothing for so long is not behind."""

Labels = dict[str, str | int]


class _Trace(NamedTuple):
    """What an exemplar points to."""

    trace_id: str
    span_id: str
    sampled: bool


class MetricsExporter:
    """Implements `tracer.export.Exporter` and `tracer.figures.Watcher`."""

    def __init__(self, settings: Settings, readers: Sequence[MetricReader] | None = None) -> None:
        """readers: instead of those that `OTEL_*` asks for."""
        page = InMemoryMetricReader()
        self._page = PageWriter(page, metrics_file(Path(settings.socket))) if settings.socket else None
        chosen = [page, *(_push_readers() if readers is None else readers)]
        self._provider = MeterProvider(chosen, resource=resource(), shutdown_on_exit=False)
        meter = self._provider.get_meter(semconv.SCOPE, version(), semconv.SCHEMA_URL)
        self._histograms = {item.name: _histogram(meter, item) for item in METRICS if item.kind == "histogram"}
        for item in METRICS:
            if item.kind != "histogram":
                _observe(meter, item, self._reader_of(item.name))
        self._open: dict[str, GenerationStart] = {}
        self._requests: OrderedDict[str, str] = OrderedDict()
        """By span ID of a request, the model that its generations name."""
        self._model = ""
        self._bytes = self._captures = self._records_lost = 0
        self._ended: Counter[str] = Counter()
        self._lag, self._read_at = 0.0, -IDLE_SECONDS
        self._figures: Sequence[Figure] = ()
        self._dirty = True
        """Something has been measured since `watch`."""

    def export(self, record: Record, payload: memoryview) -> None:
        """Take one record; never waits."""
        self._dirty = True
        match record:
            case StepRecord():
                self._bytes += payload.nbytes
                self._lag, self._read_at = time.time() - record.end_ns / 1e9, time.monotonic()
            case ArrayRecord():
                self._bytes += payload.nbytes
            case GenerationStart():
                self._start(record)
            case GenerationEnd():
                self._end(record)
            case PlainGeneration():
                self._remember(record.parent_span_id, record.model)
                self._measure(record, record, None)
            case RequestSpan():
                self._request(record)
            case WorkerEnd():
                self._records_lost += record.records_lost
            case EngineInfo():
                self._model = record.model

    def watch(self, figures: Sequence[Figure]) -> None:
        """The figures of all exporters, once a second."""
        news, self._figures, self._dirty = self._dirty or figures != self._figures, figures, False
        if news and self._page is not None:
            self._page.write()

    def figures(self) -> Iterable[Figure]:
        """What is counted here from the records."""
        yield Figure(names.CAPTURE_BYTES, self._bytes)
        yield Figure(names.CAPTURE_OPEN, self._captures)
        yield Figure(names.RECORDS_LOST, self._records_lost, ((semconv.LOSS_PLACE, "worker"),))
        behind = time.monotonic() - self._read_at < IDLE_SECONDS
        yield Figure(names.WRITER_LAG, max(self._lag, 0.0) if behind else 0.0)
        for outcome, count in self._ended.items():
            yield Figure(names.CAPTURE_FINISHED, count, ((semconv.CAPTURE_OUTCOME, outcome),))

    def force_flush(self, timeout_s: float) -> bool:
        """Nothing: metrics are read when their reader wants them, and a collector may be away for hours."""
        return True

    def pending(self) -> tuple[str, ...]:
        """Nothing that a flush waits for."""
        return ()

    def shutdown(self, timeout_s: float) -> bool:
        """Send the last values; False if they were not taken within `timeout_s`."""
        return bounded(lambda: self._provider.shutdown(timeout_s * 1000), timeout_s)

    def _start(self, start: GenerationStart) -> None:
        self._open[start.span_id] = start
        self._captures += start.capture is not None
        self._remember(start.parent_span_id, start.model)

    def _remember(self, request: str | None, model: str) -> None:
        if request is not None:
            self._requests[request] = model
            if len(self._requests) > MAX_REQUESTS:
                self._requests.popitem(last=False)

    def _end(self, end: GenerationEnd) -> None:
        start = self._open.pop(end.span_id, None)
        if start is None:
            return
        if start.capture is not None:
            self._captures -= 1
            self._ended[end.status] += 1
        self._measure(start, end, _Trace(end.trace_id, end.span_id, start.sampled))

    def _measure(
        self, start: GenerationStart | PlainGeneration, end: GenerationEnd | PlainGeneration, trace: _Trace | None
    ) -> None:
        """The histograms of one generation; the request's own comes with its RequestSpan, offline from here."""
        labels = _labels(start.operation, start.model)
        if start.choice == 0:
            self._record(names.TOKEN_USAGE, start.prompt_tokens, {**labels, semconv.TOKEN_TYPE: "input"}, trace)
        self._record(names.TOKEN_USAGE, end.output_tokens, {**labels, semconv.TOKEN_TYPE: "output"}, trace)
        if end.status == "ok" and end.first_token_ns is not None:
            first = _seconds(start.start_ns, end.first_token_ns)
            self._record(names.TIME_TO_FIRST_TOKEN, first, labels, trace)
            if end.output_tokens > 1:
                each = _seconds(end.first_token_ns, end.end_ns) / (end.output_tokens - 1)
                self._record(names.TIME_PER_OUTPUT_TOKEN, each, labels, trace)
        if start.parent_span_id is None:
            failure = {"ok": "", "aborted": semconv.ERROR_TYPE_CANCELLED, "error": error_type(end.error)}[end.status]
            took = _seconds(start.start_ns, end.end_ns)
            self._record(names.REQUEST_DURATION, took, labels | _failed(failure), trace)

    def _request(self, record: RequestSpan) -> None:
        labels = _labels(record.operation, self._requests.pop(record.span_id, self._model))
        trace = _Trace(record.trace_id, record.span_id, record.sampled)
        took = _seconds(record.start_ns, record.end_ns)
        self._record(names.REQUEST_DURATION, took, labels | _failed(_request_failure(record)), trace)

    def _record(self, name: str, value: float, labels: Labels, trace: _Trace | None) -> None:
        context = None if trace is None else span_context(trace.trace_id, trace.span_id, sampled=trace.sampled)
        self._histograms[name].record(value, labels, context)

    def _reader_of(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def read(_: CallbackOptions) -> Iterable[Observation]:
            totals: dict[tuple[tuple[str, str], ...], float] = {}
            for figure in self._figures:
                if figure.name == name:
                    totals[figure.attributes] = totals.get(figure.attributes, 0) + figure.value
            return [Observation(value, dict(attributes)) for attributes, value in totals.items()]

        return read


def _push_readers() -> list[MetricReader]:
    exporter = metric_exporter()
    return [] if exporter is None else [PeriodicExportingMetricReader(exporter)]


def _histogram(meter: Meter, item: Instrument) -> Histogram:
    return meter.create_histogram(
        item.name, item.unit, item.description, explicit_bucket_boundaries_advisory=item.buckets
    )


def _observe(meter: Meter, item: Instrument, read: Callable[[CallbackOptions], Iterable[Observation]]) -> None:
    makers = {
        "counter": meter.create_observable_counter,
        "updown": meter.create_observable_up_down_counter,
        "gauge": meter.create_observable_gauge,
    }
    makers[item.kind](item.name, [read], item.unit, item.description)


def _labels(operation: str, model: str) -> Labels:
    return {
        semconv.OPERATION_NAME: operation,
        semconv.PROVIDER_NAME: semconv.PROVIDER,
        semconv.REQUEST_MODEL: model,
        semconv.RESPONSE_MODEL: model,
    }


def _failed(kind: str) -> Labels:
    return {semconv.ERROR_TYPE: kind} if kind else {}


def _request_failure(record: RequestSpan) -> str:
    """`error.type` of a request: also of one that was refused, which took no time worth a histogram of successes."""
    if record.error == DISCONNECTED:
        return semconv.ERROR_TYPE_CANCELLED
    if record.error:
        return error_type(record.error)
    return str(record.status_code) if record.status_code >= CLIENT_ERROR else ""


def _seconds(start_ns: int, end_ns: int) -> float:
    return max(end_ns - start_ns, 0) / 1e9
