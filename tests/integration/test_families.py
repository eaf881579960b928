"""Attention and logits of every family against Transformers eager, float32: the row convention, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.models import FAMILIES, make_model
from tests.integration.oracle import oracle
from tracer import open_capture

pytestmark = pytest.mark.engine

TOLERANCE = 1e-5
WHOLE = "logits;dtype=f32, attention;rows=all;dtype=f32"
COMPILED = {"llama", "gemma2"}


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 500, length)]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_logits_equal_eager(
    family: str, models: Path, offline: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    path, tokens = make_model(family, models), prompt(70)
    eager = family not in COMPILED
    with offline(path, enforce_eager=eager) as (llm, record), record(WHOLE) as run:
        [answer] = generate(llm, [tokens])
    want, cap = oracle(path, tokens + answer), open_capture(run.store, run.span_ids[0])
    assert cap.complete, cap.missing
    assert [token.id for token in cap.tokens] == tokens + answer
    layers, heads = want.attention.shape[:2]
    assert list(cap.attention) == list(range(layers))
    for layer in range(layers):
        got = np.asarray(cap.attention_prefill[layer])[..., :70]
        np.testing.assert_allclose(got, want.attention[layer][:, :70, :70], rtol=0, atol=TOLERANCE)
        for step in range(len(answer)):
            for head in range(heads):
                row = cap.row(step=step, layer=layer, head=head)
                expected = want.attention[layer, head, 69 + step, : 70 + step]
                np.testing.assert_allclose(row, expected, rtol=0, atol=TOLERANCE)
    logits = np.asarray(cap.logits)
    assert logits.argmax(axis=1).tolist() == answer
    np.testing.assert_allclose(logits, want.logits[69 : 69 + len(answer)], rtol=0, atol=1e-3)
