"""Which collector gets metrics and logs, over HTTP too, and what is refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from exporters import otel_transport
from exporters.otel_logs import LogsExporter
from exporters.otel_metrics import MetricsExporter
from tests.exporters.test_otel_spans import whole
from tracer import config
from tracer.config import Settings
from tracer.errors import SettingsError
from tracer.log_records import LogLine

NOTHING = memoryview(b"")


@pytest.fixture(autouse=True)
def _no_otel_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def posts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """(path, bytes) of each request to a collector that takes everything."""
    taken: list[tuple[str, int]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append((self.path, len(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    yield taken
    server.shutdown()
    thread.join()
    server.server_close()


def test_both_go_over_http(posts: list[tuple[str, int]]) -> None:
    metrics, logs = MetricsExporter(Settings()), LogsExporter(Settings())
    for record in whole():
        metrics.export(record, NOTHING)
    logs.export(LogLine(1, 30, "tensorspan", "said"), NOTHING)
    assert metrics.shutdown(10)
    assert logs.shutdown(10)
    assert {path for path, size in posts if size} == {"/v1/metrics", "/v1/logs"}


@pytest.mark.parametrize(
    ("environment", "metrics", "logs"),
    [
        ({}, None, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, "grpc", "grpc"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, None, None),
        ({"OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "http://x"}, None, "grpc"),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, "grpc", None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_LOGS_EXPORTER": "none"}, "grpc", None),
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf"},
            "http/protobuf",
            None,
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, None, None),
    ],
)
def test_the_standard_variables_decide(
    environment: dict[str, str], metrics: str | None, logs: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (config.signal_protocol("METRICS"), config.signal_protocol("LOGS")) == (metrics, logs)


def test_an_unknown_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/json")
    with pytest.raises(SettingsError, match=r"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL='http/json' must be one of grpc"):
        otel_transport.metric_exporter()
