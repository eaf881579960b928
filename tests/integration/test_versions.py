"""A vLLM that this release does not know: it serves, and is captured only if the test at the worker's start passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.models import make_model
from tests.integration.oracle import oracle
from tests.integration.runs import prompt, runner_of
from tracer import config, open_capture
from tracer.errors import CaptureUnavailableError
from tracer.export import engine_infos
from tracer.worker import compat, hooks, layers, rehearsal
from tracer.worker.batch import StepView
from tracer.worker.rehearsal import RehearsalError
from tracer.worker.runner_v1 import RunnerV1
from tracer.worker.step import StepTracer

pytestmark = pytest.mark.engine

UNKNOWN = "0.99.0"
FULL = "logits;dtype=f32, attention;dtype=f32"


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda: UNKNOWN)


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_an_unknown_version_that_passes_its_test_is_captured(
    family: str, unknown: None, models: Path, offline: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    tokens, path = prompt(40), make_model(family, models)
    with offline(path, enable_prefix_caching=True) as (llm, record):
        [info] = engine_infos(config.load())
        assert (info.vllm_version, info.logits_unsupported, info.attention_unsupported) == (UNKNOWN, None, None)
        with record(FULL) as run:
            [answer] = generate(llm, [tokens])
    cap, want = open_capture(run.store, run.span_ids[0]), oracle(path, tokens + answer)
    assert cap.complete, cap.missing
    np.testing.assert_allclose(np.asarray(cap.logits), want.logits[39 : 39 + len(answer)], rtol=0, atol=1e-3)
    for layer in range(3):
        row = cap.row(step=4, layer=layer, head=1)
        np.testing.assert_allclose(row, want.attention[layer, 1, 43, :44], rtol=0, atol=1e-5)


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    known = layers._math
    monkeypatch.setattr(layers, "_math", lambda module: replace(known(module), scale=1.5 * known(module).scale))


def rows_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    known = RunnerV1.view

    def view(self: RunnerV1, **more: bool) -> StepView:
        seen = known(self, **more)
        names = [row.request_id for row in seen.rows]
        return replace(seen, rows=tuple(replace(row, request_id=name) for row, name in zip(seen.rows, names[::-1])))  # noqa: B905

    monkeypatch.setattr(RunnerV1, "view", view)


def logits_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    known = StepTracer.forward_done
    monkeypatch.setattr(StepTracer, "forward_done", lambda self, logits, *more: known(self, logits.flip(0), *more))


def hooks_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def observed(*given: Any) -> Callable[..., Any]:
        return lambda layer, query: None

    monkeypatch.setattr(hooks, "_observed", observed)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (wrong_scale, r"layer model.layers.0.self_attn.attn: weights times values are off the kernel's output by"),
        (rows_of_somebody_else, r"position, keys, step and token are"),
        (logits_of_somebody_else, r"the engine sampled token \d+, the stored logits prefer \d+"),
        (hooks_that_do_not_fit, "TypeError: "),
    ],
)
def test_one_that_fails_it_serves_without(
    change: Callable[[pytest.MonkeyPatch], None],
    says: str,
    unknown: None,
    models: Path,
    offline: Callable[..., Any],
    generate: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(monkeypatch)
    with offline(make_model("llama", models)) as (llm, record):
        for asked in ("logits", "attention=(0)"):
            with pytest.raises(CaptureUnavailableError, match=f"failed its test: .*{says}"):  # noqa: SIM117
                with record(asked):
                    generate(llm, [prompt(12)])
        assert [len(answer) for answer in generate(llm, [prompt(12), prompt(7)])] == [8, 8]
        assert not set(rehearsal.HOOKED) & vars(runner_of(llm)).keys(), "and its steps are as without us"


def test_a_step_that_this_version_does_not_take_leaves_nothing_behind(
    unknown: None,
    models: Path,
    offline: Callable[..., Any],
    generate: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: Any) -> None:
        raise RehearsalError("found a fault")

    monkeypatch.setattr(rehearsal, "_check", fails)  # in the middle: the made-up request is in the engine's batch
    with offline(make_model("llama", models)) as (llm, record):
        runner = runner_of(llm)
        assert not runner.requests
        assert not runner.input_batch.req_ids
        with pytest.raises(CaptureUnavailableError, match="found a fault"), record("logits"):
            generate(llm, [prompt(12)])
        assert len(generate(llm, [prompt(12)])[0]) == 8


def test_a_missing_name_is_the_answers_reason(
    models: Path, offline: Callable[..., Any], generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.run_step", ())
    monkeypatch.setattr(compat, "V1_NAMES", (*compat.V1_NAMES, gone))
    with offline(make_model("llama", models)) as (llm, record):
        with pytest.raises(CaptureUnavailableError, match=r"lacks vllm\.v1.*GPUModelRunner\.run_step"), record(FULL):
            generate(llm, [prompt(12)])
        assert len(generate(llm, [prompt(12)])[0]) == 8
