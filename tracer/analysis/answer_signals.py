"""Signals of a whole answer from its attention and log-probabilities; the conventions are in docs/signals.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["attention_score", "laplacian_eigenvalues", "middle_third", "rauq", "rauq_layers"]

Array = NDArray[Any]
ALPHA: Final = 0.2
"""Weight of a token's own probability in RAUQ, the authors' for base models; theirs for instruct models is 0.5."""


def rauq_layers(logprobs: Array, last_key: Array, alpha: float = ALPHA) -> Array:
    """RAUQ's uncertainty of each layer, `[layer]`; nat, 0 and more, larger is less sure.

    logprobs: log p of the sampled tokens `[step]`; last_key: weight of each step's row on its last key, which is the
    token before the predicted one, `[step, layer, head]`. Of each layer the head with the largest mean weight over the
    steps from 1 on is followed: c_0 = p_0, c_i = a p_i + (1 - a) w_i c_(i - 1), u = -mean log c. A lost step makes its
    layer NaN. Vazhentsev et al. 2025, "Uncertainty-Aware Attention Heads" (their code gives 1 + u, in the same order).
    """
    if not len(logprobs):
        return np.full(last_key.shape[1:2], np.nan)
    p, weights = np.exp(np.asarray(logprobs, np.float64)), np.asarray(last_key, np.float64)
    layers = weights.shape[1]
    chosen = np.zeros((len(p), layers))
    if len(p) > 1:
        # Heads that a layer does not have are NaN everywhere; a lost row is NaN in every head.
        means = np.nan_to_num(weights[1:], nan=-np.inf).mean(axis=0)
        heads = np.where(np.isneginf(means).all(axis=-1), 0, means.argmax(axis=-1))
        chosen = weights[:, np.arange(layers), heads]
    held = np.full(layers, p[0])
    total = np.log(held)
    for step in range(1, len(p)):
        held = alpha * p[step] + (1 - alpha) * chosen[step] * held
        total = total + np.log(held)
    out: Array = -total / len(p)
    return out


def middle_third(layers: int) -> range:
    """The layers that RAUQ looks at, of a model of so many: from a third to two thirds of its depth."""
    return range(layers // 3, max(2 * layers // 3, layers // 3 + 1))


def rauq(layer_values: Array) -> float:
    """The largest of the layers' uncertainties; NaN if there are none or one is not known."""
    return float(np.max(layer_values)) if len(layer_values) else float("nan")


def attention_score(own: Array) -> Array:
    """LLM-Check's attention score of each layer, `[layer]`: sum over heads of the mean of log A_ii; nat, 0 and less.

    own: weights of the answer's tokens on themselves, `[token, layer, head]`. The row of output token i is step
    i + 1's, so that a capture's steps from 1 on are what belongs here, and the last token has no row. NaN heads do not
    exist in that layer; a lost row makes its layer NaN. Sriramanan et al. 2024; the log-determinant of a triangular
    map is the sum of the logarithms of its diagonal.
    """
    weights = np.asarray(own, np.float64)
    if not len(weights):
        return np.full(weights.shape[1:2], np.nan)
    exists = ~np.isnan(weights).all(axis=0)
    with np.errstate(divide="ignore"):
        means = np.log(weights).mean(axis=0)
    out: Array = np.where(exists, means, 0.0).sum(axis=-1)
    return np.where(exists.any(axis=-1), out, np.nan)


def laplacian_eigenvalues(blocks: Iterable[Array], positions: int, k: int = 10) -> Array:
    """LapEigvals: the k largest eigenvalues of an attention map's Laplacian, descending, `[head, k]`; -1 to 1.

    blocks: the rows of the whole causal map of prompt and answer in order, each `[head, row, key]`, together
    `positions` rows. With T positions, d_j = sum over i >= j of A_ij / (T - j), the mean weight that later rows (and j
    itself) give to j; L = diag(d) - A is triangular, so that its eigenvalues are d_j - A_jj. Padded with NaN below k
    positions; all NaN for a head of which a row was not stored. Binkowski et al. 2025, "Hallucination Detection in
    LLMs Using Spectral Features of Attention Maps".
    """
    totals, diagonal = np.zeros(0), np.zeros(0)
    lost, at = np.zeros(0, dtype=bool), 0
    for block in blocks:
        wide = np.asarray(block, np.float64)
        if not at:
            totals, diagonal = np.zeros((2, len(wide), positions))
            lost = np.zeros(len(wide), dtype=bool)
        keys, rows = wide.shape[-1], np.arange(wide.shape[1])
        totals[:, :keys] += wide.sum(axis=1)
        diagonal[:, at + rows] = wide[:, rows, at + rows]
        lost |= (~wide.any(axis=-1)).any(axis=-1)
        at += len(rows)
    if at != positions or not at:
        raise ValueError(f"the map has {at} rows of {positions}: give one for each position")
    values = totals / (positions - np.arange(positions)) - diagonal
    best = -np.sort(-values, axis=-1)[:, :k]
    out = np.full((len(values), k), np.nan)
    out[:, : best.shape[1]] = np.where(lost[:, None], np.nan, best)
    return out
