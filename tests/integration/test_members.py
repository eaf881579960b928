"""Prompt logits, hidden states and choices of experts: Transformers' on the same weights and tokens, row by row."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.cpus import EAGER_TOLERANCE
from tests.integration.models import VOCAB, _common, make_model
from tests.integration.runs import Ask, prompt, run, run_script
from tracer import Capture, config, open_capture
from tracer.config import Settings
from tracer.errors import CaptureRequestError, CaptureUnavailableError
from tracer.export import engine_infos
from tracer.worker import points

pytestmark = pytest.mark.engine

TOLERANCE = EAGER_TOLERANCE
WHOLE = "prompt_logits;dtype=f32, hidden_states;rows=all, logits;dtype=f32"
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 32, "max_num_seqs": 8}
SHARED = ("llama", "qwen3", "gemma2", "gpt_oss", "mistral", "opt", "bloom")
"""Families of tests/integration/models.py; others are made here."""
COMPILED = {"llama"}
"""Mixtral is compiled in tests of its own."""


def _gemma3() -> Any:
    return transformers.Gemma3TextConfig(**_common(sliding_window=24, query_pre_attn_scalar=24))


def _moe(**extra: Any) -> dict[str, Any]:
    return _common(num_experts_per_tok=2, **extra)


OTHERS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**_moe(num_local_experts=4)),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_moe(num_experts=6, moe_intermediate_size=64, norm_topk_prob=False)
    ),
    "gemma3": _gemma3,
    "qwen2": lambda: transformers.Qwen2Config(**_common()),
    "granite": lambda: transformers.GraniteConfig(**_common(residual_multiplier=0.5, embedding_multiplier=3.0)),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=128, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
    ),
}
MIXTURES = ("gpt_oss", "mixtral", "qwen3_moe")


def make(family: str, root: Path) -> Path:
    """A tiny random checkpoint of that family."""
    if family in SHARED:
        return make_model(family, root)
    path = root / f"members-{family}"
    if not path.exists():
        torch.manual_seed(11)
        model = transformers.AutoModelForCausalLM.from_config(OTHERS[family](), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, 0.08)
        model.save_pretrained(path)
    return path


@dataclass
class Reference:
    """One eager forward pass of Transformers over prompt and answer, watched from outside."""

    logits: Any
    """float32 [position, vocab]."""
    streams: list[Any] = field(default_factory=list)
    """[position, hidden]: what the first layer read, then what each layer returned."""
    experts: list[tuple[Any, Any]] = field(default_factory=list)
    """Per router the experts and weights [position, k], the heaviest first."""


def reference(path: Path, tokens: list[int]) -> Reference:
    """Transformers' last hidden state is from after the final norm, so its layers are watched instead."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    out = Reference(None)

    def keep(value: Any) -> None:
        out.streams.append((value[0] if isinstance(value, tuple) else value)[0].numpy().copy())

    def chosen(_module: Any, _args: Any, output: Any) -> None:
        out.experts.append((output[2].numpy().copy(), output[1].numpy().copy()))

    for name, module in model.named_modules():
        if type(module).__name__ == "BloomGelu":
            module.forward = torch.nn.functional.gelu
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(chosen)
        if re.search(r"(^|\.)(layers|h)\.\d+$", name):
            if name.endswith(".0"):
                module.register_forward_pre_hook(
                    lambda _, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
                )
            module.register_forward_hook(lambda _module, _args, output: keep(output))
    with torch.no_grad():
        out.logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    return out


def close(got: Any, wanted: Any, where: str) -> None:
    """Within 1e-5 of the largest value, or of 1."""
    got = np.asarray(got)
    assert got.shape == wanted.shape, where
    scale = max(1.0, float(np.abs(wanted).max()))
    assert float(np.abs(got - wanted).max()) <= TOLERANCE * scale, where


