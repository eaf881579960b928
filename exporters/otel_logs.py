"""Our own log lines by OTLP, each with the trace and span that it is about.

Those of the exporter process come by a handler, those of vLLM's processes as records. Nothing else is sent: vLLM's own
lines may hold prompts, and are its operator's to ship.
"""

from __future__ import annotations

import logging
from typing import Final

from opentelemetry._logs import SeverityNumber
from opentelemetry.context import Context
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExporter

from exporters.otel_context import span_context
from exporters.otel_resource import resource, version
from exporters.otel_transport import bounded, log_exporter
from tracer import semconv
from tracer.config import Settings
from tracer.log_records import LogLine
from tracer.log_relay import Relay
from tracer.records import Record

__all__ = ["LogsExporter"]

HEARD: Final = "tensorspan"
"""The logger of all that the exporter process says."""
SEVERITIES: Final = (
    (logging.CRITICAL, SeverityNumber.FATAL),
    (logging.ERROR, SeverityNumber.ERROR),
    (logging.WARNING, SeverityNumber.WARN),
    (logging.INFO, SeverityNumber.INFO),
)


class LogsExporter:
    """Implements `tracer.export.Exporter`; the SDK's batches go out on its own thread."""

    def __init__(self, settings: Settings, exporter: LogRecordExporter | None = None) -> None:
        """exporter: instead of the one that `OTEL_*` asks for."""
        self._provider = LoggerProvider(resource=resource(), shutdown_on_exit=False)
        chosen = exporter or log_exporter()
        if chosen is not None:
            self._provider.add_log_record_processor(BatchLogRecordProcessor(chosen))
        self._logger = self._provider.get_logger(semconv.SCOPE, version(), semconv.SCHEMA_URL)
        self._relay = Relay(self._emit)
        logging.getLogger(HEARD).addHandler(self._relay)

    def export(self, record: Record, payload: memoryview) -> None:
        """Take one record; never waits."""
        if isinstance(record, LogLine):
            self._emit(record)

    def force_flush(self, timeout_s: float) -> bool:
        """Nothing: no reader of a capture waits for its log lines."""
        return True

    def pending(self) -> tuple[str, ...]:
        """Nothing that a flush waits for."""
        return ()

    def shutdown(self, timeout_s: float) -> bool:
        """Send what is left; False if it was not taken within `timeout_s`."""
        logging.getLogger(HEARD).removeHandler(self._relay)
        return bounded(self._provider.shutdown, timeout_s)

    def _emit(self, line: LogLine) -> None:
        severity = next((number for level, number in SEVERITIES if line.level >= level), SeverityNumber.DEBUG)
        attributes = {semconv.LOGGER_NAME: line.logger}
        if line.exception:
            attributes[semconv.EXCEPTION_TYPE] = line.exception
        known = bool(line.trace_id and line.span_id)
        self._logger.emit(
            timestamp=line.time_ns,
            context=span_context(line.trace_id, line.span_id, sampled=line.sampled) if known else Context(),
            severity_number=severity,
            severity_text=logging.getLevelName(line.level),
            body=line.text,
            attributes=attributes,
        )
