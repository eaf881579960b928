"""Log lines of ours by OTLP, with the spans that they are about, and on records for anybody's formatter."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry._logs import SeverityNumber
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter

from exporters.otel_logs import LogsExporter
from tests.exporters.collectors import GrpcCollector, attributes
from tests.exporters.test_otel_spans import GENERATION, TRACE, start
from tracer import exporter_points, log_relay
from tracer.config import Settings
from tracer.configure import ExporterProcess
from tracer.log_context import LOG_SPAN, LogSpan, TraceContextFilter
from tracer.log_records import LogLine
from tracer.records import Record

NOTHING = memoryview(b"")


@pytest.fixture(autouse=True)
def _no_otel_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpcCollector]:
    server = GrpcCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", f"http://127.0.0.1:{server.port}")
    yield server
    server.stop()


class Failing:
    """An exporter whose store cannot be written."""

    def export(self, record: Record, payload: memoryview) -> None:
        logging.getLogger("tensorspan.zarr").error("tensorspan: capture %s cannot be written", "x")

    def force_flush(self, timeout_s: float) -> bool:
        return True

    def pending(self) -> tuple[str, ...]:
        return ()

    def shutdown(self, timeout_s: float) -> bool:
        return True


def test_a_line_about_a_record_belongs_to_its_span(tmp_path: Path) -> None:
    memory = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
    logs = LogsExporter(Settings(), memory)
    process = ExporterProcess(tmp_path / "x.sock", [logs, Failing()])
    process.learn([])
    process._emit(start(), NOTHING)
    process._listener.close()
    assert logs.shutdown(10)
    [item] = memory.get_finished_logs()
    record = item.log_record
    assert (f"{record.trace_id or 0:032x}", f"{record.span_id or 0:016x}") == (TRACE, GENERATION)
    assert (record.body, record.severity_number) == (
        "tensorspan: capture x cannot be written", SeverityNumber.ERROR,
    )  # fmt: skip
    assert dict(record.attributes or {}) == {"tensorspan.logger": "tensorspan.zarr"}
    assert LOG_SPAN.get() is None


def test_a_line_of_another_process_at_a_real_receiver(collector: GrpcCollector) -> None:
    logs = LogsExporter(Settings())
    now = time.time_ns()
    logs.export(
        LogLine(now, logging.WARNING, "vllm.tensorspan", "the queue is full", "", TRACE, GENERATION, True), NOTHING
    )
    logs.export(LogLine(now, logging.INFO, "vllm.tensorspan", "ready"), NOTHING)
    logs.export(start(), NOTHING)
    assert logs.shutdown(10)
    first, second = collector.logs()
    assert (first.trace_id.hex(), first.span_id.hex(), first.flags) == (TRACE, GENERATION, 1)
    assert (first.body.string_value, first.severity_text, first.time_unix_nano) == ("the queue is full", "WARNING", now)
    assert attributes(first) == {"tensorspan.logger": "vllm.tensorspan"}
    assert (second.trace_id, second.severity_text) == (b"", "INFO")


def test_a_dead_collector_delays_the_end_no_longer_than_told(collector: GrpcCollector) -> None:
    logs = LogsExporter(Settings())
    collector.stop()
    logs.export(LogLine(1, 30, "tensorspan", "x"), NOTHING)
    began = time.monotonic()
    logs.shutdown(0.5)
    assert time.monotonic() - began < 1.5


def test_a_relay_passes_on_our_lines_with_their_span_and_never_its_own() -> None:
    taken: list[LogLine] = []
    logger = logging.getLogger("tensorspan.test_relay")

    def take(line: LogLine) -> None:
        logger.warning("heard while sending")
        taken.append(line)

    relay = log_relay.Relay(take)
    logger.addHandler(relay)
    token = LOG_SPAN.set(LogSpan(TRACE, GENERATION))
    try:
        int("may quote a prompt")
    except ValueError:
        logger.exception("failed in %s", "a place")
    finally:
        LOG_SPAN.reset(token)
        logger.removeHandler(relay)
    [line] = taken
    assert (line.text, line.exception, line.level) == ("failed in a place", "ValueError", logging.ERROR)
    assert (line.trace_id, line.span_id, line.sampled) == (TRACE, GENERATION, True)


def test_lines_are_relayed_only_where_logs_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [logging.getLogger(name) for name in log_relay.LOGGERS]
    before = [list(logger.handlers) for logger in loggers]
    log_relay.attach(print)
    assert [logger.handlers for logger in loggers] == before
    assert "logs" not in exporter_points.exporter_names()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert "logs" in exporter_points.exporter_names()
    log_relay.attach(print)
    for logger, handlers in zip(loggers, before, strict=True):
        [relay] = [handler for handler in logger.handlers if handler not in handlers]
        logger.removeHandler(relay)
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "none")
    assert "logs" not in exporter_points.exporter_names()


def test_a_library_says_the_same_once_in_a_while() -> None:
    now = [0.0]
    seldom = log_relay.Seldom("opentelemetry", 600, lambda: now[0])

    def passes(name: str, what: str) -> bool:
        return seldom.filter(
            logging.LogRecord(name, 40, __file__, 1, "Failed to export %s to %s", (what, now[0]), None)
        )

    library = "opentelemetry.exporter"
    assert [passes(library, "metrics"), passes(library, "logs"), passes(library, "metrics")] == [True, True, False]
    assert [passes("tensorspan", "metrics"), passes("tensorspan", "metrics")] == [True, True]
    now[0] = 600.0
    assert passes(library, "metrics")


def test_the_filter_names_the_span_for_any_formatter() -> None:
    formatter = logging.Formatter("%(otelTraceID)s %(otelSpanID)s %(otelTraceSampled)s %(message)s")
    record = logging.LogRecord("vllm", logging.INFO, __file__, 1, "hello", (), None)
    assert TraceContextFilter().filter(record)
    assert formatter.format(record) == "0 0 False hello"
    token = LOG_SPAN.set(LogSpan(TRACE, GENERATION, sampled=False))
    TraceContextFilter().filter(record)
    LOG_SPAN.reset(token)
    assert formatter.format(record) == f"{TRACE} {GENERATION} False hello"
