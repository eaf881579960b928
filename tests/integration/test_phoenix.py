"""A real backend: Arize Phoenix takes what the real server sends, by gRPC and by HTTP, and shows all of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from deploy import isolated
from deploy.phoenix import installed
from exporters.otel_spans import OtelExporter
from tests.exporters.test_otel_spans import end, request, start, step
from tests.integration.phoenix import Phoenix
from tests.integration.receiver import Receiver, attributes
from tests.integration.server import Server
from tracer.config import Settings

pytestmark = [pytest.mark.slow]

STEPS = 2000
GENERATION = "8a" * 8
NOTHING = memoryview(b"")
MESSAGES = [{"role": "user", "content": "Where is the blue key, and where is the red one? Answer in one sentence."}]
MICROSECOND = 1000


@pytest.fixture(scope="session")
def phoenix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phoenix]:
    """Started before the engine, so that both take their time together."""
    if (problem := isolated.why_not()) is not None:
        pytest.skip(f"Phoenix cannot be isolated: {problem}")
    assert installed(), "Phoenix is not installed; repair: .venv/bin/python -m deploy.phoenix --install"
    running = Phoenix(tmp_path_factory.mktemp("phoenix"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def long_trace(phoenix: Phoenix) -> str:
    """2,000 steps from records through the exporter itself: its queue, its messages, the official encoder and client.

    Phoenix's database takes its time with them, in which the engine starts.
    """
    phoenix.ready()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            patch.delenv(name)
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://127.0.0.1:{phoenix.grpc_port}")
        exporter = OtelExporter(Settings(content=True))
        trace_id = "8a" * 16
        own: dict[str, Any] = {"trace_id": trace_id, "span_id": GENERATION}
        exporter.export(start(**own), NOTHING)
        for i in range(STEPS):
            exporter.export(step(i, **own, step_span_id=f"57{i:014x}"), NOTHING)
        exporter.export(end(STEPS, **own), NOTHING)
        exporter.export(request(trace_id=trace_id), NOTHING)
        assert exporter.force_flush(60)
        assert exporter.dropped == 0
        assert exporter.shutdown(2)
    return trace_id


def only(trace_id: str, requests: list[ExportTraceServiceRequest]) -> list[ExportTraceServiceRequest]:
    """The messages of a receiver, without the spans of other traces."""
    found = []
    for original in requests:
        message = ExportTraceServiceRequest()
        message.CopyFrom(original)
        for scope in (scope for resource in message.resource_spans for scope in resource.scope_spans):
            kept = [span for span in scope.spans if span.trace_id.hex() == trace_id]
            del scope.spans[:]
            scope.spans.extend(kept)
        found.append(message)
    return found


def nanoseconds(text: str) -> int:
    """Of a time with microseconds, exactly."""
    moment = datetime.fromisoformat(text)
    return int(moment.replace(microsecond=0).timestamp()) * 10**9 + moment.microsecond * 1000


def check_span(sent: Span, shown: dict[str, Any]) -> None:
    """Everything that was sent is shown as it was sent; Phoenix adds names of its own and keeps microseconds."""
    assert shown["name"] == sent.name
    assert (shown["parent_id"] or "") == sent.parent_span_id.hex()
    assert shown["status_code"] in ("UNSET", "OK", "ERROR")
    assert abs(nanoseconds(shown["start_time"]) - sent.start_time_unix_nano) <= MICROSECOND
    assert abs(nanoseconds(shown["end_time"]) - sent.end_time_unix_nano) <= MICROSECOND
    facts = attributes(sent)
    assert {key: shown["attributes"].get(key) for key in facts} == facts
    assert [key for key in facts if type(shown["attributes"][key]) is not type(facts[key])] == []


@pytest.mark.engine
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_every_span_number_and_array_of_a_real_run(
    phoenix: Phoenix, long_trace: str, server: Server, receiver: Receiver, protocol: str
) -> None:
    trace_id = ("9a" if protocol == "grpc" else "9b") * 16
    headers = {"traceparent": f"00-{trace_id}-{'c7' * 8}-01", "Trace-Capture": "logits, attention=(0 29)"}
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 24, "temperature": 0, "n": 1}
    status, _, answer = server.post("/v1/chat/completions", body, headers)
    assert status == 200
    sent = {span.span_id.hex(): span for span in receiver.trace(trace_id)}
    for message in only(trace_id, receiver.requests):
        phoenix.send(message, protocol)
    shown = {one["context"]["span_id"]: one for one in phoenix.trace(trace_id, len(sent))}
    assert shown.keys() == sent.keys()
    for span_id, span in sent.items():
        check_span(span, shown[span_id])
    arrays = [one["attributes"]["tensorspan.logits.topk.logprobs"] for one in shown.values() if one["name"] == "decode"]
    assert arrays
    assert all(len(array) == 5 for array in arrays)
    [root] = [span_id for span_id, span in sent.items() if span.kind == Span.SPAN_KIND_SERVER]
    asked = phoenix.ask(f'{{getSpanByOtelId(spanId:"{root}") {{numChildSpans cumulativeTokenCountTotal}}}}')
    usage = answer["usage"]
    assert asked["getSpanByOtelId"]["cumulativeTokenCountTotal"] == usage["total_tokens"], "usage is counted once"


def test_a_trace_of_2000_steps_arrives_whole(phoenix: Phoenix, long_trace: str) -> None:
    shown = phoenix.trace(long_trace, STEPS + 2)
    steps = [one for one in shown if one["parent_id"] == GENERATION]
    assert sorted(one["attributes"]["tensorspan.step.index"] for one in steps) == list(range(STEPS))
    assert len({one["context"]["span_id"] for one in shown}) == STEPS + 2
    asked = phoenix.ask(f'{{getSpanByOtelId(spanId:"{GENERATION}") {{numChildSpans}}}}')
    assert asked["getSpanByOtelId"]["numChildSpans"] == STEPS
