"""Each formula against numbers worked out by hand and element by element loops."""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np
import pytest

from tracer.analysis import answer_signals, attention_signals

ROW = np.array([0.5, 0.1, 0.1, 0.2, 0.1, 0.0], np.float32)
"""Five visible keys, three of the prompt, and one of padding."""
LOST = np.zeros(6, np.float32)


def causal(heads: int, size: int, seed: int = 3) -> Any:
    weights = np.tril(np.random.default_rng(seed).random((heads, size, size)) + 0.01)
    return weights / weights.sum(axis=-1, keepdims=True)


def test_numbers_worked_out_by_hand() -> None:
    rows = np.stack([ROW, LOST])
    for got, wanted in (
        (attention_signals.key_mass(rows, np.array([0, 1, 0, 1, 0, 0], bool)), 0.3),
        (attention_signals.sink_mass(rows, learned=False), 0.5),
        (attention_signals.self_weight(rows, 5), 0.1),
        (attention_signals.attention_entropy(rows), 0.5 * log(2) + 0.3 * log(10) + 0.2 * log(5)),
        (attention_signals.lookback_ratio(rows, 3, 5), (0.7 / 3) / (0.7 / 3 + 0.3 / 2)),
    ):
        assert got[0] == pytest.approx(wanted)
        assert np.isnan(got[1]), "a row that was not stored"
    assert np.isnan(attention_signals.lookback_ratio(ROW, 5, 5)), "no answer yet"


def test_learned_sinks_take_what_rows_lack() -> None:
    assert attention_signals.sink_mass(ROW * np.float32(0.5), learned=True) == pytest.approx(0.75)
    assert attention_signals.sink_mass(ROW * np.float32(1.001), learned=True) == pytest.approx(0.5005), "never negative"


def test_regions_are_summed_at_once() -> None:
    sets = np.array([[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]], bool)
    got = attention_signals.region_mass(np.stack([ROW, LOST])[:, None], sets)
    np.testing.assert_allclose(got[0, 0], [0.5, 0.2, 0.3], rtol=1e-6)
    assert np.isnan(got[1]).all()


def test_copies_match_the_token_or_what_came_after() -> None:
    keys, rows = [7, 8, 7, 9, 8, 5], np.stack([ROW, ROW])
    seven, eight = attention_signals.copy_mass(rows[:, None], keys, [7, 8], [5, 4])[:, 0]
    assert seven == pytest.approx(0.5 + 0.1 + 0.1), "keys 0 and 2, and 1 before key 2"
    # Key 3 stands before an 8 that the second row does not see: it is the answer itself.
    assert eight == pytest.approx(0.5 + 0.1 + 0.1), "keys 0 (before 1), 1 and 4"
    with pytest.raises(ValueError, match="5 token IDs for rows of 6 keys"):
        attention_signals.copy_mass(rows, keys[:5], [7, 8], [5, 4])


def test_the_seeds_rule_skips_the_first_keys_and_means_over_heads() -> None:
    heads = np.zeros((2, 9))
    heads[:, 0] = 0.5
    heads[0, 6], heads[1, 7] = 0.4, 0.3
    system = np.arange(9) < 8
    assert attention_signals.max_system_attention(heads, system) == pytest.approx(0.2)
    assert np.isnan(attention_signals.max_system_attention(heads, np.arange(9) < 5))
    assert np.isnan(attention_signals.max_system_attention(heads * 0, system))


def test_rauq_follows_the_head_that_looks_back() -> None:
    p = [0.9, 0.5, 0.8]
    weights = np.array([[[0.9, 0.0]], [[0.1, 0.6]], [[0.2, 0.4]]])  # The first step has no token before it.
    second = 0.2 * 0.5 + 0.8 * 0.6 * 0.9
    third = 0.2 * 0.8 + 0.8 * 0.4 * second
    wanted = -(log(0.9) + log(second) + log(third)) / 3
    values = answer_signals.rauq_layers(np.log(p), weights)
    assert values == pytest.approx([wanted])
    padded = np.concatenate([weights, np.full((3, 1, 1), np.nan)], axis=2)
    assert answer_signals.rauq_layers(np.log(p), padded) == pytest.approx([wanted]), "a head that is not there"
    assert np.isnan(answer_signals.rauq_layers(np.log([0.9, np.nan]), weights[:2])[0])
    assert np.isnan(answer_signals.rauq_layers(np.array([]), weights[:0])[0])
    assert answer_signals.rauq_layers(np.log([0.5]), weights[:1]) == pytest.approx([log(2)])
    assert answer_signals.rauq(np.array([1.0, 3.0])) == 3.0
    assert np.isnan(answer_signals.rauq(np.array([])))
    assert list(answer_signals.middle_third(30)) == list(range(10, 20))
    assert list(answer_signals.middle_third(1)) == [0]


def test_attention_score_is_the_log_determinant_per_token() -> None:
    own = np.random.default_rng(0).random((4, 2, 3))
    wanted = [sum(np.linalg.slogdet(np.diag(own[:, layer, head]))[1] / 4 for head in range(3)) for layer in range(2)]
    assert answer_signals.attention_score(own) == pytest.approx(wanted)
    own[:, 1, 2] = np.nan
    without = answer_signals.attention_score(own)
    assert without[0] == pytest.approx(wanted[0])
    assert without[1] == pytest.approx(np.log(own[:, 1, :2]).mean(axis=0).sum())
    assert np.isnan(answer_signals.attention_score(own[:0])).all()


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_laplacian_eigenvalues_are_those_of_the_matrix(cut: int) -> None:
    weights = causal(2, 8)
    got = answer_signals.laplacian_eigenvalues(iter([weights[:, :cut], weights[:, cut:]]), 8, k=3)
    for head, matrix in enumerate(weights):
        degrees = [sum(matrix[i][j] for i in range(8)) / (8 - j) for j in range(8)]
        values = np.linalg.eigvals(np.diag(degrees) - matrix).real
        np.testing.assert_allclose(got[head], sorted(values, reverse=True)[:3], atol=1e-12)
    assert np.isnan(answer_signals.laplacian_eigenvalues([weights], 8, k=10)[:, 8:]).all()


def test_laplacian_eigenvalues_need_the_whole_map() -> None:
    weights = causal(2, 4)
    with pytest.raises(ValueError, match="the map has 3 rows of 4"):
        answer_signals.laplacian_eigenvalues([weights[:, :3]], 4)
    with pytest.raises(ValueError, match="the map has 0 rows of 4"):
        answer_signals.laplacian_eigenvalues([], 4)
    weights[0, 2] = 0
    lost = np.isnan(answer_signals.laplacian_eigenvalues([weights], 4, k=2)).all(axis=1)
    assert lost.tolist() == [True, False], "a row of that head was not stored"


def test_half_precision_is_summed_in_double() -> None:
    rows = np.full((1, 5000), 1 / 5000, np.float16)
    exact = float(np.float16(1 / 5000)) * 5000
    assert attention_signals.key_mass(rows, np.ones(5000, bool)) == pytest.approx(exact, rel=1e-12)
    assert exp(attention_signals.attention_entropy(rows)[0]) == pytest.approx(5000, rel=1e-2)
