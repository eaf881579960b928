"""What the scheduler does to a request: chunks, cache hits, preemption. The capture is eager's all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cpus import EAGER_TOLERANCE
from tests.integration.models import make_model
from tests.integration.oracle import oracle
from tests.integration.runs import Answer, Ask, prompt, rows_of, run, spans_of, watched
from tracer.records import StepRecord

pytestmark = pytest.mark.engine

TOLERANCE = EAGER_TOLERANCE
LOGITS_TOLERANCE = 1e-4
DECODE = "logits;dtype=f32, attention;dtype=f32, qk"
WHOLE = "logits;dtype=f32, attention;rows=all;dtype=f32, qk;rows=all"
BLOCK = 32
"""Tokens per block: the least that the CPU engine prefers."""


def check(path: Path, ask: Ask, answer: Answer) -> None:
    """Every row of the capture is eager's, at its position, once."""
    capture, tokens = answer.capture, ask.prompt + answer.tokens
    assert capture is not None
    assert capture.complete, capture.missing
    assert [token.id for token in capture.tokens] == tokens
    length, steps = len(ask.prompt), len(answer.tokens)
    assert [step.position for step in capture.steps] == list(range(length - 1, length - 1 + steps))
    assert [step.kv_len for step in capture.steps] == list(range(length, length + steps))
    want = oracle(path, tokens)
    logits = np.asarray(capture.logits)
    assert logits.argmax(axis=1).tolist() == answer.tokens
    np.testing.assert_allclose(logits, want.logits[length - 1 : length - 1 + steps], rtol=0, atol=LOGITS_TOLERANCE)
    for layer in capture.attention:
        stored = np.asarray(capture.attention[layer])
        np.testing.assert_allclose(np.asarray(capture.qk[layer]), stored, rtol=0, atol=TOLERANCE)
        for step, row in enumerate(rows_of(capture, layer)):
            expected = want.attention[layer, :, length - 1 + step, : length + step]
            np.testing.assert_allclose(row, expected, rtol=0, atol=TOLERANCE)
        if "rows=all" in ask.capture:
            got = np.asarray(capture.attention_prefill[layer])[..., :length]
            np.testing.assert_allclose(got, want.attention[layer, :, :length, :length], rtol=0, atol=TOLERANCE)
            rebuilt = np.asarray(capture.qk_prefill[layer])
            np.testing.assert_allclose(rebuilt, want.attention[layer, :, :length, :length], rtol=0, atol=TOLERANCE)


def chunks_of(sent: list[Any], answer: Answer) -> list[StepRecord]:
    """Step records of a generation that computed rows of the prompt."""
    mine = [r for r in sent if isinstance(r, StepRecord) and r.span_id == answer.start.span_id]
    return [record for record in mine if record.phase == "prefill"]


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mistral", "gemma2"])
@pytest.mark.parametrize("budget", [16, 24])
def test_chunked_prefill(family: str, budget: int, models: Path, store: Path, offline: Callable[..., Any]) -> None:
    path, ask = make_model(family, models), Ask(prompt(70, budget), WHOLE, 6)
    with offline(path, max_num_batched_tokens=budget, max_num_seqs=4) as (llm, _), watched() as sent:
        [answer] = run(llm, store, [ask])
    check(path, ask, answer)
    chunks = chunks_of(sent, answer)
    whole, rest = divmod(70, budget)
    assert [chunk.tokens for chunk in chunks] == [budget] * whole + [rest]
    assert [chunk.position + 1 for chunk in chunks] == [budget * (i + 1) for i in range(whole)] + [70]
    assert [chunk.step for chunk in chunks] == [None] * whole + [0]
    spans = spans_of(store, answer.start.trace_id)
    names = [span["name"] for span in sorted(spans, key=lambda span: int(span["startTimeUnixNano"]))]
    assert names.count("prefill") == len(chunks), names
    assert names.count("decode") == 5, names
    assert len({span["spanId"] for span in spans}) == len(spans) == len(chunks) + 5 + 1


def test_chunks_among_decodes(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    path = make_model("qwen3", models)
    asks = [
        Ask(prompt(6, 1), WHOLE, 20),
        Ask(prompt(9, 2), "", 20),
        Ask(prompt(70, 3), WHOLE, 8),
        Ask(prompt(45, 4), DECODE, 8),
    ]
    with offline(path, max_num_batched_tokens=24, max_num_seqs=4) as (llm, _), watched() as sent:
        answers = run(llm, store, asks)
    for ask, answer in zip(asks, answers, strict=True):
        if ask.capture:
            check(path, ask, answer)
    chunks = chunks_of(sent, answers[2])
    assert len(chunks) > 2
    assert any(chunk.batch_requests > 1 for chunk in chunks), "no chunk shared its step with a decode"
    assert sum(chunk.tokens for chunk in chunks) == 70


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_prefix_cache_hit(family: str, models: Path, store: Path, offline: Callable[..., Any]) -> None:
    path, tokens = make_model(family, models), prompt(70)
    options = {"enable_prefix_caching": True, "block_size": BLOCK}
    asks = [Ask(tokens, what, 6) for what in (DECODE, DECODE, WHOLE, DECODE)]
    with offline(path, **options) as (llm, _):
        answers = [run(llm, store, [ask])[0] for ask in asks]
    for ask, answer in zip(asks, answers, strict=True):
        check(path, ask, answer)
    cached = [answer.capture.attrs["cached_tokens"] for answer in answers if answer.capture]
    assert cached == [0, 64, 0, 64]


@pytest.mark.parametrize(("family", "caching"), [("llama", False), ("llama", True), ("gemma2", False)])
def test_preemption(family: str, caching: bool, models: Path, store: Path, offline: Callable[..., Any]) -> None:
    path = make_model(family, models)
    asks = [Ask(prompt(60, seed), WHOLE if seed % 2 else DECODE, 60) for seed in range(4)]
    options = {
        "num_gpu_blocks_override": 9 if family == "llama" else 18, "block_size": BLOCK, "max_model_len": 128,
        "max_num_seqs": 4, "enable_prefix_caching": caching,
    }  # fmt: skip
    with offline(path, **options) as (llm, _), watched() as sent:
        answers = run(llm, store, asks)
    for ask, answer in zip(asks, answers, strict=True):
        check(path, ask, answer)
    attempts = [max(step.attempt for step in answer.capture.steps) for answer in answers if answer.capture]
    assert max(attempts) > 1, "nothing was preempted: the test shows nothing"
    for answer in answers:
        mine = [r for r in sent if isinstance(r, StepRecord) and r.span_id == answer.start.span_id]
        assert len({record.step_span_id for record in mine}) == len(mine)
        sampled = [record.step for record in mine if record.step is not None]
        assert sampled == list(range(60)), "a step twice, or none"
        order = [record.attempt for record in mine]
        assert order == sorted(order)
        assert set(order) == set(range(1, order[-1] + 1))
