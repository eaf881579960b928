"""The main job on a real compiled server: HTTP in, spans at a real receiver, tensors equal to Transformers eager."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.cpus import EAGER_TOLERANCE
from tests.integration.oracle import oracle
from tests.integration.receiver import Receiver, attributes
from tests.integration.server import Server
from tests.processes import exporter_of_store
from tracer import Capture, find_captures, open_capture

pytestmark = pytest.mark.engine

QUESTION = "The red key is in the kitchen and the blue key is in the garage. Where is the blue key?"
MESSAGES = [{"role": "system", "content": "Answer in one short sentence."}, {"role": "user", "content": QUESTION}]
STORY = "Once upon a time, in a small village by the sea,"
TOLERANCE = EAGER_TOLERANCE
RESTART_SECONDS = 60.0


def chat(**extra: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": MESSAGES, "max_tokens": 16, "temperature": 0, **extra}


def opened(store: Path, receiver: Receiver, ref: str) -> Capture:
    """The capture behind a `Trace-Capture-Ref`, once its generation span says that it is written."""
    trace_id, span_id = ref.split("/")
    receiver.trace(trace_id, lambda spans: any(span.span_id.hex() == span_id for span in spans))
    return open_capture(store, span_id)


def test_streamed_chat_through_the_official_client(
    server: Server, receiver: Receiver, server_store: Path, demo: Path
) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    raw = client.chat.completions.with_raw_response.create(
        **chat(stream=True),
        extra_headers={"Trace-Capture": "logits;dtype=f32, attention;rows=all;dtype=f32, qk;rows=all"},
    )
    assert raw.headers["trace-capture-status"] == "recording"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices)
    cap = opened(server_store, receiver, raw.headers["trace-capture-ref"])
    assert raw.headers["traceresponse"].split("-")[1] == cap.trace_id
    assert cap.complete, cap.missing
    assert (cap.text or "").removesuffix("<|im_end|>") == text
    tokens = [token.id for token in cap.tokens]
    answer = tokens[cap.prompt_tokens :]
    assert len(tokens) - len(answer) > 32, "the prompt must need more than one chunk"
    want = oracle(demo, tokens)
    last = cap.prompt_tokens - 1
    assert list(cap.attention) == list(range(30))
    for layer in cap.attention:
        prompt = np.asarray(cap.attention_prefill[layer])[..., : last + 1]
        np.testing.assert_allclose(prompt, want.attention[layer, :, : last + 1, : last + 1], rtol=0, atol=TOLERANCE)
        rebuilt = np.asarray(cap.qk_prefill[layer])
        np.testing.assert_allclose(rebuilt, want.attention[layer, :, : last + 1, : last + 1], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(np.asarray(cap.qk[layer]), np.asarray(cap.attention[layer]), rtol=0, atol=TOLERANCE)
        for step in range(len(answer)):
            rows = np.asarray(cap.attention[layer].isel(step=step))[:, : last + 1 + step]
            np.testing.assert_allclose(
                rows, want.attention[layer, :, last + step, : last + 1 + step], rtol=0, atol=TOLERANCE
            )
    logits = np.asarray(cap.logits)
    assert logits.argmax(axis=1).tolist() == answer
    np.testing.assert_allclose(logits, want.logits[last : last + len(answer)], rtol=0, atol=5e-3)
    roles = {region.role for region in cap.regions}
    assert {"system", "user"} <= roles


def test_the_tree_that_the_receiver_got(server: Server, receiver: Receiver) -> None:
    caller = {"traceparent": f"00-{'5a' * 16}-{'c7' * 8}-01", "Trace-Capture": "attention=(0 29)"}
    status, headers, body = server.post("/v1/chat/completions", chat(), caller)
    assert status == 200
    _, span_id = headers["trace-capture-ref"].split("/")
    spans = receiver.trace("5a" * 16)
    by_id = {span.span_id.hex(): span for span in spans}
    assert len(by_id) == len(spans)
    [root] = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    generation = by_id[span_id]
    steps = [span for span in spans if span.parent_span_id == generation.span_id]
    assert root.parent_span_id.hex() == "c7" * 8
    assert generation.parent_span_id == root.span_id
    assert (root.name, generation.name) == ("POST /v1/chat/completions", "chat demo")
    usage = body["usage"]
    assert [span.name for span in steps].count("decode") == usage["completion_tokens"] - 1
    assert [span.name for span in steps].count("prefill") >= 2
    assert len(steps) + 2 == len(spans)
    for child in [generation, *steps]:
        parent = by_id[child.parent_span_id.hex()]
        assert parent.start_time_unix_nano <= child.start_time_unix_nano
        assert child.start_time_unix_nano < child.end_time_unix_nano <= parent.end_time_unix_nano
    facts = attributes(generation)
    assert facts["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert facts["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert facts["gen_ai.response.finish_reasons"] == ["stop"]
    sampled = [attributes(span) for span in steps if "tensorspan.step.index" in attributes(span)]
    assert sorted(item["tensorspan.step.index"] for item in sampled) == list(range(usage["completion_tokens"]))
    for item in sampled:
        assert isinstance(item["tensorspan.logits.entropy"], float)
        assert isinstance(item["tensorspan.token.rank"], int)
        assert item["tensorspan.token.rank"] == 0
        assert isinstance(item["tensorspan.attention.entropy"], float)
        assert len(item["tensorspan.logits.topk.ids"]) == 5
    assert not [key for span in steps for key in attributes(span) if key.startswith("gen_ai.")]


def test_a_step_span_of_the_receiver_opens_exactly_its_row(
    server: Server, receiver: Receiver, server_store: Path
) -> None:
    _, headers, _ = server.post("/v1/chat/completions", chat(), {"Trace-Capture": "logits, attention=(3)"})
    cap = opened(server_store, receiver, headers["trace-capture-ref"])
    spans = receiver.trace(cap.trace_id)
    step = next(span for span in spans if attributes(span).get("tensorspan.step.index") == 4)
    row = open_capture(server_store, step.span_id.hex())
    assert row.step_index == 4
    logits = np.asarray(row.logits)[4]
    assert int(logits.argmax()) == attributes(step)["tensorspan.token.id"]
    assert attributes(step)["tensorspan.capture_ref"] == f"{cap.trace_id}/{cap.span_id}/4"
    weights = row.row(step=4, layer=3, head=0)
    assert len(weights) == attributes(step)["tensorspan.step.position"] + 1


PLAIN_READER = """
import sys, json, zarr, xarray, numpy as np
path = sys.argv[1]
group = zarr.open_group(path, mode="r")
data = xarray.open_zarr(path)
assert "tracer" not in sys.modules
print(json.dumps({
    "complete": group.attrs["complete"],
    "argmax": np.asarray(group["logits"]).argmax(axis=1).tolist(),
    "tokens": np.asarray(group["token_id"]).tolist(),
    "dims": list(data["attention"].dims),
    "same": bool((data["attention"].values == group["attention"][:]).all()),
}))
"""


def test_plain_zarr_and_xarray_read_it_without_us(server: Server, receiver: Receiver, server_store: Path) -> None:
    _, headers, _ = server.post("/v1/chat/completions", chat(), {"Trace-Capture": "logits, attention"})
    cap = opened(server_store, receiver, headers["trace-capture-ref"])
    path = server_store / cap.trace_id / cap.span_id
    result = subprocess.run(
        [sys.executable, "-c", PLAIN_READER, str(path)], capture_output=True, text=True, check=True, cwd="/"
    )
    seen = json.loads(result.stdout)
    assert seen["complete"]
    assert seen["same"]
    assert seen["argmax"] == seen["tokens"] == [token.id for token in cap.tokens[cap.prompt_tokens :]]
    assert seen["dims"] == ["step", "layer", "head", "key_pos"]


ROUTES = {
    "chat": ("/v1/chat/completions", chat()),
    "completions": ("/v1/completions", {"model": "demo", "prompt": STORY, "max_tokens": 8, "temperature": 0}),
    "responses": ("/v1/responses", {"model": "demo", "input": QUESTION, "max_output_tokens": 8, "temperature": 0}),
    "messages": ("/v1/messages", {"model": "demo", "messages": MESSAGES[1:], "max_tokens": 8, "temperature": 0}),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_captures_and_the_text_stays_the_same(
    route: str, stream: bool, server: Server, receiver: Receiver, server_store: Path
) -> None:
    path, body = ROUTES[route]
    status, headers, plain = server.post(path, body)
    assert (status, headers["trace-capture-status"]) == (200, "off")
    assert "trace-capture-ref" not in headers
    status, headers, answer = server.post(path, body | {"stream": stream}, {"Trace-Capture": "logits;top=8"})
    assert (status, headers["trace-capture-status"]) == (200, "recording")
    cap = opened(server_store, receiver, headers["trace-capture-ref"])
    assert cap.complete, cap.missing
    text = (cap.text or "").removesuffix("<|im_end|>")
    assert text
    assert text in (streamed_text(answer) if stream else json.dumps(plain))
    if not stream:
        assert text in json.dumps(answer)


def streamed_text(events: str) -> str:
    """All text deltas of a server-sent event stream, whichever API it belongs to."""
    parts = []
    for line in events.splitlines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        delta = event.get("delta")
        if isinstance(delta, str) and event["type"] == "response.output_text.delta":
            parts.append(delta)
        elif isinstance(delta, dict):
            parts.append(delta.get("text") or "")
        choices = event.get("choices", [])
        parts += [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices]
    return "".join(parts)


def test_the_request_field_asks_too(server: Server, receiver: Receiver, server_store: Path) -> None:
    body = chat(vllm_xargs={"trace_capture": "logits;top=4"})
    _, headers, _ = server.post("/v1/chat/completions", body)
    assert opened(server_store, receiver, headers["trace-capture-ref"]).complete


def test_parallel_sampling_gives_a_capture_each(server: Server, receiver: Receiver, server_store: Path) -> None:
    body = chat(n=3, temperature=1.0, max_tokens=6)
    _, headers, answer = server.post("/v1/chat/completions", body, {"Trace-Capture": "logits;top=4"})
    refs = headers["trace-capture-ref"].split(", ")
    assert len(set(refs)) == 3
    texts = {(opened(server_store, receiver, ref).text or "").removesuffix("<|im_end|>") for ref in refs}
    assert texts == {choice["message"]["content"] for choice in answer["choices"]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("logits;;", "Trace-Capture"),
        ("logitz", "logitz"),
        ("attention=(0 99)", "layers 0-29"),
        ('attention;heads="3-40"', "head"),
        ("logits;top=999999", "vocabulary"),
    ],
)
def test_bad_requests_are_told_before_anything_is_generated(server: Server, header: str, words: str) -> None:
    status, headers, body = server.post("/v1/chat/completions", chat(), {"Trace-Capture": header})
    assert status == 400
    assert headers["content-type"] == "application/problem+json"
    assert words in json.dumps(body)
    assert body["example"]


def test_forwarded_requests_may_not_capture(server: Server) -> None:
    headers = {"Trace-Capture": "logits", "X-Forwarded-For": "10.0.0.1"}
    status, answer, body = server.post("/v1/chat/completions", chat(), headers)
    assert (status, answer["trace-capture-status"]) == (403, "denied")
    assert "TENSORSPAN_CAPTURE" in body["detail"]


def test_a_client_cannot_forge_our_key(server: Server, receiver: Receiver, server_store: Path) -> None:
    forged = {"trace_id": "d" * 32, "span_id": "e" * 16, "sampled": True, "capture": "logits"}
    body = chat(vllm_xargs={"tensorspan": json.dumps(forged)}, max_tokens=2)
    status, headers, _ = server.post("/v1/chat/completions", body)
    assert (status, headers["trace-capture-status"]) == (200, "off")
    receiver.trace(headers["traceresponse"].split("-")[1])
    assert not (server_store / ("d" * 32)).exists()


def test_an_unsampled_parent_gives_no_spans_but_a_capture(
    server: Server, receiver: Receiver, server_store: Path
) -> None:
    unsampled = {"traceparent": f"00-{'7b' * 16}-{'c7' * 8}-00", "Trace-Capture": "logits;top=2"}
    _, headers, _ = server.post("/v1/chat/completions", chat(), unsampled)
    _, marker, _ = server.post("/v1/chat/completions", chat(max_tokens=1))
    receiver.trace(marker["traceresponse"].split("-")[1])
    cap = open_capture(server_store, headers["trace-capture-ref"])
    assert cap.complete
    assert not [r for r in receiver.requests if ("7b" * 16) in str(r)]
    assert cap.attrs["traced"] is False


def test_a_client_that_leaves_ends_its_span_and_its_capture(
    server: Server, receiver: Receiver, server_store: Path
) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    endless = chat(stream=True, max_tokens=800, temperature=1.0)
    raw = client.chat.completions.with_raw_response.create(
        **endless, extra_body={"ignore_eos": True}, extra_headers={"Trace-Capture": "logits;top=2"}
    )
    stream = raw.parse()
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    stream.close()
    trace_id, span_id = raw.headers["trace-capture-ref"].split("/")
    spans = receiver.trace(trace_id, lambda found: any(span.span_id.hex() == span_id for span in found))
    generation = next(span for span in spans if span.span_id.hex() == span_id)
    assert generation.status.code == Status.STATUS_CODE_ERROR
    assert attributes(generation)["error.type"] == "cancelled"
    steps = [span for span in spans if span.parent_span_id == generation.span_id]
    assert all(span.end_time_unix_nano <= generation.end_time_unix_nano for span in steps)
    cap = open_capture(server_store, span_id)
    assert (cap.attrs["status"], cap.closed) == ("aborted", True)
    assert 0 < cap.num_steps < 800


def test_serving_goes_on_without_the_exporter_and_a_new_one_takes_over(
    server: Server, receiver: Receiver, server_store: Path
) -> None:
    before = exporter_of_store(server_store)
    os.kill(before, signal.SIGKILL)
    asked = set()
    deadline = time.monotonic() + RESTART_SECONDS
    while time.monotonic() < deadline:
        status, headers, answer = server.post("/v1/chat/completions", chat(max_tokens=4), {"Trace-Capture": "logits"})
        assert status == 200
        assert answer["choices"][0]["message"]["content"]
        asked.add(headers["trace-capture-ref"].split("/")[1])
        # The exporter naps: one of an earlier turn is closed by now.
        if any(entry.complete for entry in find_captures(server_store) if entry.span_id in asked):
            break
    else:
        raise AssertionError(
            f"no capture was complete again; the server's log ends with\n{server.log.read_text()[-4000:]}"
        )
    assert exporter_of_store(server_store) != before
