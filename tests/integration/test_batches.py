"""Requests that share steps: each capture equals the same request alone, and the others have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cpus import EAGER_TOLERANCE
from tests.integration.models import make_model
from tests.integration.oracle import Oracle, oracle
from tests.integration.runs import Answer, Ask, flush, make_tokenized, opened, prompt, rows_of, run, runner_of, watched
from tracer.records import GenerationStart

pytestmark = pytest.mark.engine

TOLERANCE = EAGER_TOLERANCE
LOGITS_TOLERANCE = 1e-4
WHOLE = "logits;dtype=f32, attention;dtype=f32"
SCHEMA = {
    "type": "object",
    "properties": {"key": {"enum": ["red", "blue"]}, "room": {"enum": ["kitchen", "garage"]}},
    "required": ["key", "room"],
    "additionalProperties": False,
}


TOKENIZED: dict[str, Any] = {
    "skip_tokenizer_init": False,
    # A random model would write white space between the members until its budget ends.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


def eight() -> dict[str, Ask]:
    """Requests that differ in everything, by what is special about each."""
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(json=SCHEMA)
    schema = {"structured_outputs": grammar, "ignore_eos": False, "detokenize": True}
    penalties = {"repetition_penalty": 3.0, "presence_penalty": 2.0}
    sampled = {"temperature": 0.9, "seed": 5}
    return {
        "plain": Ask(prompt(70, 1), WHOLE, 12),
        "silent": Ask(prompt(33, 2), "", 16),
        "penalties": Ask(prompt(21, 3) * 2, WHOLE, 14, penalties),
        "schema": Ask(prompt(17, 4), WHOLE, 60, schema),
        "bias": Ask(prompt(5, 5), WHOLE, 9, {"logit_bias": {77: 100.0}}),
        "seed": Ask(prompt(29, 6), WHOLE, 11, sampled),
        "prompt map": Ask(prompt(50, 7), "attention;rows=all;dtype=f32, logits;dtype=f32", 7),
        "silent penalties": Ask(prompt(8, 8), "", 10, penalties),
    }


def same(together: Answer, alone: Answer) -> float:
    """The largest difference between two captures of the same request."""
    assert together.tokens == alone.tokens
    one, other = together.capture, alone.capture
    assert one is not None
    assert other is not None
    assert one.complete, one.missing
    assert [step.position for step in one.steps] == [step.position for step in other.steps]
    worst = float(np.abs(np.asarray(one.logits) - np.asarray(other.logits)).max())
    for layer in one.attention:
        pairs = zip(rows_of(one, layer), rows_of(other, layer), strict=True)
        worst = max(worst, *(float(np.abs(mine - theirs).max()) for mine, theirs in pairs))
    if "attention_prefill" in one.arrays:
        for layer in one.attention_prefill:
            difference = np.asarray(one.attention_prefill[layer]) - np.asarray(other.attention_prefill[layer])
            worst = max(worst, float(np.abs(difference).max()))
    return worst


def check_against(want: Oracle, ask: Ask, answer: Answer) -> None:
    """Raw logits and attention of the capture are eager's, whatever was done to the logits afterwards."""
    capture, last = answer.capture, len(ask.prompt) - 1
    assert capture is not None
    logits = np.asarray(capture.logits)
    np.testing.assert_allclose(logits, want.logits[last : last + len(logits)], rtol=0, atol=LOGITS_TOLERANCE)
    for layer in capture.attention:
        for step, row in enumerate(rows_of(capture, layer)):
            expected = want.attention[layer, :, last + step, : last + step + 1]
            np.testing.assert_allclose(row, expected, rtol=0, atol=TOLERANCE)


def argmax(answer: Answer) -> list[int]:
    assert answer.capture is not None
    tokens: list[int] = np.asarray(answer.capture.logits).argmax(axis=1).tolist()
    return tokens


