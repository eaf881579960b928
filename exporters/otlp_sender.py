"""From finished spans to a collector or a file: a bounded queue, one thread, and waits that always end.

The SDK's BatchSpanProcessor is not used: with a dead collector its `force_flush(2 s)` took 20 s and returned True, and
it drops the oldest spans without a count (opentelemetry-python #4555, #4568; SDK 1.45.2).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from tracer import config
from tracer._guard import Guard
from tracer.config import Settings
from tracer.errors import MissingExtraError, SettingsError, StoreError

__all__ = ["CAPACITY", "Sender", "open_transport", "spans_file"]

LOG: Final = logging.getLogger("tensorspan.otel")
CAPACITY: Final = 16384
"""Waiting spans: eight generations of 2,000 steps, 25 MB (1.5 KB each, measured)."""
RESERVE: Final = 2048
"""Room beyond CAPACITY for generation and request spans: a tree without its trunk cannot be read."""
BATCH: Final = 512
"""Spans per message: 0.6 MB as a rule and 2 MB at most, half of what a Go gRPC server accepts."""
DELAY_SECONDS: Final = 1.0
"""How long a span waits for others before a message goes out."""


class Sender:
    """Owns the queue and the thread that empties it. `open_exporter` is called on that thread at the first span."""

    def __init__(self, open_exporter: Callable[[], SpanExporter], capacity: int = CAPACITY) -> None:
        self._open = open_exporter
        self._capacity = capacity
        self._queue: deque[ReadableSpan] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._exporter: SpanExporter | None = None
        self._guard = Guard()
        self._accepted = 0
        self._settled = 0
        """Accepted spans that were sent or given up."""
        self._hurry = False
        self._closing = False
        self._warned = False
        self.dropped = 0
        """Spans that will never arrive: refused by the full queue, or given up after the exporter's retries."""

    def offer(self, span: ReadableSpan, *, reserve: bool = False) -> bool:
        """Queue one span without waiting; False if there was no room. `reserve` gives access to RESERVE."""
        with self._changed:
            if len(self._queue) >= self._capacity + (RESERVE if reserve else 0):
                self._lose(1, "the queue is full because the collector is slow or gone")
                return False
            if self._closing:
                self._lose(1, "the exporter was already shut down")
                return False
            self._queue.append(span)
            self._accepted += 1
            if len(self._queue) in (1, BATCH):
                self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tensorspan-otlp", daemon=True)
                self._thread.start()
        return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything accepted so far has been sent; False if it was not within `timeout_s` or was lost."""
        with self._changed:
            target, dropped = self._accepted, self.dropped
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._settled >= target, timeout_s)
            self._hurry = False
            return done and self.dropped == dropped

    def close(self, timeout_s: float) -> bool:
        """Send what waits, then end the thread; after `timeout_s` give up on the rest and return False."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        with self._changed:
            unsent = self._accepted - self._settled
            self._queue.clear()
            self.dropped += unsent
            if self.dropped:
                LOG.warning("tensorspan: %d spans were lost, %d of them unsent at shutdown", self.dropped, unsent)
            return not unsent

    def _run(self) -> None:
        while batch := self._next_batch():
            failure = "sending failed; the error is above"
            with self._guard("sending spans"):
                failure = self._send(batch)
            self._settle(len(batch), failure)
        if self._exporter is not None:
            self._exporter.shutdown()

    def _send(self, batch: list[ReadableSpan]) -> str:
        """Why the batch could not be sent; empty if it was."""
        try:
            self._exporter = self._exporter or self._open()
            result = self._exporter.export(batch)
        except OSError as error:
            return str(error)
        return "" if result is SpanExportResult.SUCCESS else "the exporter gave them up; its own message is above"

    def _next_batch(self) -> list[ReadableSpan]:
        """Up to BATCH spans; empty only at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._changed.wait_for(self._is_due, DELAY_SECONDS)
            return [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]

    def _is_due(self) -> bool:
        return len(self._queue) >= BATCH or self._hurry or self._closing

    def _settle(self, count: int, failure: str) -> None:
        with self._changed:
            self._settled += count
            if failure:
                self._lose(count, failure)
            self._changed.notify_all()

    def _lose(self, count: int, reason: str) -> None:
        """Count lost spans; the reason is said for the first ones, the total at shutdown."""
        self.dropped += count
        if not self._warned:
            self._warned = True
            LOG.warning(
                "tensorspan: spans are being lost: %s. Serving and captures go on; check the collector at "
                "OTEL_EXPORTER_OTLP_ENDPOINT (without one, the store's disk)",
                reason,
            )


def open_transport(settings: Settings) -> Callable[[], SpanExporter]:
    """What opens the exporter that `OTEL_*` asks for; without a collector, a file in the store, or in its spool.

    Raises SettingsError for an unknown protocol, MissingExtraError if the protocol's package is not installed.
    """
    protocol = config.otlp_protocol()
    if protocol is None:
        # Files that grow have no place in a bucket: there the spool keeps them.
        return lambda: _file_exporter(spans_file(config.local_store(settings)))
    builders: dict[str, Callable[[], SpanExporter]] = {"grpc": _grpc_exporter, "http/protobuf": _http_exporter}
    if protocol not in builders:
        raise SettingsError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol!r} must be one of {', '.join(sorted(builders))}")
    # Built now, although used later: a missing package or certificate is an error of the start.
    exporter = builders[protocol]()
    return lambda: exporter


def spans_file(store: Path) -> Path:
    """Where this process writes its spans: `<store>/spans/<UTC start time>-<pid>.jsonl`."""
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return store / "spans" / f"{moment}-{os.getpid()}.jsonl"


def _file_exporter(path: Path) -> SpanExporter:
    """OTLP-JSON lines, one per batch, readable only by this user; Jaeger's upload takes the file as it is."""
    try:
        from opentelemetry.exporter.otlp.json.file import FileSpanExporter
    except ImportError as error:
        raise MissingExtraError("serve", "opentelemetry-exporter-otlp-json-file") from error
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        raise StoreError(f"spans cannot be written to {path}: {error}; make the store writable") from error
    LOG.info("tensorspan: no collector is configured; spans go to %s", path)
    return FileSpanExporter(path)


def _grpc_exporter() -> SpanExporter:
    """OTLP over gRPC; reads endpoint, headers, certificates and timeouts from `OTEL_EXPORTER_OTLP_*` itself."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MissingExtraError("serve", "opentelemetry-exporter-otlp-proto-grpc") from error
    return OTLPSpanExporter()


def _http_exporter() -> SpanExporter:
    """OTLP over HTTP; reads endpoint, headers, certificates and timeouts from `OTEL_EXPORTER_OTLP_*` itself."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MissingExtraError("serve", "opentelemetry-exporter-otlp-proto-http") from error
    return OTLPSpanExporter()
