"""Attention and logits of every family against Transformers eager, float32: the row convention, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.models import FAMILIES, make_model
from tests.integration.oracle import oracle
from tracer import config, open_capture
from tracer.export import engine_infos
from tracer.worker.native import NativeError

pytestmark = pytest.mark.engine

TOLERANCE = 1e-5
WHOLE = "logits;dtype=f32, attention;rows=all;dtype=f32, qk;rows=all"
COMPILED = {"llama", "gemma2"}


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 500, length)]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_logits_equal_eager(
    family: str, models: Path, offline: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    check(make_model(family, models), "native", family in COMPILED, offline, generate)


def test_torch_gives_the_same_where_the_kernels_cannot_be_built(
    models: Path, offline: Callable[..., Any], generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler() -> Any:
        raise NativeError("there is no C compiler")

    monkeypatch.setattr("tracer.worker.maths.load", no_compiler)
    check(make_model("gpt_oss", models), "torch", False, offline, generate)


def check(path: Path, kernels: str, compiled: bool, offline: Callable[..., Any], generate: Callable[..., Any]) -> None:
    """Every row of one greedy answer is eager's, as it was stored and as it is rebuilt."""
    tokens = prompt(70)
    with offline(path, enforce_eager=not compiled) as (llm, record), record(WHOLE) as run:
        assert {info.kernels for info in engine_infos(config.load())} == {kernels}
        [answer] = generate(llm, [tokens])
    want, cap = oracle(path, tokens + answer), open_capture(run.store, run.span_ids[0])
    assert cap.complete, cap.missing
    assert [token.id for token in cap.tokens] == tokens + answer
    layers, heads = want.attention.shape[:2]
    assert list(cap.attention) == list(range(layers))
    for layer in range(layers):
        got = np.asarray(cap.attention_prefill[layer])[..., :70]
        np.testing.assert_allclose(got, want.attention[layer][:, :70, :70], rtol=0, atol=TOLERANCE)
        rebuilt = np.asarray(cap.qk_prefill[layer])
        np.testing.assert_allclose(rebuilt, want.attention[layer][:, :70, :70], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(np.asarray(cap.qk[layer]), np.asarray(cap.attention[layer]), rtol=0, atol=TOLERANCE)
        for step in range(len(answer)):
            for head in range(heads):
                row = cap.row(step=step, layer=layer, head=head)
                expected = want.attention[layer, head, 69 + step, : 70 + step]
                np.testing.assert_allclose(row, expected, rtol=0, atol=TOLERANCE)
    logits = np.asarray(cap.logits)
    assert logits.argmax(axis=1).tolist() == answer
    np.testing.assert_allclose(logits, want.logits[69 : 69 + len(answer)], rtol=0, atol=1e-3)
