"""Which OTLP exporter of metrics or logs the standard variables ask for; none unless a collector is named."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from tracer import config
from tracer.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk._logs.export import LogRecordExporter
    from opentelemetry.sdk.metrics.export import MetricExporter

__all__ = ["bounded", "log_exporter", "metric_exporter"]


def metric_exporter() -> MetricExporter | None:
    """Raises SettingsError for an unknown protocol, MissingExtraError if its package is not installed."""
    protocol = _protocol("METRICS")
    if protocol is None:
        return None
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Grpc

            return Grpc()
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as Http

        return Http()
    except ImportError as error:
        raise MissingExtraError("serve", "opentelemetry-exporter-otlp") from error


def log_exporter() -> LogRecordExporter | None:
    """Raises SettingsError for an unknown protocol, MissingExtraError if its package is not installed."""
    protocol = _protocol("LOGS")
    if protocol is None:
        return None
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as Grpc

            return Grpc()
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as Http

        return Http()
    except ImportError as error:
        raise MissingExtraError("serve", "opentelemetry-exporter-otlp") from error


def bounded(work: Callable[[], object], timeout_s: float) -> bool:
    """Do `work` on a thread of its own; False if it is not done after `timeout_s` (the thread dies with the process).

    The SDK's own limits do not hold: with a dead collector a shutdown of two seconds took twenty.
    """
    thread = threading.Thread(target=work, name="tensorspan-shutdown", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()


def _protocol(signal: str) -> str | None:
    protocol = config.signal_protocol(signal)
    if protocol not in (None, "grpc", "http/protobuf"):
        raise SettingsError(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL={protocol!r} must be one of grpc, http/protobuf")
    return protocol
