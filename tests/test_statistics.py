"""Statistics of logits against float64 NumPy and hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tracer.records import LogitsSummary
from tracer.statistics import logits_statistics, logits_summaries


def oracle(row: np.ndarray) -> tuple[float, float, np.ndarray]:
    z = row.astype(np.float64)
    log_p = z - (z.max() + np.log(np.exp(z - z.max()).sum()))
    p = np.exp(log_p)
    entropy = -(p * log_p).sum()
    return entropy, (p * (log_p + entropy) ** 2).sum(), log_p


def summarised(logits: torch.Tensor, tokens: list[int], k: int = 5) -> list[LogitsSummary]:
    found = logits_summaries(logits, logits_statistics(logits, k), tokens)
    return [summary for summary in found if summary is not None]


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_against_numpy(rows: int) -> None:
    logits = torch.randn(rows, 5000, generator=torch.Generator().manual_seed(rows)) * 4
    tokens = [int(np.argsort(-row)[17]) for row in logits.numpy()]
    for index, summary in enumerate(summarised(logits, tokens)):
        entropy, varentropy, log_p = oracle(logits[index].numpy())
        token = tokens[index]
        best = np.argsort(-log_p)[:5]
        assert summary.entropy == pytest.approx(entropy, abs=1e-4)
        assert summary.varentropy == pytest.approx(varentropy, rel=1e-4)
        assert summary.margin == pytest.approx(log_p[best[0]] - log_p[best[1]], abs=1e-5)
        assert summary.logprob == pytest.approx(log_p[token], abs=1e-5)
        assert summary.rank == 17
        assert summary.topk_ids == tuple(best.tolist())
        assert summary.topk_logprobs == pytest.approx(log_p[best].tolist(), abs=1e-5)


def test_uniform_row_by_hand() -> None:
    [summary] = summarised(torch.zeros(1, 4), [1], k=2)
    assert summary.entropy == pytest.approx(math.log(4))
    assert summary.varentropy == pytest.approx(0.0, abs=1e-12)
    assert (summary.margin, summary.rank) == (0.0, 0)


def test_masked_tokens_add_nothing() -> None:
    row = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    [summary] = summarised(row, [0], k=2)
    assert summary.entropy == pytest.approx(math.log(2))
    assert summary.varentropy == pytest.approx(0.0, abs=1e-12)


def test_a_row_that_sampled_nothing_has_no_summary() -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    found = logits_summaries(logits, logits_statistics(logits, 2), [4, None, 0])
    assert [summary is None for summary in found] == [False, True, False]


def test_extreme_logits_stay_numbers() -> None:
    row = torch.tensor([[3e4, 2.9e4, -3e4, 65504.0, -math.inf]])
    [summary] = summarised(row, [1], k=5)
    assert summary.entropy == summary.varentropy == pytest.approx(0.0, abs=1e-12)
    assert summary.logprob == pytest.approx(29_000 - 65_504)
    assert (summary.rank, summary.topk_ids[:2]) == (2, (3, 0))
    assert summary.margin == pytest.approx(35_504)
    assert summary.topk_logprobs[-1] == -math.inf


def test_ties_have_one_rank_and_no_margin() -> None:
    [first, second] = summarised(torch.tensor([[1.0, 2.0, 2.0, 0.0]] * 2), [2, 0], k=2)
    assert (first.rank, first.margin) == (0, 0.0)
    assert sorted(first.topk_ids) == [1, 2]
    assert second.rank == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_a_logit_that_is_no_number_has_no_statistics(bad: float) -> None:
    [summary] = summarised(torch.tensor([[1.0, bad, 2.0, 0.0]]), [2], k=2)
    assert all(math.isnan(value) for value in (summary.entropy, summary.varentropy, summary.margin))
    assert summary.topk_ids[0] == 1


def test_a_row_without_a_possible_token_has_no_statistics() -> None:
    [summary] = summarised(torch.full((1, 4), -math.inf), [2], k=2)
    assert math.isnan(summary.entropy)
    assert math.isnan(summary.logprob)
