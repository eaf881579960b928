"""Our own log lines, from any process to the exporter that sends them by OTLP."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from tracer import config
from tracer._guard import Guard
from tracer.log_context import LOG_SPAN
from tracer.log_records import LogLine

__all__ = ["LOGGERS", "Relay", "Seldom", "attach"]

LOGGERS: Final = ("tensorspan", "vllm.tensorspan")
"""Everything that we say; vLLM prints the second as one of its own."""
MAX_TEXT: Final = 4096
GUARD: Final = Guard()


class Relay(logging.Handler):
    """Hands each record to `take` as a LogLine; never waits if `take` does not, and never hears itself."""

    def __init__(self, take: Callable[[LogLine], object]) -> None:
        super().__init__()
        self._take = take
        self._here = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass it on; what `take` logs meanwhile is not."""
        if getattr(self._here, "busy", False):
            return
        self._here.busy = True
        with GUARD("relaying a log line"):
            try:
                self._take(log_line(record))
            finally:
                self._here.busy = False


class Seldom(logging.Filter):
    """Of a library that repeats itself, lets one kind of message pass in `seconds`.

    The OTLP exporters complain at every attempt: of a backend that takes traces alone, once a minute for ever.
    """

    def __init__(self, library: str, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(library)
        self._seconds = seconds
        self._clock = clock
        self._next: dict[tuple[str, str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a repetition; true for everything of other libraries."""
        if not super().filter(record):
            return True
        # Templates and their first argument (which signal) are few; whole messages have times and ports in them.
        first = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        kind, now = (record.name, str(record.msg), first), self._clock()
        if now < self._next.get(kind, now):
            return False
        self._next[kind] = now + self._seconds
        return True


def log_line(record: logging.LogRecord) -> LogLine:
    """The record with the span that the current context belongs to."""
    span, error = LOG_SPAN.get(), record.exc_info[0] if record.exc_info else None
    return LogLine(
        time_ns=int(record.created * 1e9),
        level=record.levelno,
        logger=record.name,
        text=record.getMessage()[:MAX_TEXT],
        exception=error.__qualname__ if error is not None else "",
        trace_id=span.trace_id if span is not None else "",
        span_id=span.span_id if span is not None else "",
        sampled=span is not None and span.sampled,
    )


def attach(take: Callable[[LogLine], object]) -> None:
    """Relay what this process's loggers say, if `OTEL_*` asks for logs."""
    if config.signal_protocol("LOGS") is not None:
        relay = Relay(take)
        for name in LOGGERS:
            logging.getLogger(name).addHandler(relay)
