"""Attention and logits of every family against Transformers eager, float32: the row convention, layer by layer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cpus import EAGER_TOLERANCE
from tests.integration.families import HYBRIDS, REFUSED_LAYERS
from tests.integration.models import FAMILIES, make_model
from tests.integration.oracle import greedy
from tracer import config, open_capture
from tracer.errors import CaptureRequestError
from tracer.export import engine_infos
from tracer.worker.native import NativeError

pytestmark = pytest.mark.engine

TOLERANCE = EAGER_TOLERANCE
WHOLE = "logits;dtype=f32, attention;rows=all;dtype=f32, qk;rows=all"
COMPILED = {"llama", "gemma2"}
PROMPT = 70


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 500, length)]


@pytest.fixture
def started(offline: Callable[..., Any]) -> Callable[..., Any]:
    """`offline`, for many models in one process."""

    @contextmanager
    def start(path: Path, **options: Any) -> Iterator[Any]:
        from vllm.distributed import parallel_state
        from vllm.model_executor.models.registry import ModelRegistry

        # vLLM asks a child process about each class that it has not loaded: 5 s a family.
        for name in json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"]:
            if name in ModelRegistry.models:
                ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
        # The groups of the engine before are kept, and have none for experts if it had no experts.
        parallel_state.destroy_model_parallel()
        with offline(path, **options) as engine:
            yield engine

    return start


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_logits_equal_eager(
    family: str, models: Path, started: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    check(make_model(family, models), "native", family in COMPILED, started, generate)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_gives_its_attention_layers_and_names_the_others(
    family: str, models: Path, started: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    check(make_model(family, models), "native", False, started, generate, REFUSED_LAYERS[family])


def test_torch_gives_the_same_where_the_kernels_cannot_be_built(
    models: Path, started: Callable[..., Any], generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler() -> Any:
        raise NativeError("there is no C compiler")

    monkeypatch.setattr("tracer.worker.maths.load", no_compiler)
    check(make_model("gpt_oss", models), "torch", False, started, generate)


def test_attention_that_nobody_knows_is_refused_from_the_configuration(
    models: Path, tmp_path: Path, started: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    path = tmp_path / "llama"
    shutil.copytree(make_model("llama", models), path)
    text = (path / "config.json").read_text(encoding="utf-8")
    (path / "config.json").write_text(json.dumps(json.loads(text) | {"attention_wobble": 0.5}), encoding="utf-8")
    says = "attention config key 'attention_wobble' is not known to this release"
    with started(path) as (llm, record):
        with pytest.raises(CaptureRequestError, match=says), record("attention"):
            generate(llm, [prompt(10)])
        with record("logits;dtype=f32") as run:
            [answer] = generate(llm, [prompt(10)])
    cap = open_capture(run.store, run.span_ids[0])
    assert cap.complete, cap.missing
    assert np.asarray(cap.logits).argmax(axis=1).tolist() == answer


def test_the_documentation_lists_exactly_these_families() -> None:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    tables = text[: text.index("## What is refused")]
    assert set(re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE)) == set(FAMILIES) | set(HYBRIDS)


def check(
    path: Path,
    kernels: str,
    compiled: bool,
    started: Callable[..., Any],
    generate: Callable[..., Any],
    refused: str = "",
) -> None:
    """Every row of one greedy answer is eager's, as it was stored and as it is rebuilt.

    refused: what says of each layer that is not captured why it is not.
    """
    tokens = prompt(PROMPT)
    want, expected = greedy(path, tokens, 8)
    with started(path, enforce_eager=not compiled) as (llm, record), record(WHOLE) as run:
        [info] = engine_infos(config.load())
        [answer] = generate(llm, [tokens])
    assert info.kernels == kernels
    assert answer == expected
    cap = open_capture(run.store, run.span_ids[0])
    assert [token.id for token in cap.tokens] == tokens + answer
    able = [layer.index for layer in info.layers if layer.unsupported is None]
    reasons = {layer.unsupported for layer in info.layers if layer.unsupported is not None}
    assert all(refused and refused in reason for reason in reasons), reasons
    assert cap.complete is not bool(refused), cap.missing
    assert list(cap.attention) == able
    # Transformers gives the weights of every layer that has some, which may be refused ones too.
    places = able if len(want.attention) == len(info.layers) else range(len(able))
    for layer, place in zip(able, places, strict=True):
        check_layer(cap, layer, want.attention[place], len(answer))
    logits = np.asarray(cap.logits)
    assert logits.argmax(axis=1).tolist() == answer
    np.testing.assert_allclose(logits, want.logits[PROMPT - 1 : -1], rtol=0, atol=1e-3)


def check_layer(cap: Any, layer: int, want: Any, steps: int) -> None:
    """One layer's map of the prompt, its rows, and both as they are rebuilt from queries and keys."""
    expected = want[:, :PROMPT, :PROMPT]
    got = np.asarray(cap.attention_prefill[layer])[..., :PROMPT]
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE, err_msg=f"layer {layer}")
    np.testing.assert_allclose(np.asarray(cap.qk_prefill[layer]), expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(cap.qk[layer]), np.asarray(cap.attention[layer]), rtol=0, atol=TOLERANCE)
    for step in range(steps):
        row = np.stack([cap.row(step=step, layer=layer, head=head) for head in range(len(want))])
        last = PROMPT - 1 + step
        np.testing.assert_allclose(row, want[:, last, : last + 1], rtol=0, atol=TOLERANCE, err_msg=f"layer {layer}")
