"""Each formula against PyTorch's distributions, element by element loops or numbers worked out by hand."""

from __future__ import annotations

from math import acos, exp, inf, log, nan, pi, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.distributions import Categorical, kl_divergence

from tracer.analysis import logit_signals as signals

QUARTERS = np.log([[0.5, 0.25, 0.125, 0.125]])
"""H = 1.75 bit = 1.75 log 2."""
LN2 = log(2)

rows = arrays(np.float32, (3, 17), elements=st.floats(-30, 30, width=32))


def naive(row: Any) -> list[float]:
    """Probabilities, one by one."""
    top = max(row)
    weights = [exp(float(value) - float(top)) for value in row]
    return [weight / sum(weights) for weight in weights]


def test_numbers_worked_out_by_hand() -> None:
    assert signals.entropy(QUARTERS) == pytest.approx(1.75 * LN2)
    assert signals.varentropy(QUARTERS) == pytest.approx(0.6875 * LN2**2)  # Surprises of 1, 2, 3, 3 bit.
    assert signals.margin(QUARTERS) == pytest.approx(LN2)
    assert signals.probability_margin(QUARTERS) == pytest.approx(0.25)
    assert signals.confidence(QUARTERS, k=2) == pytest.approx(1.5 * LN2)
    assert signals.confidence(QUARTERS) == pytest.approx(2.25 * LN2), "no more than there are"
    assert signals.self_certainty(QUARTERS) == pytest.approx(2.25 * LN2 - log(4))
    assert signals.top_entropy(QUARTERS, k=2) == pytest.approx(log(3) - 2 / 3 * LN2)  # 2/3 and 1/3.
    assert signals.logprob(QUARTERS, [2]) == pytest.approx(-3 * LN2)
    assert [signals.rank(QUARTERS, [token])[0] for token in (0, 1, 2, 3)] == [0, 1, 2, 2]
    sizes = [float(signals.nucleus_size(QUARTERS, mass)[0]) for mass in (0.1, 0.5, 0.7, 0.8, 0.9, 1.0)]
    assert sizes == [1, 1, 2, 3, 4, 4]
    assert signals.perplexity(np.log([0.5, 0.125])) == pytest.approx(4)


@settings(max_examples=50)
@given(rows)
def test_against_torch(logits: Any) -> None:
    p = Categorical(logits=torch.tensor(logits, dtype=torch.float64))
    uniform = Categorical(logits=torch.zeros(3, 17, dtype=torch.float64))
    np.testing.assert_allclose(signals.log_softmax(logits), p.logits, atol=1e-12)
    np.testing.assert_allclose(signals.entropy(logits), p.entropy(), atol=1e-12)
    np.testing.assert_allclose(signals.self_certainty(logits), kl_divergence(uniform, p), atol=1e-9)
    np.testing.assert_allclose(signals.logprob(logits, [3, 4, 5]), p.log_prob(torch.tensor([3, 4, 5])), atol=1e-12)
    best = torch.topk(p.logits, 5).values
    np.testing.assert_allclose(signals.margin(logits), best[:, 0] - best[:, 1], atol=1e-12)
    np.testing.assert_allclose(signals.confidence(logits, k=5), -best.mean(dim=1), atol=1e-12)
    np.testing.assert_allclose(signals.top_entropy(logits, k=5), Categorical(logits=best).entropy(), atol=1e-12)


@settings(max_examples=50)
@given(rows)
def test_against_loops(logits: Any) -> None:
    for row, varentropy, nucleus, renyi, distance in zip(
        logits,
        signals.varentropy(logits),
        signals.nucleus_size(logits),
        signals.renyi_divergence(logits),
        signals.fisher_rao(logits),
        strict=True,
    ):
        p = naive(row)
        mean = -sum(x * log(x) for x in p if x)
        assert varentropy == pytest.approx(sum(x * (-log(x) - mean) ** 2 for x in p if x), abs=1e-9)
        held, count = 0.0, 0
        for x in sorted(p, reverse=True):
            if held < 0.9 - 1e-12:
                held, count = held + x, count + 1
        assert nucleus == count
        soft = naive([float(value) / 2 for value in row])
        assert renyi == pytest.approx(log(sum(x**0.5 * 17**-0.5 for x in soft)) / -0.5, abs=1e-9)
        assert distance == pytest.approx(2 / pi * acos(min(1.0, sum(sqrt(x / 17) for x in soft))), abs=1e-6)


def test_tokens_that_cannot_come_do_not_count() -> None:
    padded = np.concatenate([QUARTERS, [[-inf, -inf]]], axis=1)
    for name in ("entropy", "varentropy", "margin", "self_certainty", "nucleus_size", "renyi_divergence", "fisher_rao"):
        signal = getattr(signals, name)
        np.testing.assert_allclose(signal(padded), signal(QUARTERS), rtol=1e-12, err_msg=name)


def test_a_row_that_is_not_known_has_no_signal() -> None:
    bad = np.array([[nan] * 4, [0.0, inf, 0.0, 0.0], [0.0, 1.0, nan, 0.0]], np.float16)
    for name in signals.__all__:
        if name in ("kl_divergence", "group_confidence", "perplexity"):
            continue
        signal = getattr(signals, name)
        values = signal(bad, [0, 1, 2]) if name in ("logprob", "rank") else signal(bad)
        assert np.isnan(values).all(), name
    assert np.isnan(signals.perplexity(np.array([-1.0, nan])))
    assert np.isnan(signals.perplexity(np.array([])))


def test_groups_are_means_of_the_last_steps() -> None:
    values = np.array([1.0, 2.0, 6.0, nan, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(signals.group_confidence(values, 2), [1, 1.5, 4, nan, nan, 4, 6])
    np.testing.assert_allclose(signals.group_confidence(values[:3]), [1, 1.5, 3])


def test_divergence_from_a_narrower_distribution_is_infinite() -> None:
    p, q = np.log([[0.5, 0.5]]), np.array([[0.0, -inf]])
    assert signals.kl_divergence(q, p)[0] == pytest.approx(LN2)
    assert signals.kl_divergence(p, q)[0] == inf
