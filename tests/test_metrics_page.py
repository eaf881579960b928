"""What the middleware adds to `/metrics`, read back with Prometheus's own parsers, and when it adds nothing."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.exporters.test_otel_metrics import Measured, asked
from tests.exporters.test_otel_spans import REQUEST, TRACE, whole
from tests.test_middleware import Outlet
from tracer._guard import Guard
from tracer.config import Settings
from tracer.metrics_file import metrics_file
from tracer.middleware import TracingMiddleware

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
TEXT = "text/plain; version=1.0.0; charset=utf-8"
DURATION = "gen_ai_server_request_duration_seconds"


def vllm_like(request: Request) -> Response:
    """As vLLM answers: the text format, whatever is asked for."""
    assert request.method == "POST" or "accept-encoding" not in request.headers
    registry = CollectorRegistry()
    Counter("vllm:request_success", "Count", ["reason"], registry=registry).labels("stop").inc(3)
    Gauge("vllm:num_requests_running", "Running", registry=registry).set(1)
    Histogram("vllm:e2e_request_latency_seconds", "Latency", registry=registry).observe(0.3)
    return Response(generate_latest(registry), media_type=TEXT)


def compressed(_: Request) -> Response:
    return Response(gzip.compress(b"x 1\n"), headers={"content-type": TEXT, "content-encoding": "gzip"})


def scrape(socket: Path, accept: str = "*/*", answer: Any = vllm_like, method: str = "GET") -> httpx.Response:
    settings = Settings(enabled=True, socket=str(socket))
    routes = [Route("/metrics", answer, methods=["GET", "POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(TracingMiddleware, settings, Outlet(), tuple)])

    async def call() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, "/metrics", headers={"accept": accept})

    return asyncio.run(call())


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    """That of an exporter process that has measured one request."""
    path = tmp_path / "x.sock"
    Measured(Settings(socket=str(path))).send(*whole(output_tokens=4)[:-1], asked())
    return path


def test_the_text_format_is_added_to(socket: Path) -> None:
    answer = scrape(socket)
    assert answer.headers["content-type"] == TEXT
    families = {family.name: family for family in plain(answer.text)}
    assert {"vllm:request_success", DURATION, "tensorspan_queue_usage_bytes"} - set(families) == {
        "tensorspan_queue_usage_bytes"
    }, "without an exporter process nobody has a queue"
    assert families["tensorspan_capture_bytes"].samples[0].name == "tensorspan_capture_bytes_total"
    assert "# EOF" not in answer.text


def test_openmetrics_is_given_with_exemplars(socket: Path) -> None:
    answer = scrape(socket, OPENMETRICS)
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in openmetrics(answer.text)}  # type: ignore[no-untyped-call]
    assert [s.value for s in families["vllm:request_success"].samples] == [3]
    assert families["vllm:e2e_request_latency_seconds"].type == "histogram"
    assert "vllm:e2e_request_latency_seconds_created" not in families
    [exemplar] = [sample.exemplar for sample in families[DURATION].samples if sample.exemplar]
    assert exemplar.labels == {"trace_id": TRACE, "span_id": REQUEST}


def test_an_answer_that_cannot_be_read_passes_as_it_is(socket: Path) -> None:
    answer = scrape(socket, answer=compressed)
    assert answer.text == "x 1\n"
    answer = scrape(socket, answer=lambda _: Response("denied", 401))
    assert (answer.status_code, answer.text) == (401, "denied")
    assert DURATION not in scrape(socket, method="POST").text


def test_a_broken_file_costs_only_what_is_ours(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "strict", False)
    metrics_file(socket).write_text("[{]", encoding="utf-8")
    answer = scrape(socket, OPENMETRICS)
    assert answer.headers["content-type"] == TEXT
    assert "vllm:num_requests_running 1.0" in answer.text


def test_before_the_exporter_has_written_there_is_nothing_to_add(tmp_path: Path) -> None:
    text = scrape(tmp_path / "x.sock").text
    assert "vllm:num_requests_running 1.0" in text
    assert "tensorspan" not in text