def test_eight_requests_at_once_equal_each_alone(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    path, asks = make_tokenized("llama", models), eight()
    with offline(path, **TOKENIZED) as (llm, _):
        together = dict(zip(asks, run(llm, store, list(asks.values())), strict=True))
        alone = {name: run(llm, store, [ask])[0] for name, ask in asks.items()}
    for name, ask in asks.items():
        if ask.capture:
            assert same(together[name], alone[name]) <= TOLERANCE, name
            check_against(oracle(path, ask.prompt + together[name].tokens), ask, together[name])
        else:
            assert together[name].capture is None
            assert together[name].tokens == alone[name].tokens
    for name in ("plain", "prompt map"):
        assert argmax(together[name]) == together[name].tokens
    for name in ("penalties", "schema", "bias", "seed"):
        assert argmax(together[name]) != together[name].tokens, f"{name} changed nothing: the test shows nothing"
    assert set(together["bias"].tokens) == {77}
    assert set(json.loads(together["schema"].text)) == {"key", "room"}


def test_an_aborted_request_keeps_what_it_had(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    from vllm import SamplingParams

    asks = {"aborted": Ask(prompt(30, 1), WHOLE), "other": Ask(prompt(40, 2), WHOLE, 16)}
    extra = {"trace_capture": WHOLE}
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=16, extra_args=extra)
    tokens: dict[str, list[int]] = {}
    with offline(make_model("llama", models)) as (llm, _):
        engine = llm.llm_engine
        with watched() as sent:
            for name, ask in asks.items():
                engine.add_request(name, {"prompt_token_ids": ask.prompt}, params)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
                if len(tokens.get("aborted", ())) == 6:
                    engine.abort_request(["aborted"])
            flush(sent)
        alone = dict(zip(asks, run(llm, store, list(asks.values())), strict=True))
    starts = [record for record in sent if isinstance(record, GenerationStart)]
    aborted, other = (opened(store, start) for start in starts)
    assert aborted is not None
    assert other is not None
    assert len(tokens["aborted"]) == 6
    assert aborted.attrs["status"] == "aborted"
    assert aborted.complete, aborted.missing
    assert [token.id for token in aborted.tokens] == asks["aborted"].prompt + tokens["aborted"]
    whole = alone["aborted"].capture
    assert whole is not None
    np.testing.assert_allclose(np.asarray(aborted.logits), np.asarray(whole.logits)[:6], rtol=0, atol=TOLERANCE)
    assert same(Answer(tokens["other"], "", starts[1], other), alone["other"]) <= TOLERANCE


def test_capture_changes_no_token(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    path = make_tokenized("qwen3", models)
    text = {"detokenize": True}
    plain = [Ask(prompt(length, length), "", 24, text) for length in (3, 40, 71)]
    captured = [Ask(ask.prompt, WHOLE + ", summary", 24, text) for ask in plain]
    with offline(path, **TOKENIZED) as (llm, _):
        without, with_capture = run(llm, store, plain), run(llm, store, captured)
    assert [answer.tokens for answer in with_capture] == [answer.tokens for answer in without]
    assert [answer.text for answer in with_capture] == [answer.text for answer in without]
    for answer in with_capture:
        assert answer.capture is not None
        assert answer.text, "no text was compared"
        # vLLM keeps back a character whose last bytes have not come.
        assert answer.capture.text is not None
        assert answer.capture.text.rstrip("\ufffd") == answer.text.rstrip("\ufffd")


def test_three_choices_are_three_captures(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        n=3, temperature=1.0, seed=9, max_tokens=6, ignore_eos=True, detokenize=False,
        extra_args={"trace_capture": WHOLE},
    )  # fmt: skip
    path, tokens = make_model("llama", models), prompt(20, 4)
    with offline(path) as (llm, _), watched() as sent:
        [output] = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        flush(sent)
    starts = {record.choice: record for record in sent if isinstance(record, GenerationStart)}
    choices = {choice.index: list(choice.token_ids) for choice in output.outputs}
    assert sorted(starts) == sorted(choices) == [0, 1, 2]
    assert len({start.span_id for start in starts.values()}) == 3
    assert len({tuple(answer) for answer in choices.values()}) == 3, "the choices do not differ: the test shows nothing"
    for index, start in starts.items():
        capture = opened(store, start)
        assert capture is not None
        assert capture.complete, capture.missing
        assert capture.attrs["choice"] == index
        assert [token.id for token in capture.tokens] == tokens + choices[index]
        answer = Answer(choices[index], "", start, capture)
        check_against(oracle(path, tokens + choices[index]), Ask(tokens), answer)


class Sampler:
    """What the model's head gave and what the sampler got, step by step, of one engine."""

    def __init__(self, runner: Any) -> None:
        self.raw: list[torch.Tensor] = []
        self.sampled: list[torch.Tensor] = []
        compute, sample = runner.model.compute_logits, runner._sample

        def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits: torch.Tensor = compute(*args, **kwargs)
            self.raw.append(logits.clone())
            return logits

        def _sample(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sampled.append(logits.clone())
            return sample(logits, *args, **kwargs)

        runner.model.compute_logits = compute_logits
        runner._sample = _sample


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "f32"), ("bfloat16", "f16")])
def test_logits_are_the_samplers_bit_for_bit(
    dtype: str, stored: str, models: Path, store: Path, offline: Callable[..., Any]
) -> None:
    ask = Ask(prompt(31, 3), f"logits;dtype={stored}", 16, {"presence_penalty": 2.0, "repetition_penalty": 2.0})
    with offline(make_model("llama", models), dtype=dtype) as (llm, _):
        seen = Sampler(runner_of(llm))
        [answer] = run(llm, store, [ask])
    assert answer.capture is not None
    logits = np.asarray(answer.capture.logits)
    assert str(logits.dtype) == {"f32": "float32", "f16": "float16"}[stored]
    for step, row in enumerate(logits):
        assert str(seen.raw[step].dtype) == f"torch.{dtype}"
        for tensor in (seen.raw[step], seen.sampled[step]):
            bits = tensor[0].float().numpy().view(np.uint32)
            np.testing.assert_array_equal(row.astype(np.float32).view(np.uint32), bits, strict=True)
    assert len(logits) == len(seen.sampled) == 16


def test_logits_are_from_before_the_grammar(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    ask = eight()["schema"]
    with offline(make_tokenized("llama", models), **TOKENIZED) as (llm, _):
        seen = Sampler(runner_of(llm))
        [answer] = run(llm, store, [ask])
    assert answer.capture is not None
    for step, row in enumerate(np.asarray(answer.capture.logits)):
        np.testing.assert_array_equal(row, seen.raw[step][0].numpy(), strict=True)
        assert np.isfinite(row).all()
        assert bool(torch.isinf(seen.sampled[step][0]).any()), "the grammar masked nothing: the test shows nothing"
    assert json.loads(answer.text)
