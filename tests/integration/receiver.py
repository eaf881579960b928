"""A real OTLP/gRPC receiver for a server in another process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.exporters.collectors import GrpcCollector, attributes, spans_of

__all__ = ["Receiver", "attributes", "spans_of"]

PATIENCE_SECONDS = 30


class Receiver(GrpcCollector):
    """Waits for what a test expects instead of sleeping."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        super().__init__()

    def _came(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def await_true(self, what: Callable[[], bool]) -> None:
        """Return when `what` holds; looked at whenever something has come."""
        with self._changed:
            assert self._changed.wait_for(what, PATIENCE_SECONDS)

    def trace(self, trace_id: str, ready: Callable[[list[Span]], bool] | None = None) -> list[Span]:
        """All spans of a trace once its SERVER span (the last to be sent) and whatever `ready` asks for have come."""

        def found() -> list[Span]:
            return [span for span in spans_of(self.requests) if span.trace_id.hex() == trace_id]

        def complete() -> bool:
            spans = found()
            return any(span.kind == Span.SPAN_KIND_SERVER for span in spans) and (ready is None or ready(spans))

        with self._changed:
            assert self._changed.wait_for(complete, PATIENCE_SECONDS), [span.name for span in found()]
        return found()
