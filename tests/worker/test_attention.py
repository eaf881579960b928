"""The torch reference for attention rows against an element-by-element float64 softmax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.worker.attention import LayerMath, attention_last_rows, attention_rows, row_features, summarise


def oracle(query: np.ndarray, key: np.ndarray, position: int, head: int, group: int, math_: LayerMath) -> np.ndarray:
    """One row of one head, from the definitions."""
    visible = range(len(key[group]))
    scores = np.full(len(key[group]), -np.inf)
    for j in visible:
        if j > position or (math_.sliding_window is not None and position - j >= math_.sliding_window):
            continue
        score = float(query[head].astype(np.float64) @ key[group, j].astype(np.float64)) * math_.scale
        if math_.soft_cap is not None:
            score = math_.soft_cap * math.tanh(score / math_.soft_cap)
        if math_.alibi_slopes is not None:
            score += float(math_.alibi_slopes[head]) * (j - position)
        scores[j] = score
    extra = [] if math_.sinks is None else [float(math_.sinks[head])]
    top = max([scores.max(), *extra])
    weights = np.exp(scores - top)
    row: np.ndarray = weights / (weights.sum() + sum(math.exp(value - top) for value in extra))
    return row


@st.composite
def cases(draw: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerMath]:
    groups, per_group = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (3, 3)]))
    size, rows, keys = draw(st.sampled_from([4, 32])), draw(st.integers(1, 5)), draw(st.integers(5, 40))
    heads = groups * per_group
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    query = torch.randn(rows, heads, size, generator=generator)
    key = torch.randn(groups, keys, size, generator=generator)
    positions = torch.arange(keys - rows, keys)
    layer = LayerMath(
        scale=draw(st.sampled_from([0.1, 0.5, 1.0])),
        sliding_window=draw(st.sampled_from([None, 1, 3, 100])),
        soft_cap=draw(st.sampled_from([None, 2.0, 50.0])),
        alibi_slopes=draw(st.sampled_from([None, torch.linspace(0.1, 1.0, heads)])),
        sinks=draw(st.sampled_from([None, torch.linspace(-1.0, 3.0, heads)])),
    )
    return query, key, positions, layer


@settings(max_examples=60, deadline=None)
@given(cases())
def test_rows_equal_the_definition(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerMath]) -> None:
    query, key, positions, layer = case
    got = attention_rows(query, key, positions, layer).numpy()
    per_group = query.shape[1] // key.shape[0]
    for row, position in enumerate(positions.tolist()):
        for head in range(query.shape[1]):
            want = oracle(query[row].numpy(), key.numpy(), position, head, head // per_group, layer)
            np.testing.assert_allclose(got[head, row], want, atol=2e-6)


def test_long_prompts_in_parts_equal_one_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.worker.attention.SCORES_AT_ONCE", 256 * 2 * 600)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(600, 2, 8, generator=generator), torch.randn(1, 600, 8, generator=generator)
    got = attention_rows(query, key, torch.arange(600), LayerMath(0.3))
    scores = torch.einsum("qhd,kd->hqk", query, key[0]) * 0.3
    want = torch.softmax(scores.masked_fill(torch.ones(600, 600).triu(1).bool(), -torch.inf), -1)
    assert torch.allclose(got, want, atol=1e-6)


def test_features_by_hand() -> None:
    weights = torch.tensor([[[0.5, 0.2, 0.2, 0.05]]])  # One learned sink holds the missing 0.05.
    entropy, sink, prompt, own = row_features(weights, prompt_tokens=3)[0, 0].tolist()
    assert entropy == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.2, 0.2, 0.05)), abs=1e-6)
    assert sink == pytest.approx(0.55, abs=1e-6)
    assert prompt == pytest.approx(0.9, abs=1e-6)
    assert own == pytest.approx(0.05)


def test_summary_names_the_largest_weight_outside_position_zero() -> None:
    weights = torch.zeros(2, 3, 4)
    weights[..., 0] = 0.6
    weights[1, 2, 3] = 0.4
    weights[0, 1, 2] = 0.3
    summary = summarise(weights, row_features(weights, 2), layers=[4, 9], heads=[0, 5, 7])
    assert (summary.top_layer, summary.top_head, summary.top_position) == (9, 7, 3)
    assert summary.top_weight == pytest.approx(0.4)


def test_a_single_key_has_no_top() -> None:
    weights = torch.ones(1, 1, 1)
    assert summarise(weights, row_features(weights, 1), [0], [0]).top_position == -1


def test_heads_that_a_layer_does_not_have_count_for_nothing() -> None:
    weights = torch.zeros(2, 4, 3)
    weights[0], weights[1, :2] = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.5, 0.3, 0.2])
    features = row_features(weights, prompt_tokens=2)
    assert torch.isnan(features[1, 2:]).all()
    summary = summarise(weights, features, [0, 1], [0, 1, 2, 3])
    assert summary.sink_mass == pytest.approx(0.5)
    assert summary.prompt_mass == pytest.approx(0.8)


@settings(max_examples=40, deadline=None)
@given(cases(), st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_last_rows_together_equal_each_alone(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerMath], shorter: list[int]
) -> None:
    query, key, positions, layer = case
    ends = [int(positions[-1]) - cut for cut in shorter]
    queries = query[:1].expand(len(ends), -1, -1) * torch.arange(1, len(ends) + 1)[:, None, None]
    keys = torch.stack([key.roll(place, dims=1) for place in range(len(ends))], dim=1)
    for place, end in enumerate(ends):
        keys[:, place, end + 1 :] = torch.nan  # Somebody else's keys, or none.
    together = attention_last_rows(queries, keys, torch.tensor(ends), layer)
    for place, end in enumerate(ends):
        alone = attention_rows(queries[place : place + 1], keys[:, place, : end + 1], torch.tensor([end]), layer)
        assert torch.allclose(together[:, place, : end + 1], alone[:, 0], atol=1e-6)
        assert not together[:, place, end + 1 :].any()
