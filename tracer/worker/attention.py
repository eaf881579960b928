"""Attention rows from queries and keys: the softmax the engine's kernel never writes down, and its statistics.

Plain torch in float32, the reference that faster kernels are checked against. Everything a causal softmax layer can
have is a parameter; a layer with anything else is refused by `layers.describe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from tracer.records import AttentionSummary

__all__ = ["FEATURES", "LayerMath", "attention_last_rows", "attention_rows", "row_features", "summarise"]

FEATURES: Final = ("entropy", "sink_mass", "prompt_mass", "self_weight")
"""Last axis of `row_features`, in this order."""
SCORES_AT_ONCE: Final = 1 << 23
"""Scores per softmax, 32 MB in float32: bounds the memory of a long prompt's map."""


@dataclass(frozen=True, slots=True)
class LayerMath:
    """What turns queries and keys of one layer into weights."""

    scale: float
    sliding_window: int | None = None
    """Number of visible keys, the query's own included."""
    soft_cap: float | None = None
    """Scores become `cap * tanh(score / cap)` (Gemma 2)."""
    alibi_slopes: torch.Tensor | None = None
    """float32 [heads]: `slope * (key - query)` is added (ALiBi, arXiv 2108.12409)."""
    sinks: torch.Tensor | None = None
    """[heads]: one more score per head in the denominator (gpt-oss); rows then sum to less than 1."""


def attention_rows(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, math: LayerMath) -> torch.Tensor:
    """Weights of each query row on each key, float32 [heads, rows, keys].

    query: [rows, heads, head_size] after rotary embedding; key: [kv_heads, keys, head_size], key j at position j;
    positions: int64 [rows], absolute. Keys after a row's position and outside its window get exactly 0. A row whose
    scores are no numbers (NaN or infinite queries or keys: a broken model) is NaN.
    """
    rows = max(1, SCORES_AT_ONCE // (query.shape[1] * key.shape[1]))
    parts = [
        _softmax_rows(query[start : start + rows], key, positions[start : start + rows], math)
        for start in range(0, len(query), rows)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def attention_last_rows(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, math: LayerMath
) -> torch.Tensor:
    """Like `attention_rows` for rows of different requests, each with keys of its own, in one pass.

    query: [rows, heads, head_size]; key: [kv_heads, rows, keys, head_size], where what lies after a row's position may
    be anything; result float32 [heads, rows, keys].
    """
    rows, heads, size = query.shape
    groups = key.shape[0]
    grouped = query.float().view(rows, groups, heads // groups, size)
    scores = torch.matmul(grouped, key.float().permute(1, 0, 3, 2)).reshape(rows, heads, -1)
    return _weigh(scores.transpose(0, 1) * math.scale, positions, math)


def _softmax_rows(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, math: LayerMath) -> torch.Tensor:
    rows, heads, size = query.shape
    groups = key.shape[0]
    grouped = query.float().transpose(0, 1).reshape(groups, heads // groups * rows, size)
    scores = torch.bmm(grouped, key.float().transpose(1, 2)).view(heads, rows, -1) * math.scale
    return _weigh(scores, positions, math)


def _weigh(scores: torch.Tensor, positions: torch.Tensor, math: LayerMath) -> torch.Tensor:
    """Scaled scores [heads, rows, keys] through everything that follows them."""
    if math.soft_cap is not None:
        scores = math.soft_cap * torch.tanh(scores / math.soft_cap)
    distance = torch.arange(scores.shape[-1], device=scores.device) - positions[:, None]
    if math.alibi_slopes is not None:
        scores = scores + math.alibi_slopes.to(scores)[:, None, None] * distance
    hidden = distance > 0
    if math.sliding_window is not None:
        hidden = hidden | (distance <= -math.sliding_window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if math.sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = math.sinks.to(scores)[:, None, None].expand(*scores.shape[:2], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


def row_features(weights: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
    """float32 [..., 4] as in FEATURES, for rows [..., keys] whose own position is the last key.

    A row of zeros is no row (a layer with fewer heads than others leaves some): its features are NaN, and so are those
    of a row of NaN.
    """
    entropy = torch.special.entr(weights).sum(dim=-1)
    total = weights.sum(dim=-1)
    sink = weights[..., 0] + (1.0 - total).clamp(min=0.0)
    prompt = weights[..., :prompt_tokens].sum(dim=-1)
    features = torch.stack([entropy, sink, prompt, weights[..., -1]], dim=-1)
    return features.masked_fill((total == 0)[..., None], torch.nan)


def summarise(weights: torch.Tensor, features: torch.Tensor, layers: list[int], heads: list[int]) -> AttentionSummary:
    """Means over layers and heads, and the largest weight outside position 0.

    weights: [layers, heads, keys]; features: [layers, heads, 4]; layers, heads: the model's indices of those axes.
    """
    entropy, sink, prompt, own = features.nanmean(dim=(0, 1)).tolist()
    if weights.shape[-1] < 2:
        return AttentionSummary(entropy, sink, prompt, own, -1, 0.0, -1, -1)
    best, at = weights[..., 1:].flatten().nan_to_num(nan=0.0).max(dim=0)
    row, column = divmod(int(at), weights.shape[-1] - 1)
    layer, head = divmod(row, weights.shape[1])
    if not best > 0:
        return AttentionSummary(entropy, sink, prompt, own, -1, 0.0, -1, -1)
    return AttentionSummary(entropy, sink, prompt, own, column + 1, float(best), layers[layer], heads[head])
