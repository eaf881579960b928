"""Engine features that change what a request is: adapters, beams, log-probabilities, fewer bits, sleep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cpus import AVX512
from tests.integration.comparing import DECODE, LOGITS_TOLERANCE, TOLERANCE, WHOLE, Inputs, check
from tests.integration.feature_models import int8_oracle, make_adapter, make_merged, make_quantised
from tests.integration.models import make_model
from tests.integration.oracle import Oracle, oracle
from tests.integration.runs import Ask, flush, make_tokenized, opened, prompt, run, runner_of, spans_of, watched
from tracer.errors import CaptureRequestError
from tracer.records import GenerationStart, StepRecord

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, Any]]:
    """The tokenized engine of several tests of this file, and what ends it."""
    out: dict[str, Any] = {}
    yield out
    if out:
        out["context"].__exit__(None, None, None)


@pytest.fixture
def engine(running: dict[str, Any], models: Path, offline: Callable[..., Any]) -> Any:
    """A tiny Llama with a tokenizer; prompts over 32 tokens are prefilled in chunks."""
    if not running:
        path = make_tokenized("llama", models)
        options = {"skip_tokenizer_init": False, "max_num_batched_tokens": 32, "max_num_seqs": 8}
        running["context"] = offline(path, **options, enable_prompt_embeds=True)
        running["llm"], running["record"] = running["context"].__enter__()
    return running["llm"]


def test_an_adapters_capture_is_that_of_the_merged_weights(
    models: Path, store: Path, offline: Callable[..., Any]
) -> None:
    from vllm.lora.request import LoRARequest

    base = make_model("llama", models)
    adapters = [make_adapter(base, models, seed) for seed in (1, 2)]
    requests = [LoRARequest(f"adapter-{i}", i + 1, str(path)) for i, path in enumerate(adapters)]
    asks = [Ask(prompt(40, seed), WHOLE, 10) for seed in range(3)] + [Ask(prompt(25, 9), "", 12)]
    # The CPU's LoRA kernels take "no adapter" for the last slot: one more than there are adapters stays empty.
    with offline(base, enable_lora=True, max_lora_rank=8, max_loras=3) as (llm, _), watched() as sent:
        answers = run(llm, store, asks, lora_request=[None, *requests, requests[0]])
    weights = [base, *(make_merged(base, path) for path in adapters)]
    for ask, answer, path in zip(asks, answers, weights, strict=False):
        check(answer.capture, 40, oracle(path, ask.prompt + answer.tokens))
    shared = [r for r in sent if isinstance(r, StepRecord) and r.span_id == answers[1].start.span_id]
    assert {record.batch_requests for record in shared} == {4}, "the requests did not share their steps"
    assert [answer.start.model for answer in answers] == [str(base), "adapter-0", "adapter-1", "adapter-0"]
    assert answers[1].capture is not None
    assert answers[1].capture.attrs["model"] == "adapter-0"
    assert answers[1].capture.attrs["engine"]["model"] == str(base)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(answers[1].capture, 40, oracle(base, asks[1].prompt + answers[1].tokens))


def test_log_probabilities_of_prompt_and_answer_are_not_mixed_up(engine: Any, models: Path, store: Path) -> None:
    path = make_model("llama", models)
    scored = {"prompt_logprobs": 4, "logprobs": 4}
    asks = [Ask(prompt(70, 1), WHOLE, 9, scored), Ask(prompt(50, 2), WHOLE, 9), Ask(prompt(61, 3), "", 9, scored)]
    with watched() as sent:
        outputs = engine.generate([{"prompt_token_ids": ask.prompt} for ask in asks], params_of(asks), use_tqdm=False)
    flush(sent)
    starts = [record for record in sent if isinstance(record, GenerationStart)]
    for ask, output, start in zip(asks, outputs, starts, strict=True):
        tokens, length = list(output.outputs[0].token_ids), len(ask.prompt)
        want = oracle(path, ask.prompt + tokens)
        if ask.capture:
            check(opened(store, start), length, want)
        if ask.params:
            given = [None, *(entry[ask.prompt[at]].logprob for at, entry in enumerate(output.prompt_logprobs) if at)]
            given += [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
            logs = torch.log_softmax(torch.from_numpy(want.logits), dim=-1).numpy()
            expected = logs[np.arange(length + 8), (ask.prompt + tokens)[1:]]
            np.testing.assert_allclose(given[1:], expected, rtol=0, atol=LOGITS_TOLERANCE)


def params_of(asks: Sequence[Ask]) -> list[Any]:
    from vllm import SamplingParams

    common: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    return [
        SamplingParams(
            **common, max_tokens=ask.max_tokens, **ask.params,
            extra_args={"trace_capture": ask.capture} if ask.capture else None,
        )
        for ask in asks
    ]  # fmt: skip


def test_beam_search_is_one_trace_and_no_capture(engine: Any, running: dict[str, Any], store: Path) -> None:
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt(20)}]
    words = r"beam search cannot be captured: .* LLM\.generate with n"
    with pytest.raises(CaptureRequestError, match=words), running["record"](DECODE):
        engine.beam_search(inputs, params)
    assert not engine.llm_engine.has_unfinished_requests()
    with watched() as sent:
        [output] = engine.beam_search(inputs, params)
    assert [len(beam.tokens) for beam in output.sequences] == [24] * 3
    flush(sent)
    starts = [record for record in sent if isinstance(record, GenerationStart)]
    assert [start.prompt_tokens for start in starts] == [20] + [21] * 3 + [22] * 3 + [23] * 3
    assert len({start.trace_id for start in starts}) == 1
    assert not (store / starts[0].trace_id).exists()
    names = [span["name"] for span in spans_of(store, starts[0].trace_id)]
    assert names.count(f"text_completion {starts[0].model}") == 10


def test_a_prompt_of_embeddings_is_traced_and_not_captured(engine: Any, running: dict[str, Any], store: Path) -> None:
    inputs = [{"prompt_embeds": torch.randn(11, 128)}]
    [params] = params_of([Ask([], "", 5)])
    words = "a prompt of embeddings cannot be captured"
    with pytest.raises(CaptureRequestError, match=words), running["record"](DECODE):
        engine.generate(inputs, params, use_tqdm=False)
    assert not engine.llm_engine.has_unfinished_requests()
    with watched() as sent:
        engine.generate(inputs, params, use_tqdm=False)
    flush(sent)
    [start] = [record for record in sent if isinstance(record, GenerationStart)]
    assert start.prompt_tokens == 11
    names = [span["name"] for span in spans_of(store, start.trace_id)]
    assert sorted(names) == sorted([f"{start.operation} {start.model}", "prefill", *["decode"] * 4])


def test_sleep_and_wake_up_change_nothing_in_a_capture(engine: Any, models: Path, store: Path) -> None:
    ask = Ask(prompt(40, 4), WHOLE)
    [before] = run(engine, store, [ask])
    engine.sleep(level=1)
    engine.wake_up()
    [after] = run(engine, store, [ask])
    assert before.tokens == after.tokens
    check(after.capture, 40, oracle(make_model("llama", models), ask.prompt + after.tokens))


@pytest.mark.parametrize(("bits", "dtype", "first"), [(8, "float32", TOLERANCE), (4, "bfloat16", 0.03)])
def test_quantised_weights(
    bits: int, dtype: str, first: float, models: Path, store: Path, offline: Callable[..., Any]
) -> None:
    path, plain = make_quantised(bits, models)
    ask = Ask(prompt(40, 5), WHOLE, 8)
    with offline(path, dtype=dtype) as (llm, _):
        if bits == 4 and not AVX512:
            with pytest.raises(AttributeError, match="cpu_gemm_wna16"):
                run(llm, store, [ask])
            return
        given = Inputs(llm)
        [answer] = run(llm, store, [ask])
    tokens = ask.prompt + answer.tokens
    capture = answer.capture
    assert capture is not None
    # From what the layers were given, by definition, in float64: rows and maps are those of this very engine.
    maps = np.pad(given.attention(), ((0, 0), (0, 0), (0, 1), (0, 1)))
    assert maps.shape[2] == len(tokens)
    check(capture, 40, Oracle(maps, np.pad(np.asarray(capture.logits), ((39, 1), (0, 0)))))
    if not AVX512:
        return  # Its int8 products saturate: the engine itself is far from the checkpoint.
    # And the weights are the checkpoint's. After the first layer another rounding of one number is another number.
    if bits == 8:
        with torch.no_grad():
            out = int8_oracle(plain)(torch.tensor([tokens]), output_attentions=True, use_cache=False)
        want = Oracle(np.stack([layer[0].numpy() for layer in out.attentions]), out.logits[0].numpy())
    else:
        want = oracle(plain, tokens)
    got = np.stack([np.asarray(capture.attention_prefill[layer])[..., :40] for layer in range(3)])
    apart = np.abs(got - want.attention[..., :40, :40])
    assert apart[0].max() <= first
    assert apart.max() <= 0.15
    assert np.abs(np.asarray(capture.logits) - want.logits[39:-1]).max() <= 0.5


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_windows_that_give_blocks_back(family: str, models: Path, store: Path, offline: Callable[..., Any]) -> None:
    path = make_model(family, models)
    asks = [Ask(prompt(150 + seed, seed), WHOLE if seed % 2 else DECODE + ", qk", 60) for seed in range(4)]
    options = {"num_gpu_blocks_override": 65, "block_size": 32, "disable_hybrid_kv_cache_manager": False}
    with offline(path, **options, max_num_batched_tokens=64, max_num_seqs=4) as (llm, _), watched() as sent:
        groups = runner_of(llm).kv_cache_config.kv_cache_groups
        answers = run(llm, store, asks)
    assert len({group.kv_cache_spec for group in groups}) == 2
    # Without blocks that windows gave back, the four would not fit: some would have been preempted.
    assert 4 * 7 * len(groups) > 64
    assert {record.attempt for record in sent if isinstance(record, StepRecord)} == {1}
    for ask, answer in zip(asks, answers, strict=True):
        want = oracle(path, ask.prompt + answer.tokens)
        check(answer.capture, len(ask.prompt), want)
        assert answer.capture is not None
        for layer in answer.capture.qk if "qk" in ask.capture else ():
            rebuilt, stored = np.asarray(answer.capture.qk[layer]), np.asarray(answer.capture.attention[layer])
            np.testing.assert_allclose(rebuilt, stored, rtol=0, atol=TOLERANCE)
