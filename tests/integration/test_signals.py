"""Metrics and logs of a real server: scraped, by OTLP, with and without a trace, and never with content."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain
from prometheus_client.samples import Sample

from tests.integration.receiver import Receiver, attributes
from tests.integration.server import Server, await_true
from tracer import metric_names as names

pytestmark = pytest.mark.engine

DURATION = "gen_ai_server_request_duration_seconds"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
SECRET = "quokkas like violets"
PLAIN_TRACE, TRACE = "7c" * 16, "7d" * 16


def scrape(server: Server, accept: str = "*/*") -> str:
    request = urllib.request.Request(server.url + "/metrics", headers={"accept": accept})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def samples(server: Server, name: str) -> list[Sample]:
    return [sample for family in plain(scrape(server)) for sample in family.samples if sample.name == name]


def served(server: Server) -> float:
    return sum(s.value for s in samples(server, DURATION + "_count") if "error_type" not in s.labels)


def exemplars(server: Server) -> Iterator[tuple[str, dict[str, str]]]:
    for family in openmetrics(scrape(server, OPENMETRICS)):  # type: ignore[no-untyped-call]
        for sample in family.samples:
            if sample.exemplar:
                yield family.name, sample.exemplar.labels


def ask(server: Server, headers: dict[str, str], **changes: Any) -> tuple[int, dict[str, str], Any]:
    body = {"model": "demo", "prompt": SECRET, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    return server.post("/v1/completions", body | changes, headers)


def test_a_traced_request_on_the_page_leads_to_its_spans(server: Server, receiver: Receiver) -> None:
    parent = {"traceparent": f"00-{TRACE}-{'1b' * 8}-01"}
    status, _, _ = ask(server, {**parent, "Trace-Capture": "logits"})
    assert status == 200
    spans = receiver.trace(TRACE)
    ids = {span.span_id.hex() for span in spans}
    await_true(lambda: any(labels["trace_id"] == TRACE for _, labels in exemplars(server)))
    found = {name: labels["span_id"] for name, labels in exemplars(server) if labels["trace_id"] == TRACE}
    assert set(found) >= {DURATION, "gen_ai_server_time_to_first_token_seconds", "tensorspan_token_usage"}
    assert set(found.values()) <= ids
    families = {family.name for family in openmetrics(scrape(server, OPENMETRICS))}  # type: ignore[no-untyped-call]
    assert {"vllm:e2e_request_latency_seconds", "vllm:request_success", "tensorspan_capture_bytes"} <= families


def test_an_unsampled_and_a_refused_request_count(server: Server, receiver: Receiver) -> None:
    await_true(lambda: served(server) > 0)  # By the exporter process that lives now.
    before = served(server)
    status, headers, _ = ask(server, {"traceparent": f"00-{PLAIN_TRACE}-{'1b' * 8}-00"})
    assert (status, headers["traceresponse"][-2:]) == (200, "00")
    await_true(lambda: served(server) == before + 1)
    [labels] = [
        s.labels
        for s in samples(server, DURATION + "_count")
        if s.labels["gen_ai_operation_name"] == "text_completion" and "error_type" not in s.labels
    ]
    assert labels["gen_ai_request_model"] == "demo"
    status, _, _ = ask(server, {"Trace-Capture": "nonsense"})
    assert status == 400
    await_true(lambda: any(s.labels.get("error_type") == "400" for s in samples(server, DURATION + "_count")))
    assert not any(labels["trace_id"] == PLAIN_TRACE for _, labels in exemplars(server))


def test_the_figures_of_the_exporter_process(server: Server) -> None:
    await_true(lambda: bool(samples(server, "tensorspan_queue_limit_bytes")))
    limits = {s.labels["tensorspan_queue_role"]: s.value for s in samples(server, "tensorspan_queue_limit_bytes")}
    assert limits["worker"] >= 256_000_000
    await_true(lambda: bool(samples(server, "tensorspan_store_size_bytes")))
    lost = samples(server, "tensorspan_spans_lost_total")
    assert [sample.value for sample in lost] == [0, 0, 0, 0], "one for each cause"


def test_otlp_brings_the_same_and_no_content(server: Server, receiver: Receiver) -> None:
    _, _, body = ask(server, {"Trace-Capture": "logits, attention=(0)"}, return_token_ids=True)

    def operations(name: str) -> set[str]:
        """Of the newest state: another test may have killed the exporter process that sent the first."""
        found = receiver.metrics().get(name)
        return {attributes(p)["gen_ai.operation.name"] for p in found.histogram.data_points} if found else set()

    wanted = (names.REQUEST_DURATION, names.TIME_TO_FIRST_TOKEN, names.TIME_PER_OUTPUT_TOKEN, names.TOKEN_USAGE)
    receiver.await_true(lambda: all("text_completion" in operations(name) for name in wanted))
    resources = [attributes(r.resource_metrics[0].resource) for r in receiver.metric_requests]
    assert {resource["service.name"] for resource in resources} == {"vllm"}
    said = b"".join(r.SerializeToString() for r in [*receiver.metric_requests, *receiver.log_requests])
    said += scrape(server, OPENMETRICS).encode()
    for text in (SECRET, body["choices"][0]["text"].strip()):
        assert text.encode() not in said


def test_vllms_own_lines_name_the_span_where_a_formatter_asks(server: Server) -> None:
    _, headers, _ = ask(server, {"x-request-id": "mark-42"})
    _, trace_id, span_id, _ = headers["traceresponse"].split("-")
    traced = server.log.with_name("traced.log")
    lines = [line for line in traced.read_text(encoding="utf-8").splitlines() if "mark-42" in line]
    assert lines
    assert any(line.startswith(f"{trace_id} {span_id} Received request") for line in lines), lines
