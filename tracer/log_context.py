"""Which span a log record belongs to: kept by whoever serves a request, put on records by a filter.

The attributes are those of OpenTelemetry's own logging instrumentation, so that a formatter written for it works here:
`otelTraceID`, `otelSpanID` ("0" outside a request) and `otelTraceSampled`.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Final, NamedTuple

__all__ = ["LOG_SPAN", "LogSpan", "TraceContextFilter"]

NONE: Final = "0"


class LogSpan(NamedTuple):
    """The span that log records of this context belong to."""

    trace_id: str
    span_id: str
    sampled: bool = True


LOG_SPAN: Final[ContextVar[LogSpan | None]] = ContextVar("tensorspan_log_span", default=None)
"""In an API process the SERVER span of the request; in the exporter process that of the record in hand."""


class TraceContextFilter(logging.Filter):
    """Lets every record pass, with the three attributes on it; for a handler in a logging configuration."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True, always."""
        span = LOG_SPAN.get()
        record.otelTraceID = span.trace_id if span is not None else NONE
        record.otelSpanID = span.span_id if span is not None else NONE
        record.otelTraceSampled = span is not None and span.sampled
        return True
