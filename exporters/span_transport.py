"""The ways out for spans: OTLP over gRPC or HTTP, or OTLP-JSON lines in the store; one attempt per call.

The official exporters read `OTEL_EXPORTER_OTLP_*`, encode and speak the protocol. Their own retries are left out: they
end after `OTEL_EXPORTER_OTLP_TIMEOUT` and lose the batch (opentelemetry-python 1.45.2), and neither a refusal nor a
partial success can be told from an absent collector. What the collector said comes as an exception instead, and
`exporters.otlp_sender` holds, repeats or counts. What may be repeated is said by OTLP 1.9, sections "Failures" and
"Partial Success".
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from tracer import config
from tracer.config import Settings
from tracer.errors import MissingExtraError, SettingsError, StoreError

__all__ = ["RejectedError", "UnavailableError", "open_transport", "spans_file"]

LOG: Final = logging.getLogger("tensorspan.otel")
HTTP_RETRIED: Final = frozenset({429, 502, 503, 504})
GRPC_RETRIED: Final = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"}
)
"""`RESOURCE_EXHAUSTED` too, if the collector says when to come back."""
RECONNECT_MS: Final = 1000
"""gRPC waits up to 2 minutes between its own attempts to connect; the sender's are further apart than this."""


class UnavailableError(Exception):
    """The collector cannot take the batch now; it may be sent again, after `wait_s` if the collector named a time."""

    def __init__(self, problem: str, wait_s: float | None = None) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


class RejectedError(Exception):
    """The collector will never take `count` spans of the batch (None: all of them); sending again would be wrong."""

    def __init__(self, problem: str, count: int | None = None) -> None:
        super().__init__(problem)
        self.count = count


def open_transport(settings: Settings) -> Callable[[], SpanExporter]:
    """What opens the exporter that `OTEL_*` asks for; without a collector, a file in the store, or in its spool.

    Its `export` raises UnavailableError and RejectedError. Raises SettingsError for an unknown protocol,
    MissingExtraError if the protocol's package is not installed.
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
        import grpc  # type: ignore[import-untyped]
        from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MissingExtraError("serve", "opentelemetry-exporter-otlp-proto-grpc") from error

    class OneAttempt(OTLPSpanExporter):
        """The official exporter's channel and settings, without its loop."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            request = encode_spans(spans)
            try:
                answer = self._client.Export(request, metadata=self._headers, timeout=self._timeout)  # type: ignore[attr-defined]
            except grpc.RpcError as error:
                raise _grpc_failure(error) from None
            _check_partial(answer)
            return SpanExportResult.SUCCESS

    return OneAttempt(channel_options=(("grpc.max_reconnect_backoff_ms", RECONNECT_MS),))  # type: ignore[arg-type]


def _grpc_failure(error: Any) -> UnavailableError | RejectedError:
    """A failed call as the exception that says whether to repeat it."""
    code = error.code().name
    problem = f"gRPC {code}: {error.details()}"
    wait_s = _retry_info(error.trailing_metadata() or ())
    if code in GRPC_RETRIED or (code == "RESOURCE_EXHAUSTED" and wait_s is not None):
        return UnavailableError(problem, wait_s)
    return RejectedError(problem)


def _retry_info(metadata: Sequence[tuple[str, Any]]) -> float | None:
    """Seconds after which the collector wants the batch again; None if it does not say."""
    from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]

    for key, value in metadata:
        if key == "google.rpc.retryinfo-bin":
            return float(RetryInfo.FromString(value).retry_delay.ToTimedelta().total_seconds())
    return None


def _http_exporter() -> SpanExporter:
    """OTLP over HTTP; reads endpoint, headers, certificates and timeouts from `OTEL_EXPORTER_OTLP_*` itself."""
    try:
        import requests
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MissingExtraError("serve", "opentelemetry-exporter-otlp-proto-http") from error

    class Session(requests.Session):
        """Keeps what the collector said, and tells the official client that all is well, so that it does not repeat."""

        failure: UnavailableError | RejectedError | None = None

        def request(self, *args: Any, **options: Any) -> requests.Response:
            self.failure = None
            try:
                response = super().request(*args, **options)
                self.failure = _http_failure(response)
            except requests.RequestException as error:
                self.failure = UnavailableError(str(error))
            quiet = requests.Response()
            quiet.status_code = 200
            return quiet

    session = Session()

    class OneAttempt(OTLPSpanExporter):
        """The official exporter on a session that never fails."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = super().export(spans)
            if session.failure is not None:
                raise session.failure
            return result

    return OneAttempt(session=session)


def _http_failure(response: Any) -> UnavailableError | RejectedError | None:
    """An answer as the exception that says whether to repeat the request; None if the batch was taken whole."""
    if response.status_code in HTTP_RETRIED:
        return UnavailableError(f"HTTP {response.status_code}", _retry_after(response.headers.get("retry-after", "")))
    if not 200 <= response.status_code < 300:
        return RejectedError(f"HTTP {response.status_code}: {response.text[:200]}")
    if "protobuf" in response.headers.get("content-type", ""):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        try:
            _check_partial(ExportTraceServiceResponse.FromString(response.content))
        except RejectedError as error:
            return error
    return None


def _retry_after(text: str) -> float | None:
    """Seconds in a `Retry-After` header (RFC 9110, 10.2.3: a number or a date); None if there are none."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def _check_partial(answer: Any) -> None:
    """Raise RejectedError if the collector kept only some of the spans; a message alone is a warning of its."""
    partial = answer.partial_success
    if partial.rejected_spans:
        raise RejectedError(partial.error_message or "the collector gave no reason", partial.rejected_spans)