def check(cap: Capture | None, path: Path, ask: Ask, answer: list[int]) -> None:
    """Everything that `ask` asked for is Transformers'."""
    assert cap is not None
    assert cap.complete, cap.missing
    want, last, steps = reference(path, ask.prompt + answer), len(ask.prompt) - 1, len(answer)
    asked = cap.attrs["capture"]
    if asked["prompt_logits"] and last:
        close(cap.prompt_logits, want.logits[:last], "prompt_logits")
    if asked["hidden_states"]:
        indices = asked["hidden_states"]["layers"] or range(len(want.streams))
        assert list(cap.hidden_states) == list(indices)
        for index in indices:
            close(cap.hidden_states[index], want.streams[index][last : last + steps], f"stream {index}")
            if asked["hidden_states"]["rows"] == "all":
                close(cap.hidden_states_prompt[index], want.streams[index][:last], f"stream {index} of the prompt")
    if asked["router"]:
        layers = asked["router"]["layers"] or range(len(want.experts))
        assert list(cap.router_expert) == list(layers)
        for layer in layers:
            experts, weights = want.experts[layer]
            np.testing.assert_array_equal(np.asarray(cap.router_expert[layer]), experts[last : last + steps])
            close(cap.router_weight[layer], weights[last : last + steps], f"weights of layer {layer}")
            if asked["router"]["rows"] == "all":
                np.testing.assert_array_equal(np.asarray(cap.router_expert_prompt[layer]), experts[:last])
                close(cap.router_weight_prompt[layer], weights[:last], f"weights of layer {layer}, prompt")


