"""Keys, budgets and proxies on a real server: what a client gets, what the store and the spans say."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.integration.receiver import Receiver, attributes, spans_of
from tests.integration.runs import make_tokenized, prompt
from tests.integration.server import Server, server_environment
from tracer import open_capture, semconv

pytestmark = pytest.mark.engine

KEYS = """
[alice]
key = "geheim"
capture_mb_per_hour = 0.01
[bob]
key = "offen"
"""


SECRET = "quokkas like violets"


@dataclass(frozen=True, slots=True)
class Site:
    """A server with keys and content off, its store, and all that it ever sent."""

    server: Server
    store: Path
    receiver: Receiver

    def ask(self, prompt: Any, tokens: int = 10, **headers: str) -> tuple[int, dict[str, str], Any]:
        body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        given = {name.replace("_", "-"): text for name, text in headers.items()}
        return self.server.post("/v1/completions", {**body, "return_token_ids": True}, given)


@pytest.fixture(scope="module")
def site(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder, receiver = tmp_path_factory.mktemp("access"), Receiver()
    keys = folder / "keys.toml"
    keys.touch(mode=0o600)
    keys.write_text(KEYS)
    environment = server_environment(
        TENSORSPAN_STORE=str(folder / "store"), TENSORSPAN_CAPTURE="key", TENSORSPAN_KEYS_FILE=str(keys),
        TENSORSPAN_TRUSTED_PROXIES="127.0.0.1", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        OTEL_EXPORTER_OTLP_INSECURE="true", OTEL_METRIC_EXPORT_INTERVAL="1000",
    )  # fmt: skip
    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256")
    server = Server.vllm(make_tokenized("llama", models), folder / "log", environment, *options)
    yield Site(server, folder / "store", receiver)
    server.stop()
    receiver.stop()


def test_a_real_server_asks_for_keys_and_keeps_books(site: Site) -> None:
    numbers = prompt(40)
    status, _, problem = site.ask(numbers, Trace_Capture="logits")
    assert (status, "the header Trace-Capture-Key" in problem["detail"]) == (403, True)
    status, granted, _ = site.ask(
        numbers, Trace_Capture="logits", Trace_Capture_Key="geheim", X_Forwarded_For="203.0.113.9"
    )
    assert status == 200
    spans = site.receiver.trace(granted["traceresponse"].split("-")[1])
    [server_span] = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    audit = attributes(server_span)
    assert (audit["tensorspan.capture.key"], audit["tensorspan.capture.policy"]) == ("alice", "key")
    assert audit["client.address"] == "203.0.113.9"
    assert open_capture(site.store, granted["trace-capture-ref"]).attrs["owner"] == "alice"
    status, refused, problem = site.ask(numbers, Trace_Capture="logits", Trace_Capture_Key="geheim")
    assert (status, int(refused["retry-after"]) > 0) == (429, True), "10 rows of 512 logits are more than 10 kB"
    assert "capture_mb_per_hour of the key alice" in problem["detail"]
    assert site.ask(numbers, Trace_Capture="logits", Trace_Capture_Key="offen")[0] == 200
    assert site.ask(numbers)[0] == 200
    check_reading(site, [span for span in spans if span.name == "decode"][3])
    assert "geheim" not in site.server.log.read_text()


def check_reading(site: Site, step: Span) -> None:
    """The link that Jaeger makes of a step's span leads to that step, for who has a key."""
    url = f"{site.server.url}/tensorspan/open/{step.trace_id.hex()}/{step.span_id.hex()}"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=30)  # The host itself is a proxy here, that says for nobody.
    with urllib.request.urlopen(
        urllib.request.Request(url, headers={"Trace-Read-Key": "geheim"}), timeout=30
    ) as answer:
        facts = json.load(answer)
    assert facts["step"]["index"] == attributes(step)["tensorspan.step.index"]
    assert facts["step"]["logprob"] == pytest.approx(attributes(step)["tensorspan.token.logprob"], abs=1e-6)


def test_with_content_off_nothing_that_leaves_the_server_holds_prompt_or_answer(site: Site) -> None:
    """A search of every byte sent by OTLP (spans, metrics, logs) and shown on `/metrics`, and of every attribute."""
    status, headers, body = site.ask(SECRET, 12, Trace_Capture="logits, attention", Trace_Capture_Key="offen")
    assert status == 200
    site.receiver.trace(headers["traceresponse"].split("-")[1])
    site.receiver.await_true(lambda: "gen_ai.server.request.duration" in site.receiver.metrics())
    with urllib.request.urlopen(f"{site.server.url}/metrics", timeout=30) as answer:
        page = answer.read()
    requests = [*site.receiver.requests, *site.receiver.metric_requests, *site.receiver.log_requests]
    said = b"".join(request.SerializeToString() for request in requests) + page
    choice = body["choices"][0]
    for text in (SECRET, choice["text"].strip(), "geheim", "offen"):
        assert text.encode() not in said
    facts = [attributes(span) for span in spans_of(site.receiver.requests)]
    assert any("tensorspan.logits.topk.logprobs" in fact for fact in facts)
    assert not {semconv.CHOSEN_ID, semconv.TOPK_IDS, semconv.EXCEPTION_MESSAGE} & {
        name for fact in facts for name in fact
    }
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    lists = [value for fact in facts for value in fact.values() if isinstance(value, list)]
    assert not any(len(value) > 1 and value == ids[at : at + len(value)] for value in lists for at in range(len(ids)))
