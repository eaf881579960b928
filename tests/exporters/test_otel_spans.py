"""Spans as a collector gets them: real OTLP over gRPC and HTTP, and the file; dead, hanging and full collectors."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from exporters.otel_spans import OtelExporter
from exporters.otlp_sender import Sender
from tests.exporters.collectors import GrpcCollector, HttpCollector, attributes, named
from tests.exporters.synthetic import engine
from tracer import semconv
from tracer.config import Settings
from tracer.records import (
    ArrayRecord,
    AttentionSpec,
    AttentionSummary,
    CaptureSpec,
    EngineInfo,
    GenerationEnd,
    GenerationStart,
    LogitsSpec,
    LogitsSummary,
    Record,
    RequestSpan,
    StepRecord,
    WorkerEnd,
)

LOGITS = LogitsSummary(1.0, 0.5, 0.25, -0.5, 0)
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER, REQUEST, GENERATION = "00f067aa0ba902b7", "53ce929d0e0e4736", "b7ad6b7169203331"
T0 = 1_760_000_000_000_000_000
MS = 1_000_000
SECRET_ID = 48_123_457
"""A token ID that appears nowhere else: found in exported bytes, it was leaked."""
SECRET_TEXT = "leaked-token-text"
NOTHING = memoryview(b"")


def start(**changes: Any) -> GenerationStart:
    record = GenerationStart(
        TRACE,
        GENERATION,
        REQUEST,
        sampled=True,
        start_ns=T0,
        request_id="chatcmpl-1",
        model="SmolLM2",
        operation="chat",
    )
    secret = {"prompt_token_ids": (SECRET_ID,), "prompt_token_bytes": (SECRET_TEXT.encode(),)}
    return replace(
        record, **{"params": {"temperature": 0.5}, "prompt_tokens": 16, "capture": CaptureSpec(), **secret, **changes}
    )


def step(index: int | None, number: int | None = None, **changes: Any) -> StepRecord:
    """Step `index`; `number` is its place in time, 10 ms apart."""
    place = number if number is not None else (index or 0) + 1
    begin = T0 + place * 10 * MS
    record = StepRecord(
        TRACE,
        GENERATION,
        f"{place + 0xA000:016x}",
        index,
        "decode" if index else "prefill",
        attempt=1,
        position=15 + (index or 0),
        tokens=1,
        kv_len=16,
        start_ns=begin,
        end_ns=begin + 9 * MS,
        token_id=SECRET_ID,
        logits=LogitsSummary(1.0, 0.5, 0.25, -0.5, 0, (SECRET_ID, SECRET_ID + 1), (-0.5, -0.75)),
        attention=AttentionSummary(2.0, 0.5, 0.75, 0.1, 3, 0.2, 1, 2),
        capture=True,
    )
    return replace(record, **changes)


def end(output_tokens: int, **changes: Any) -> GenerationEnd:
    secret = {"output_token_ids": (SECRET_ID,), "output_token_bytes": (SECRET_TEXT.encode(),)}
    record = GenerationEnd(TRACE, GENERATION, T0 + (output_tokens + 2) * 10 * MS, "ok", "stop", output_tokens)
    return replace(record, **{"first_token_ns": T0 + 20 * MS, **secret, **changes})


def request(**changes: Any) -> RequestSpan:
    record = RequestSpan(TRACE, REQUEST, CALLER, T0 - MS, T0 + 9000 * MS, "POST", "/v1/chat/completions", 200)
    return replace(record, **changes)


def whole(output_tokens: int = 4, **start_changes: Any) -> list[Record]:
    """One generation: a prefill chunk without a token, steps, a surplus step, the end and its request."""
    steps = [step(i, i + 1) for i in range(output_tokens + 1)]
    return [start(**start_changes), step(None, 0), *steps, end(output_tokens), request()]


def send(exporter: OtelExporter, records: Sequence[Record]) -> None:
    for record in records:
        exporter.export(record, NOTHING)
    assert exporter.force_flush(10)


@pytest.fixture(autouse=True)
def _no_otel_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpcCollector]:
    server = GrpcCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.port}")
    yield server
    server.stop()


@pytest.fixture(params=["grpc", "http/protobuf"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpcCollector | HttpCollector]:
    server = GrpcCollector() if request.param == "grpc" else HttpCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", request.param)
    yield server
    server.stop()


def test_an_unsampled_request_has_no_span(collector: GrpcCollector) -> None:
    exporter = OtelExporter(Settings())
    send(exporter, [request(sampled=False)])
    assert collector.spans(0) == []
    assert exporter.shutdown(10)


def test_tree_over_both_transports(either: GrpcCollector | HttpCollector) -> None:
    exporter = OtelExporter(Settings())
    send(exporter, whole(output_tokens=4))
    spans = either.spans(7)
    assert exporter.shutdown(10)

    generation, server = spans[-2:]
    assert (generation.name, server.name) == ("chat SmolLM2", "POST /v1/chat/completions")
    assert (server.kind, server.parent_span_id.hex(), server.span_id.hex()) == (Span.SPAN_KIND_SERVER, CALLER, REQUEST)
    assert (generation.kind, generation.parent_span_id.hex()) == (Span.SPAN_KIND_INTERNAL, REQUEST)
    steps = named(spans, "prefill") + named(spans, "decode")
    assert [s.span_id.hex() for s in steps] == [f"{0xA000 + place:016x}" for place in range(5)]
    assert {s.parent_span_id.hex() for s in steps} == {GENERATION}
    assert {s.kind for s in steps} == {Span.SPAN_KIND_INTERNAL}
    assert {s.trace_id.hex() for s in spans} == {TRACE}
    assert len({s.span_id for s in spans}) == 7
    assert server.flags == 0x300, "the caller is remote"
    assert {s.flags for s in [generation, *steps]} == {0x100}
    assert {s.status.code for s in spans} == {Status.STATUS_CODE_UNSET}


def test_generation_and_step_attributes_arrive_typed(collector: GrpcCollector, tmp_path: Path) -> None:
    send(OtelExporter(Settings(store=str(tmp_path))), whole())
    spans = collector.spans(7)
    generation = attributes(named(spans, "chat SmolLM2")[0])
    assert generation["gen_ai.request.temperature"] == 0.5
    assert generation["gen_ai.usage.output_tokens"] == 4
    assert generation["gen_ai.response.finish_reasons"] == ["stop"]
    assert generation["gen_ai.response.time_to_first_chunk"] == 0.02
    assert generation[semconv.STEPS_COUNT] == 5
    assert generation[semconv.CAPTURE_URI] == f"{tmp_path.resolve().as_uri()}/{TRACE}/{GENERATION}"
    last = attributes(named(spans, "decode")[-1])
    assert last[semconv.CAPTURE_REF] == f"{TRACE}/{GENERATION}/3"
    assert (last[semconv.STEP_INDEX], type(last[semconv.STEP_INDEX])) == (3, int)
    assert (last[semconv.LOGITS_ENTROPY], type(last[semconv.LOGITS_ENTROPY])) == (1.0, float)
    assert last[semconv.TOPK_LOGPROBS] == [-0.5, -0.75]


@pytest.mark.parametrize("content", [False, True])
def test_steps_are_small_and_content_leaves_only_with_the_opt_in(collector: GrpcCollector, *, content: bool) -> None:
    send(OtelExporter(Settings(content=content)), whole())
    spans = collector.spans(7)
    for span in named(spans, "decode"):
        assert all(key.startswith("tensorspan.") for key in attributes(span))
        assert (len(span.attributes) <= 40, span.ByteSize() <= 4096) == (True, True)
    numbers = [
        n for s in spans for value in attributes(s).values() for n in (value if isinstance(value, list) else [value])
    ]
    assert (SECRET_ID in numbers) is content
    assert (SECRET_ID + 1 in numbers) is content
    blob = b"".join(r.SerializeToString() for r in collector.requests)
    assert SECRET_TEXT.encode() not in blob
    varint = bytes(
        [SECRET_ID & 0x7F | 0x80, SECRET_ID >> 7 & 0x7F | 0x80, SECRET_ID >> 14 & 0x7F | 0x80, SECRET_ID >> 21]
    )
    assert (varint in blob) is content
    assert (b"token.id" in blob) is content


def test_children_end_inside_their_parents(collector: GrpcCollector) -> None:
    overhanging = [step(0, 0, start_ns=T0 - 5 * MS), step(1, 1, end_ns=T0 + 500 * MS)]
    late = step(2, 2, start_ns=T0 + 101 * MS)
    ends = end(3, end_ns=T0 + 100 * MS)
    send(OtelExporter(Settings()), [start(), *overhanging, late, ends, request(start_ns=T0 + MS, end_ns=T0 + 50 * MS)])
    spans = collector.spans(4)
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        parent = by_id.get(span.parent_span_id)
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        if parent is not None:
            assert parent.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= parent.end_time_unix_nano
    [generation] = named(spans, "chat SmolLM2")
    assert (generation.start_time_unix_nano, generation.end_time_unix_nano) == (T0, T0 + 100 * MS), "not moved"


def test_request_span_waits_for_its_last_generation(collector: GrpcCollector) -> None:
    other = {"span_id": "c7ad6b7169203332"}
    exporter = OtelExporter(Settings())
    early = request(end_ns=T0 + 10 * MS)
    send(exporter, [start(), start(**other, choice=1), end(0), early])
    assert not named(collector.spans(1), "POST /v1/chat/completions")
    send(exporter, [end(0, **other, end_ns=T0 + 70 * MS)])
    assert collector.spans(3)[-1].end_time_unix_nano == T0 + 70 * MS
    generations = named(collector.spans(3), "chat SmolLM2")
    assert [attributes(s).get("gen_ai.usage.input_tokens") for s in generations] == [16, None]


def test_request_without_a_generation_goes_out_at_once(collector: GrpcCollector) -> None:
    send(OtelExporter(Settings()), [request(parent_span_id=None, status_code=503)])
    [span] = collector.spans(1)
    found = (span.parent_span_id, span.status.code, attributes(span)["error.type"])
    assert found == (b"", Status.STATUS_CODE_ERROR, "503")


def test_surplus_steps_never_leave(collector: GrpcCollector) -> None:
    exporter = OtelExporter(Settings())
    send(exporter, [start(), *[step(i) for i in range(64)]])
    assert [attributes(s)[semconv.STEP_INDEX] for s in collector.spans(56)] == list(range(56)), "8 are held back"
    send(exporter, [*[step(i) for i in range(64, 68)], end(65)])
    assert [attributes(s).get(semconv.STEP_INDEX) for s in collector.spans(66)] == [*range(65), None]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"status": "aborted", "finish_reason": "abort"}, "cancelled", "aborted by the client"),
        ({"status": "error", "error": "EngineDeadError: gone"}, "EngineDeadError", "EngineDeadError"),
    ],
)
def test_ends_that_are_not_good(collector: GrpcCollector, changes: dict[str, Any], kind: str, message: str) -> None:
    send(OtelExporter(Settings()), [start(), step(0), end(1, **changes)])
    [generation] = named(collector.spans(2), "chat SmolLM2")
    assert (generation.status.code, generation.status.message) == (Status.STATUS_CODE_ERROR, message)
    assert attributes(generation)["error.type"] == kind


@pytest.mark.parametrize(
    ("settings", "records"),
    [
        (Settings(), [start(sampled=False), step(0, sampled=False), end(1)]),
        (Settings(), [step(0), end(1), ArrayRecord(TRACE, GENERATION, 1, ())]),
        (Settings(trace=False), whole()),
    ],
    ids=["unsampled", "never announced", "tracing off"],
)
def test_nothing_is_sent(collector: GrpcCollector, settings: Settings, records: list[Record]) -> None:
    send(OtelExporter(settings), records)
    assert collector.requests == []


def test_shutdown_sends_the_request_span_that_waits(collector: GrpcCollector) -> None:
    exporter = OtelExporter(Settings())
    send(exporter, [start(), request()])
    collector.spans(0)
    assert exporter.shutdown(10)
    assert collector.spans(1)[0].name == "POST /v1/chat/completions"


def test_steps_past_the_budget_share_spans_of_16_64_and_256(collector: GrpcCollector) -> None:
    rows = [replace(LOGITS, entropy=float(i % 7), logprob=-float(i % 5), rank=i % 3) for i in range(2501)]
    steps = [step(i, logits=row) for i, row in enumerate(rows)]
    send(OtelExporter(Settings(steps=2000)), [start(), *steps, end(2500)])
    spans = collector.spans(2001 + 4)
    generation, shared = attributes(spans[-1]), named(spans, "decode steps")
    assert (generation[semconv.STEPS_COUNT], generation[semconv.STEPS_SHARED]) == (2000, 500)
    facts = [attributes(span) for span in shared]
    assert [fact[semconv.STEPS_COUNT] for fact in facts] == [16, 64, 256, 164]
    assert [(fact[semconv.STEPS_FIRST], fact[semconv.STEPS_LAST]) for fact in facts] == [
        (2000, 2015), (2016, 2079), (2080, 2335), (2336, 2499)
    ]  # fmt: skip
    entropies = [row.entropy for row in rows[2080:2336]]
    assert facts[2][semconv.STEPS_ENTROPY_MEAN] == pytest.approx(sum(entropies) / 256)
    assert (facts[2][semconv.STEPS_ENTROPY_MAX], facts[2][semconv.STEPS_LOGPROB_MIN]) == (6.0, -4.0)
    assert (facts[2][semconv.STEPS_RANK_MAX], facts[2][semconv.STEPS_TOKENS]) == (2, 256)
    assert facts[2][semconv.CAPTURE_REF].endswith("/2080")
    assert not any(name.startswith("gen_ai.") for fact in facts for name in fact)
    assert shared[2].span_id.hex() == steps[2080].step_span_id
    assert shared[2].start_time_unix_nano == steps[2080].start_ns
    assert shared[2].end_time_unix_nano == steps[2335].end_ns
    assert len({s.span_id for s in spans}) == len(spans)


def test_the_budget_is_the_traces_and_not_the_generations(collector: GrpcCollector) -> None:
    other = {"span_id": "b" * 16}
    first: list[Record] = [start(), *[step(i) for i in range(8)], end(8)]
    second: list[Record] = [start(**other), *[step(i, 100 + i, **other) for i in range(8)], end(120, **other)]
    send(OtelExporter(Settings(steps=10)), [*first, *second])
    spans = collector.spans(2 + 10 + 1)
    told = [attributes(span) for span in named(spans, "chat SmolLM2")]
    assert [(told[0][semconv.STEPS_COUNT], told[0].get(semconv.STEPS_SHARED)), told[1][semconv.STEPS_SHARED]] == [
        (8, None), 6
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("every", "alone", "shared"),
    [(1, list(range(10)), []), (4, [0, 4, 8], [(1, 3), (5, 7), (9, 9)]), (0, [], [(0, 0), (1, 9)])],
)
def test_steps_are_thinned_as_asked(
    every: int, alone: list[int], shared: list[tuple[int, int]], collector: GrpcCollector
) -> None:
    send(OtelExporter(Settings()), [start(step_spans=every), *[step(i) for i in range(10)], end(10)])
    spans = collector.spans(1 + len(alone) + len(shared))
    facts = [attributes(span) for span in spans]
    assert [fact[semconv.STEP_INDEX] for fact in facts if semconv.STEP_INDEX in fact] == alone
    told = [(fact[semconv.STEPS_FIRST], fact[semconv.STEPS_LAST]) for fact in facts if semconv.STEPS_FIRST in fact]
    assert told == shared
    assert len({span.span_id for span in spans}) == len(spans)


def test_losses_of_shared_steps_are_said_there_too(collector: GrpcCollector) -> None:
    lost = [step(i, dropped=("logits: queue full",) if i == 5 else ()) for i in range(10)]
    send(OtelExporter(Settings()), [start(step_spans=0), *lost, end(10)])
    [span] = named(collector.spans(3), "decode steps")
    assert attributes(span)[semconv.DROPPED_CAUSES] == ["logits: queue full"]


def test_time_in_the_queue_and_the_conversation(collector: GrpcCollector) -> None:
    send(OtelExporter(Settings()), [start(conversation_id="talk-7"), step(0), end(1, reasoning_tokens=3)])
    generation = attributes(named(collector.spans(2), "chat SmolLM2")[0])
    assert generation[semconv.QUEUE_DURATION] == pytest.approx(0.01)
    assert (generation[semconv.CONVERSATION_ID], generation[semconv.USAGE_REASONING_TOKENS]) == ("talk-7", 3)


@pytest.mark.parametrize("content", [False, True])
def test_an_exception_is_recorded_once_and_its_words_are_content(content: bool, collector: GrpcCollector) -> None:
    error = f"EngineDeadError: cannot go on with {SECRET_TEXT}"
    failed, answered = end(1, status="error", finish_reason="error", error=error), request(status_code=500, error=error)
    send(OtelExporter(Settings(content=content)), [start(), step(0), failed, answered])
    spans = collector.spans(3)
    events = [(span.name, event) for span in spans for event in span.events]
    assert [(name, event.name) for name, event in events] == [("chat SmolLM2", "exception")]
    [found] = [{item.key: item.value.string_value for item in event.attributes} for _, event in events]
    assert found["exception.type"] == "EngineDeadError"
    assert found.get("exception.message") == (error if content else None)
    assert any(SECRET_TEXT.encode() in raw.SerializeToString() for raw in collector.requests) is content
    send(OtelExporter(Settings()), [request(span_id="e" * 16, status_code=500, error="ValueError: x")])
    [alone] = [span for span in collector.spans(4) if span.span_id.hex() == "e" * 16]
    assert [event.name for event in alone.events] == ["exception"]


def test_losses_reach_the_generation_span(collector: GrpcCollector) -> None:
    array = ArrayRecord(TRACE, GENERATION, 1, (), dropped=("attention_prefill: budget",))
    dropped = step(0, dropped=("logits: queue full", "attention: queue full"))
    send(OtelExporter(Settings()), [start(), array, dropped, WorkerEnd(TRACE, GENERATION, 0, 2), end(1)])
    spans = collector.spans(2)
    generation = attributes(named(spans, "chat SmolLM2")[0])
    assert (generation[semconv.DROPPED_ARRAYS], generation[semconv.DROPPED_RECORDS]) == (3, 2)
    assert "attention_prefill: budget" in generation[semconv.DROPPED_CAUSES]
    assert attributes(named(spans, "prefill")[0])[semconv.DROPPED_ARRAYS] == 2


def test_what_the_engine_cannot_give_is_said_on_the_generation(collector: GrpcCollector) -> None:
    exporter = OtelExporter(Settings())
    asked = CaptureSpec(LogitsSpec(), AttentionSpec(layers=(0, 1, 2)))
    send(exporter, [engine(layers=4, refused=[1, 2, 3]), *whole(capture=asked), *whole(capture=None)])
    captured, silent = map(attributes, named(collector.spans(14), "chat SmolLM2"))
    assert captured["tensorspan.capture.missing"] == ["attention layers 1-2: MLA"]
    assert "tensorspan.capture.missing" not in silent


def test_ranks_of_one_engine_give_one_span_per_step(collector: GrpcCollector) -> None:
    info = EngineInfo("SmolLM2", "0.32.0", "V1", "cpu", "bfloat16", 49152, 8192, world_size=2)
    ranks: list[Record] = [one for i in range(100) for one in (step(i), step(i, rank=1, logits=None))]
    records: list[Record] = [info, start(capture=CaptureSpec(summary=True)), *ranks, end(100)]
    send(OtelExporter(Settings()), records)
    collector.spans(101)


def test_resource_and_scope(collector: GrpcCollector) -> None:
    send(OtelExporter(Settings()), [start(), end(0)])
    [resource_spans] = collector.requests[0].resource_spans
    resource, [scope_spans] = attributes(resource_spans.resource), resource_spans.scope_spans
    assert (resource["service.name"], resource["host.name"]) == ("vllm", socket.gethostname())
    assert (scope_spans.scope.name, scope_spans.schema_url) == ("tensorspan", semconv.SCHEMA_URL)
    assert scope_spans.scope.version == resource[semconv.VERSION] != ""


def test_standard_variables_name_the_service(collector: GrpcCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-llm")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "host.name=h1,deployment.environment.name=test")
    send(OtelExporter(Settings()), [start(), end(0)])
    resource = attributes(collector.requests[0].resource_spans[0].resource)
    wanted = {"service.name": "my-llm", "host.name": "h1", "deployment.environment.name": "test"}
    assert wanted.items() <= resource.items()


def test_refused_steps_are_said_on_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = InMemorySpanExporter()
    monkeypatch.setattr("exporters.otel_spans.Sender", lambda _, **_more: Sender(lambda: memory, capacity=1))
    exporter = OtelExporter(Settings())
    for record in whole(8):
        exporter.export(record, NOTHING)
    assert exporter.shutdown(10)
    [generation] = [span for span in memory.get_finished_spans() if span.name == "chat SmolLM2"]
    assert generation.attributes is not None
    assert generation.attributes[semconv.DROPPED_SPANS] == exporter.dropped > 0
