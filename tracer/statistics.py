"""Statistics of logits rows: pure tensor maths, natural logarithms, raw logits before any processor.

Definitions and sources: docs/signals in the README's table; entropy (Shannon 1948), varentropy as the variance of
`-log p`, margin as the gap of the two best log-probabilities.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from tracer.records import LogitsSummary

__all__ = ["RowStatistics", "logits_statistics", "logits_summary"]

ROWS_AT_ONCE: Final = 16
"""Rows per pass: bounds the temporary memory to a few times 16 vocabularies."""


class RowStatistics(NamedTuple):
    """Per row of a logits matrix, on the logits' device."""

    normaliser: torch.Tensor
    """`logsumexp(z)`, float32 [rows]."""
    entropy: torch.Tensor
    varentropy: torch.Tensor
    top_logits: torch.Tensor
    """float32 [rows, k], descending."""
    top_ids: torch.Tensor
    """int64 [rows, k]."""


def logits_statistics(logits: torch.Tensor, k: int) -> RowStatistics:
    """Statistics of float32 logits [rows, vocab]; `k` of at least 2 and at most the vocabulary."""
    parts = [_some_rows(logits[i : i + ROWS_AT_ONCE], k) for i in range(0, len(logits), ROWS_AT_ONCE)]
    return parts[0] if len(parts) == 1 else RowStatistics(*map(torch.cat, zip(*parts, strict=True)))


def _some_rows(logits: torch.Tensor, k: int) -> RowStatistics:
    normaliser = torch.logsumexp(logits, dim=-1)
    log_p = logits - normaliser[:, None]
    p = torch.exp(log_p)
    surprise = torch.where(p > 0, -log_p, 0.0)  # A masked token has p = 0 and log p = -inf: it adds nothing.
    entropy = (p * surprise).sum(dim=-1)
    varentropy = (p * (surprise - entropy[:, None]).square()).sum(dim=-1)
    top_logits, top_ids = torch.topk(logits, k, dim=-1)
    return RowStatistics(normaliser, entropy, varentropy, top_logits, top_ids)


def logits_summary(row: torch.Tensor, statistics: RowStatistics, index: int, token: int) -> LogitsSummary:
    """The summary of one row once the sampled `token` is known; row: float32 [vocab], row `index` of the matrix."""
    normaliser = float(statistics.normaliser[index])
    logit = row[token]
    top = [value - normaliser for value in statistics.top_logits[index].tolist()]
    return LogitsSummary(
        entropy=float(statistics.entropy[index]),
        varentropy=float(statistics.varentropy[index]),
        margin=top[0] - top[1],
        logprob=float(logit) - normaliser,
        rank=int((row > logit).sum()),
        topk_ids=tuple(statistics.top_ids[index].tolist()),
        topk_logprobs=tuple(top),
    )