@pytest.mark.parametrize("family", [*SHARED, *OTHERS])
def test_every_row_is_transformers(
    family: str, models: Path, store: Path, offline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, compiled = make(family, models), family in COMPILED
    monkeypatch.setattr(Settings, "tapped", ("hidden_states", "router") if compiled else ())
    ask = Ask(prompt(70), WHOLE + (", router;rows=all" if family in MIXTURES else ""), 6)
    with offline(path, enforce_eager=not compiled, **CHUNKED) as (llm, _):
        [info] = engine_infos(config.load())
        assert info.members.hidden_states_unsupported is None
        [answer] = run(llm, store, [ask])
    check(answer.capture, path, ask, answer.tokens)
    assert answer.capture is not None
    assert [layer.index for layer in info.members.routers] == ([0, 1, 2] if family in MIXTURES else [])
    first = np.asarray(answer.capture.logits)[0]
    assert np.abs(np.asarray(answer.capture.prompt_logits)).max() > 0.1
    assert first.argmax() == answer.tokens[0]


def test_requests_of_one_batch_get_their_own_layers_and_rows(
    models: Path, store: Path, offline: Callable[..., Any]
) -> None:
    path = make("mixtral", models)
    asks = [
        Ask(prompt(41, 1), "hidden_states=(1 3), router=(2);rows=all, logits", 9),
        Ask(prompt(7, 2), "", 12),
        Ask(prompt(66, 3), "prompt_logits;dtype=f32, hidden_states=(0);rows=all;dtype=f32", 5),
        Ask(prompt(1, 4), "router, prompt_logits;dtype=f32", 6),
        Ask(prompt(20, 5), "logits, attention", 8),
    ]
    with offline(path, **CHUNKED) as (llm, _):
        answers = run(llm, store, asks)
    for ask, answer in zip(asks, answers, strict=True):
        if "=" in ask.capture or "router" in ask.capture:
            check(answer.capture, path, ask, answer.tokens)
    assert answers[4].capture is not None
    assert not set(answers[4].capture.arrays) & {"hidden_states", "router_expert"}


def test_a_cached_prompt_is_computed_again_only_if_its_rows_are_wanted(
    models: Path, store: Path, offline: Callable[..., Any]
) -> None:
    path, tokens = make("llama", models), prompt(70)
    texts = ("hidden_states", "hidden_states", "hidden_states;rows=all", "prompt_logits;dtype=f32", "hidden_states")
    asks = [Ask(tokens, text, 6) for text in texts]
    with offline(path, enable_prefix_caching=True, block_size=32) as (llm, _):
        answers = [run(llm, store, [ask])[0] for ask in asks]
        [few] = run(llm, store, [Ask(tokens, "prompt_logits;top=5;dtype=f32", 2)])
    for ask, answer in zip(asks, answers, strict=True):
        check(answer.capture, path, ask, answer.tokens)
    assert [answer.capture.attrs["cached_tokens"] for answer in answers if answer.capture] == [0, 64, 0, 0, 64]
    whole, best = answers[3].capture, few.capture
    assert whole is not None
    assert best is not None
    rows, data = np.asarray(whole.prompt_logits), best.to_xarray()
    np.testing.assert_array_equal(np.sort(rows, axis=1)[:, :-6:-1], np.asarray(data["prompt_logits_topk"]))
    np.testing.assert_array_equal(rows.argmax(axis=1), np.asarray(data["prompt_logits_topk_id"])[:, 0])


def test_preempted_requests_have_every_row_once(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    path = make("mixtral", models)
    asks = [Ask(prompt(60, seed), f"{WHOLE}, router;rows=all" if seed % 2 else "hidden_states, router", 60) for seed in range(4)]  # noqa: E501  # fmt: skip
    options = {"num_gpu_blocks_override": 9, "block_size": 32, "max_model_len": 128, "max_num_seqs": 4}
    with offline(path, **options) as (llm, _):
        answers = run(llm, store, asks)
    attempts = [max(step.attempt for step in answer.capture.steps) for answer in answers if answer.capture]
    assert max(attempts) > 1, "nothing was preempted: the test shows nothing"
    for ask, answer in zip(asks, answers, strict=True):
        check(answer.capture, path, ask, answer.tokens)


def test_bfloat16_is_stored_as_the_engine_has_it(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    """The logits of every row are the head's of its last hidden state, after the final norm."""
    with offline(make("llama", models), dtype="bfloat16") as (llm, _):
        ask = Ask(prompt(40), "hidden_states;rows=all, prompt_logits, logits", 4)
        [answer] = run(llm, store, [ask])
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        cap = answer.capture
        assert cap is not None
        last = np.concatenate([cap.hidden_states_prompt[3], cap.hidden_states[3]])
        assert str(last.dtype) == "float16"
        with torch.no_grad():
            stream = torch.from_numpy(last).to(torch.bfloat16)
            logits = model.compute_logits(model.model.norm(stream)).float().numpy()
    got = np.concatenate([cap.prompt_logits, cap.logits]).astype(np.float32)
    np.testing.assert_allclose(got, logits, rtol=0.02, atol=0.05)


def test_a_compiled_model_without_taps_says_which_setting_it_needs(
    models: Path, store: Path, offline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its graph in the compile cache is not the one that an engine with taps gets, started right after it."""
    path, ask = make("mixtral", models), Ask(prompt(50), "hidden_states;rows=all, router;rows=all", 4)
    with offline(path, enforce_eager=False, **CHUNKED) as (llm, _):
        for member in ("hidden_states", "router"):
            with pytest.raises(CaptureUnavailableError, match=f"start the server with TENSORSPAN_TAPS={member}"):
                run(llm, store, [Ask(ask.prompt, member)])
        [plain] = run(llm, store, [Ask(ask.prompt, "logits;dtype=f32, prompt_logits", 4)])
        assert plain.capture is not None
        assert plain.capture.complete
    monkeypatch.setattr(Settings, "tapped", ("hidden_states", "router"))
    with offline(path, enforce_eager=False, **CHUNKED) as (llm, _):
        [answer] = run(llm, store, [ask])
    check(answer.capture, path, ask, answer.tokens)
    assert answer.tokens == plain.tokens


def test_what_was_never_compared_is_refused_by_name(
    models: Path, store: Path, offline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points, "STREAMS", points.STREAMS - {"mixtral.MixtralDecoderLayer"})
    monkeypatch.setattr(points, "ROUTERS", frozenset())
    with offline(make("mixtral", models)) as (llm, _):
        says = "what mixtral.MixtralDecoderLayer returns was never compared with a reference"
        with pytest.raises(CaptureRequestError, match=says):
            run(llm, store, [Ask(prompt(5), "hidden_states")])
        with pytest.raises(CaptureRequestError, match="how its CPURouter chooses was never compared"):
            run(llm, store, [Ask(prompt(5), "router")])


SCRIPT = """
import json, sys
from tracer import capture
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, store = sys.argv[1:]
    with capture("hidden_states;rows=all, router, prompt_logits;dtype=f32", store=store) as run:
        llm = LLM(model, dtype="float32", skip_tokenizer_init=True, max_model_len=128, kv_cache_memory_bytes=1 << 26)
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
        [output] = llm.generate([{"prompt_token_ids": list(range(5, 45))}], params, use_tqdm=False)
    print("RESULT" + json.dumps([run.span_ids[0], list(output.outputs[0].token_ids)]))
"""


def test_the_setting_taps_a_compiled_engine_in_its_own_process(models: Path, tmp_path: Path) -> None:
    path, store = make("mixtral", models), tmp_path / "store"
    taps = {"TENSORSPAN_TAPS": "hidden_states,router"}
    span_id, answer = run_script(tmp_path / "offline.py", SCRIPT, path, store, **taps)
    check(open_capture(store, span_id), path, Ask(list(range(5, 45))), answer)
