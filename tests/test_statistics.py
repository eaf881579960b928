"""Statistics of logits against float64 NumPy and hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tracer.statistics import logits_statistics, logits_summary


def oracle(row: np.ndarray) -> tuple[float, float, np.ndarray]:
    z = row.astype(np.float64)
    log_p = z - (z.max() + np.log(np.exp(z - z.max()).sum()))
    p = np.exp(log_p)
    entropy = -(p * log_p).sum()
    return entropy, (p * (log_p + entropy) ** 2).sum(), log_p


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_against_numpy(rows: int) -> None:
    logits = torch.randn(rows, 5000, generator=torch.Generator().manual_seed(rows)) * 4
    statistics = logits_statistics(logits, 5)
    for index in range(rows):
        entropy, varentropy, log_p = oracle(logits[index].numpy())
        token = int(np.argsort(-log_p)[17])
        summary = logits_summary(logits[index], statistics, index, token)
        best = np.argsort(-log_p)[:5]
        assert summary.entropy == pytest.approx(entropy, abs=1e-4)
        assert summary.varentropy == pytest.approx(varentropy, rel=1e-4)
        assert summary.margin == pytest.approx(log_p[best[0]] - log_p[best[1]], abs=1e-5)
        assert summary.logprob == pytest.approx(log_p[token], abs=1e-5)
        assert summary.rank == 17
        assert summary.topk_ids == tuple(best.tolist())
        assert summary.topk_logprobs == pytest.approx(log_p[best].tolist(), abs=1e-5)


def test_uniform_row_by_hand() -> None:
    summary = logits_summary(torch.zeros(4), logits_statistics(torch.zeros(1, 4), 2), 0, 1)
    assert summary.entropy == pytest.approx(math.log(4))
    assert summary.varentropy == pytest.approx(0.0, abs=1e-12)
    assert (summary.margin, summary.rank) == (0.0, 0)


def test_masked_tokens_add_nothing() -> None:
    row = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    summary = logits_summary(row[0], logits_statistics(row, 2), 0, 0)
    assert summary.entropy == pytest.approx(math.log(2))
    assert summary.varentropy == pytest.approx(0.0, abs=1e-12)
