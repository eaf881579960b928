"""Eight requests at once: each capture equals the same request alone, and nobody else gets one."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.integration.receiver import Receiver
from tests.integration.server import Server
from tracer import Capture, open_capture

pytestmark = pytest.mark.engine

ATTENTION_BOUND, LOGITS_BOUND = 1e-5, 2e-4
"""Float32 sums in another order: the engine's matrix kernels split the batch differently with eight requests."""
WHOLE = "logits;dtype=f32, attention;dtype=f32"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["city", "size"],
}


def ask(text: str, **extra: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 12, **extra}


CAPTURED = {
    "short": ask("Name three primary colors."),
    "long": ask("The red key is in the kitchen and the blue key is in the garage. " * 6 + "Where is the blue key?"),
    "schema": ask(
        "Describe Paris as JSON.",
        max_tokens=24,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
    ),
    "penalties": ask("Repeat the word echo five times.", repetition_penalty=1.3, presence_penalty=0.5),
}
PLAIN = {
    "uncaptured": ask("What is the capital of France?", max_tokens=16),
    "uncaptured too": ask("List four animals.", max_tokens=20),
    "sampled": ask("Tell a joke.", temperature=1.0),
}


def captured(server: Server, receiver: Receiver, store: Path, body: dict[str, Any]) -> tuple[Capture, str]:
    status, headers, answer = server.post("/v1/chat/completions", body, {"Trace-Capture": WHOLE})
    assert status == 200, answer
    trace_id, span_id = headers["trace-capture-ref"].split("/")
    receiver.trace(trace_id, lambda spans: any(span.span_id.hex() == span_id for span in spans))
    return open_capture(store, span_id), answer["choices"][0]["message"]["content"]


def plain(server: Server, body: dict[str, Any]) -> tuple[dict[str, str], str]:
    status, headers, answer = server.post("/v1/chat/completions", body)
    assert status == 200
    return headers, answer["choices"][0]["message"]["content"]


def abandon(server: Server) -> str:
    """A captured stream that its client leaves after a few tokens; its reference."""
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    raw = client.chat.completions.with_raw_response.create(
        **ask("Count to one thousand.", stream=True, max_tokens=600),
        extra_body={"ignore_eos": True},
        extra_headers={"Trace-Capture": WHOLE},
    )
    stream = raw.parse()
    for _, _chunk in zip(range(4), stream, strict=False):
        pass
    stream.close()
    return str(raw.headers["trace-capture-ref"])


def test_eight_at_once_equal_each_alone(server: Server, receiver: Receiver, server_store: Path) -> None:
    alone = {name: captured(server, receiver, server_store, body) for name, body in CAPTURED.items()}
    quiet = {name: plain(server, body)[1] for name, body in PLAIN.items()}
    with ThreadPoolExecutor(8) as pool:
        left = pool.submit(abandon, server)
        together = {
            name: pool.submit(captured, server, receiver, server_store, body) for name, body in CAPTURED.items()
        }
        others = {name: pool.submit(plain, server, body) for name, body in PLAIN.items()}
        for name, future in together.items():
            compare(name, alone[name], future.result())
        for name, other in others.items():
            headers, text = other.result()
            assert headers["trace-capture-status"] == "off"
            assert not (server_store / headers["traceresponse"].split("-")[1]).exists()
            assert name == "sampled" or text == quiet[name]
        trace_id, span_id = left.result().split("/")
    receiver.trace(trace_id, lambda spans: any(span.span_id.hex() == span_id for span in spans))
    assert open_capture(server_store, span_id).attrs["status"] == "aborted"


def compare(name: str, alone: tuple[Capture, str], together: tuple[Capture, str]) -> None:
    (first, text), (second, same_text) = alone, together
    assert text == same_text, name
    assert [token.id for token in first.tokens] == [token.id for token in second.tokens], name
    assert first.complete, first.missing
    assert second.complete, second.missing
    np.testing.assert_allclose(np.asarray(second.logits), np.asarray(first.logits), rtol=0, atol=LOGITS_BOUND)
    for layer in first.attention:
        np.testing.assert_allclose(
            np.asarray(second.attention[layer]), np.asarray(first.attention[layer]), rtol=0, atol=ATTENTION_BOUND
        )


def test_logits_are_from_before_grammar_and_penalties(server: Server, receiver: Receiver, server_store: Path) -> None:
    cap, text = captured(server, receiver, server_store, CAPTURED["schema"])
    json.loads(text)
    logits = np.asarray(cap.logits)
    assert np.isfinite(logits).all(), "a grammar mask is -inf"
    chosen = [token.id for token in cap.tokens[cap.prompt_tokens :]]
    assert logits.argmax(axis=1).tolist() != chosen, "the grammar must have changed something"
    free, _ = captured(server, receiver, server_store, ask("Describe Paris as JSON.", max_tokens=1))
    np.testing.assert_allclose(logits[0], np.asarray(free.logits)[0], rtol=0, atol=LOGITS_BOUND)
