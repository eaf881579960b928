"""Attribute dictionaries: names, plain types, content, bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext

from exporters.span_attributes import (
    ABORTED,
    Attributes,
    Style,
    Tally,
    generation_attributes,
    generation_failure,
    request_attributes,
    request_failure,
    step_attributes,
    store_uri,
)
from tracer import semconv
from tracer.config import Settings
from tracer.records import (
    AttentionSummary,
    CaptureSpec,
    GenerationEnd,
    GenerationStart,
    LogitsSummary,
    RequestSpan,
    StepRecord,
)

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
STYLE = Style("file:///srv/captures")
CONTENT = replace(STYLE, content=True)
LOGITS = LogitsSummary(1.5, 0.25, 0.75, -0.5, 2, (91, 92, 93, 94, 95, 96), (-0.5, -1.0, -2.0, -3.0, -4.0, -5.0))
ATTENTION = AttentionSummary(2.0, 0.5, 0.75, 0.125, 7, 0.25, 3, 1)
STEP = StepRecord(
    TRACE,
    SPAN,
    "00000000000000a1",
    step=4,
    phase="decode",
    attempt=1,
    position=20,
    tokens=1,
    kv_len=21,
    start_ns=10,
    end_ns=20,
    batch_requests=3,
    batch_tokens=9,
    cuda_graph="PIECEWISE",
    token_id=777,
    logits=LOGITS,
    attention=ATTENTION,
    capture=True,
    dropped=("attention: queue full",),
)
START = GenerationStart(
    TRACE,
    SPAN,
    "00000000000000b1",
    sampled=True,
    start_ns=1_000_000_000,
    request_id="chatcmpl-1",
    model="SmolLM2",
    operation="chat",
    prompt_tokens=16,
    max_tokens=32,
    params={"temperature": 0.0, "top_p": 0.9, "seed": 7, "stop_sequences": ["###"], "choice.count": 2, "min_p": 0.1},
    capture=CaptureSpec(),
)
END = GenerationEnd(TRACE, SPAN, 5_000_000_000, "ok", "stop", 12, cached_tokens=8, first_token_ns=1_250_000_000)
REQUEST = RequestSpan(TRACE, "00000000000000b1", None, 0, 9, "POST", "/v1/chat/completions", 200)


def encoded_size(attributes: Attributes) -> int:
    span = ReadableSpan("decode", SpanContext(1, 1, is_remote=False), resource=Resource({}), attributes=attributes)
    return int(encode_spans([span]).ByteSize())


def test_step_carries_every_name_of_the_contract() -> None:
    out = step_attributes(STEP, CONTENT)
    assert out == {
        semconv.STEP_INDEX: 4,
        semconv.STEP_PHASE: "decode",
        semconv.STEP_ATTEMPT: 1,
        semconv.STEP_TOKENS: 1,
        semconv.STEP_POSITION: 20,
        semconv.BATCH_REQUESTS: 3,
        semconv.BATCH_TOKENS: 9,
        semconv.CUDA_GRAPH: "PIECEWISE",
        semconv.CHOSEN_ID: 777,
        semconv.CHOSEN_LOGPROB: -0.5,
        semconv.CHOSEN_RANK: 2,
        semconv.LOGITS_ENTROPY: 1.5,
        semconv.LOGITS_VARENTROPY: 0.25,
        semconv.LOGITS_MARGIN: 0.75,
        semconv.TOPK_IDS: [91, 92, 93, 94, 95],
        semconv.TOPK_LOGPROBS: [-0.5, -1.0, -2.0, -3.0, -4.0],
        semconv.ATTENTION_ENTROPY: 2.0,
        semconv.ATTENTION_SINK_MASS: 0.5,
        semconv.ATTENTION_PROMPT_MASS: 0.75,
        semconv.ATTENTION_SELF_WEIGHT: 0.125,
        semconv.ATTENTION_TOP_POSITION: 7,
        semconv.ATTENTION_TOP_WEIGHT: 0.25,
        semconv.ATTENTION_TOP_LAYER: 3,
        semconv.ATTENTION_TOP_HEAD: 1,
        semconv.CAPTURE_REF: f"{TRACE}/{SPAN}/4",
        semconv.CAPTURE_URI: f"file:///srv/captures/{TRACE}/{SPAN}",
        semconv.DROPPED_ARRAYS: 1,
        semconv.DROPPED_CAUSES: ["attention: queue full"],
    }


def test_step_without_content_has_no_token_ids() -> None:
    out = step_attributes(STEP, STYLE)
    assert semconv.CHOSEN_ID not in out
    assert semconv.TOPK_IDS not in out
    assert semconv.TOPK_LOGPROBS in out


def test_prefill_chunk_that_sampled_nothing() -> None:
    out = step_attributes(
        replace(STEP, step=None, phase="prefill", token_id=None, logits=None, attention=None, dropped=()), CONTENT
    )
    assert semconv.STEP_INDEX not in out
    assert out[semconv.CAPTURE_REF] == f"{TRACE}/{SPAN}"
    assert not [key for key in out if ".logits." in key or ".attention." in key or ".dropped." in key]


def test_plain_step_names_no_capture() -> None:
    assert not [key for key in step_attributes(replace(STEP, capture=False), STYLE) if ".capture" in key]


def test_no_gen_ai_name_on_a_step() -> None:
    assert not [key for key in step_attributes(STEP, CONTENT) if not key.startswith("tensorspan.")]


def test_missing_attention_peak_is_left_out() -> None:
    out = step_attributes(replace(STEP, attention=replace(ATTENTION, top_position=-1)), STYLE)
    assert not [key for key in out if ".attention.top." in key]
    assert semconv.ATTENTION_ENTROPY in out


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_cannot_hold_are_left_out(bad: float) -> None:
    logits = replace(LOGITS, entropy=bad, topk_logprobs=(-0.5, bad, -2.0))
    out = step_attributes(replace(STEP, logits=logits, attention=replace(ATTENTION, top_weight=bad)), CONTENT)
    assert semconv.LOGITS_ENTROPY not in out
    assert semconv.ATTENTION_TOP_WEIGHT not in out
    assert out[semconv.TOPK_IDS] == [91, 93], "ids and logprobs stay aligned"
    assert out[semconv.TOPK_LOGPROBS] == [-0.5, -2.0]


def test_numpy_scalars_become_plain_numbers() -> None:
    np: Any = pytest.importorskip("numpy")
    logits = LogitsSummary(
        np.float32(1.5), np.float32(0), np.float64(1), np.float32(-1), np.int64(3), (np.int64(5),), (np.float32(-1),)
    )
    out = step_attributes(replace(STEP, logits=logits, position=np.int64(20), token_id=np.int32(3)), CONTENT)
    flat = [item for value in out.values() for item in (value if isinstance(value, list) else [value])]
    assert {type(item) for item in flat} <= {int, float, str, bool}


def test_largest_step_stays_within_the_limits() -> None:
    ids, logprobs = tuple(range(150_000, 150_300)), tuple(-0.1 * i for i in range(300))
    step = replace(
        STEP,
        logits=replace(LOGITS, topk_ids=ids, topk_logprobs=logprobs),
        dropped=tuple(f"attention/{i}: {'x' * 500}" for i in range(100)),
    )
    out = step_attributes(step, replace(Style.of(Settings(topk=1000, content=True)), uri="file:///" + "d" * 200))
    assert len(out) <= 40
    assert encoded_size(out) <= 4096


def test_generation_carries_the_genai_names() -> None:
    out = generation_attributes(START, END, Tally(steps=12), STYLE)
    assert out == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "SmolLM2",
        "gen_ai.response.model": "SmolLM2",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 16,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "gen_ai.request.max_tokens": 32,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ["###"],
        "gen_ai.request.choice.count": 2,
        "tensorspan.request.min_p": 0.1,
        "tensorspan.generation.choice": 0,
        "tensorspan.generation.prompt_tokens": 16,
        "tensorspan.steps.count": 12,
        "tensorspan.capture_ref": f"{TRACE}/{SPAN}",
        "tensorspan.capture.uri": f"file:///srv/captures/{TRACE}/{SPAN}",
    }


def test_only_the_first_choice_counts_the_prompt() -> None:
    out = generation_attributes(replace(START, choice=1), END, Tally(), STYLE)
    assert semconv.USAGE_INPUT_TOKENS not in out
    assert semconv.USAGE_CACHED_TOKENS not in out
    assert out[semconv.USAGE_OUTPUT_TOKENS] == 12


def test_losses_are_said_on_the_generation() -> None:
    tally = Tally(steps=3, shared=2, spans=1, records=4)
    tally.add(("logits: queue full", "attention: queue full"))
    tally.add(("logits: queue full",))
    out = generation_attributes(START, END, tally, STYLE)
    assert out[semconv.STEPS_SHARED] == 2
    assert out[semconv.DROPPED_SPANS] == 1
    assert out[semconv.DROPPED_RECORDS] == 4
    assert out[semconv.DROPPED_ARRAYS] == 3
    assert out[semconv.DROPPED_CAUSES] == ["logits: queue full", "attention: queue full"]


@pytest.mark.parametrize(
    ("status", "error", "kind", "description"),
    [
        ("ok", "", None, None),
        ("aborted", "", "cancelled", ABORTED),
        ("error", "EngineDeadError: gone", "EngineDeadError", "EngineDeadError: gone"),
        ("error", "the engine died: badly", "_OTHER", "the engine died: badly"),
        ("error", "", "_OTHER", "the engine reported an error"),
    ],
)
def test_generation_status(status: Any, error: str, kind: str | None, description: str | None) -> None:
    end = replace(END, status=status, error=error)
    assert generation_attributes(START, end, Tally(), STYLE).get("error.type") == kind
    assert generation_failure(end, CONTENT) == description


@pytest.mark.parametrize(
    ("code", "error", "kind", "description"),
    [
        (200, "", None, None),
        (400, "", None, None),
        (503, "", "503", ""),
        (0, "ClientDisconnect", "ClientDisconnect", "ClientDisconnect"),
    ],
)
def test_request_status(code: int, error: str, kind: str | None, description: str | None) -> None:
    record = replace(REQUEST, status_code=code, error=error)
    out = request_attributes(record)
    assert out.get("error.type") == kind
    assert ("http.response.status_code" in out) == (code != 0)
    assert request_failure(record, CONTENT) == description


def test_foreign_attributes_are_cleaned_and_cannot_replace_ours() -> None:
    foreign: dict[str, Any] = {
        "http.route": "evil",
        "server.port": 8000,
        "note": "x" * 9000,
        "bad": math.nan,
        "odd": {},
    }
    out = request_attributes(replace(REQUEST, attributes=foreign))
    assert out["http.route"] == "/v1/chat/completions"
    assert out["server.port"] == 8000
    assert len(str(out["note"])) == 512
    assert "bad" not in out
    assert "odd" not in out


def test_store_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_uri("./captures") == f"file://{tmp_path.resolve()}/captures"
    assert store_uri("s3://bucket/captures/") == "s3://bucket/captures"


def test_the_words_of_an_exception_are_content() -> None:
    end = GenerationEnd(TRACE, SPAN, 2, "error", "error", 1, error="ValueError: cannot read 'my secret'")
    assert generation_failure(end, STYLE) == "ValueError"
    assert generation_failure(replace(end, error="the process ended"), STYLE) == "the process ended"
