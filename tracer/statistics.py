"""Statistics of logits rows: pure tensor maths, natural logarithms, raw logits before any processor.

Entropy as Shannon defined it, varentropy as the variance of `-log p`, margin as the gap of the two best
log-probabilities; docs/spans.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from tracer.records import LogitsSummary

__all__ = ["RowStatistics", "logits_statistics", "logits_summaries"]

LOWEST: Final = -1e4
"""Stands for minus infinity: `exp` of it is 0, and 0 times it is 0, so a masked token adds nothing."""
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
    """With `y = z - max z`, `log p = y - log sum e^y`: entropy and varentropy are moments of `y`."""
    top_logits, top_ids = torch.topk(logits, k, dim=-1)
    y = (logits - top_logits[:, :1]).clamp_(min=LOWEST)
    p = torch.exp(y)
    total = p.sum(dim=-1)
    first = torch.linalg.vecdot(p, y) / total
    second = torch.linalg.vecdot(p.mul_(y), y) / total
    log_total = torch.log(total)
    varentropy = (second - first.square()).clamp_(min=0.0)
    return RowStatistics(top_logits[:, 0] + log_total, log_total - first, varentropy, top_logits, top_ids)


def logits_summaries(
    logits: torch.Tensor, statistics: RowStatistics, tokens: Sequence[int | None]
) -> list[LogitsSummary | None]:
    """The summary of each row once its sampled token is known; None where nothing was sampled.

    logits: float32 [rows, vocab], the matrix that `statistics` are of. Synchronises with the device once a column.
    """
    chosen = torch.tensor([token or 0 for token in tokens], device=logits.device)
    picked = logits.gather(1, chosen[:, None])
    ranks = (logits > picked).sum(dim=-1).tolist()
    logprobs = (picked[:, 0] - statistics.normaliser).tolist()
    best = (statistics.top_logits - statistics.normaliser[:, None]).tolist()
    columns = (statistics.entropy.tolist(), statistics.varentropy.tolist(), best, statistics.top_ids.tolist())
    rows = zip(tokens, *columns, logprobs, ranks, strict=True)
    return [None if token is None else _summary(*row) for token, *row in rows]


def _summary(
    entropy: float, varentropy: float, best: list[float], ids: list[int], logprob: float, rank: int
) -> LogitsSummary:
    return LogitsSummary(entropy, varentropy, best[0] - best[1], logprob, rank, tuple(ids), tuple(best))
