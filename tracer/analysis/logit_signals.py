"""Signals of one next-token distribution, from raw logits; the conventions are in docs/signals.md.

Each function takes logits `[..., vocab]` of any float type and gives float64 `[...]`, computed in float64. With
p = softmax(z) and V the number of finite logits: logits of minus infinity are tokens that cannot come (p = 0). A row
that holds NaN or plus infinity (lost, or overflowed when it was stored) gives NaN. Natural logarithms: nats.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "confidence",
    "entropy",
    "fisher_rao",
    "group_confidence",
    "kl_divergence",
    "log_softmax",
    "logprob",
    "margin",
    "nucleus_size",
    "perplexity",
    "probability_margin",
    "rank",
    "renyi_divergence",
    "self_certainty",
    "top_entropy",
    "varentropy",
]

Array = NDArray[Any]
TOP: Final = 20
"""Best tokens that `confidence` averages over, as the authors' released code does."""
WINDOW: Final = 2048
"""Tokens of one group of `group_confidence`, as in the paper."""


def log_softmax(logits: Array) -> Array:
    """`log p`: z - log sum exp z; float64 `[..., vocab]`, minus infinity where p is 0, NaN in whole rows not known."""
    values = np.asarray(logits, dtype=np.float64)
    top = values.max(axis=-1, keepdims=True)
    known = np.isfinite(top)
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = values - np.where(known, top, np.nan)
        out: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def _plogp(log_p: Array) -> Array:
    """`p log p`, 0 where p is 0; NaN stays."""
    out: Array = np.exp(log_p) * np.where(np.isneginf(log_p), 0.0, log_p)
    return out


def entropy(logits: Array) -> Array:
    """Shannon entropy H = -sum p log p, nat; from 0 (certain) to log V. Shannon 1948."""
    out: Array = -_plogp(log_softmax(logits)).sum(axis=-1)
    return out


def top_entropy(logits: Array, k: int = 50) -> Array:
    """Entropy of the k best logits alone, renormalised among them; nat.

    A different number than `entropy`, and smaller as a rule: LLM-Check (Sriramanan et al. 2024) uses k = 50.
    """
    values = np.asarray(logits, dtype=np.float64)
    kept = min(k, values.shape[-1])
    return entropy(np.partition(values, -kept, axis=-1)[..., -kept:])


def varentropy(logits: Array) -> Array:
    """Variance of the surprise, sum p (log p + H)^2; nat^2. Kontoyiannis and Verdú 2014."""
    log_p = log_softmax(logits)
    mean = _plogp(log_p).sum(axis=-1, keepdims=True)
    deviation = np.where(np.isneginf(log_p), 0.0, log_p - mean)
    out: Array = (np.exp(log_p) * deviation**2).sum(axis=-1)
    return out


def margin(logits: Array) -> Array:
    """`log p` of the best minus that of the second token; nat, infinite if only one can come."""
    best = _two_best(log_softmax(logits))
    with np.errstate(invalid="ignore"):
        out: Array = best[..., 1] - best[..., 0]
    return out


def probability_margin(logits: Array) -> Array:
    """Probability of the best minus that of the second token, 0 to 1. Scheffer et al. 2001 (margin sampling)."""
    best = np.exp(_two_best(log_softmax(logits)))
    out: Array = best[..., 1] - best[..., 0]
    return out


def _two_best(log_p: Array) -> Array:
    """Ascending, `[..., 2]`; rows that are not known stay NaN."""
    return np.partition(log_p, -2, axis=-1)[..., -2:]


def logprob(logits: Array, tokens: ArrayLike) -> Array:
    """`log p` of each row's token; tokens: int `[...]`; nat."""
    log_p = log_softmax(logits)
    out: Array = np.take_along_axis(log_p, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    return out


def rank(logits: Array, tokens: ArrayLike) -> Array:
    """Number of tokens with a larger logit than each row's token: 0 is the best; NaN in rows not known."""
    values = np.asarray(logits, dtype=np.float64)
    mine = np.take_along_axis(values, np.asarray(tokens)[..., None], axis=-1)
    larger = (values > mine).sum(axis=-1).astype(np.float64)
    return np.where(np.isfinite(values.max(axis=-1)), larger, np.nan)


def confidence(logits: Array, k: int = TOP) -> Array:
    """DeepConf's token confidence, minus the mean `log p` of the k best tokens; nat, larger is surer.

    C = -(1/k) sum over the k best of log p: a peaked distribution leaves little for the others. Fu et al. 2025,
    "Deep Think with Confidence".
    """
    log_p = log_softmax(logits)
    kept = min(k, log_p.shape[-1])
    out: Array = -np.partition(log_p, -kept, axis=-1)[..., -kept:].mean(axis=-1)
    return out


def group_confidence(values: Array, window: int = WINDOW) -> Array:
    """Mean of each step's and the `window` - 1 earlier confidences `[step]`; the first steps have shorter groups.

    The lowest group is what DeepConf stops a trace by. A lost step makes the groups that hold it NaN.
    """
    steps = np.arange(1, len(values) + 1)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    lost = np.concatenate([[0], np.cumsum(np.isnan(values))])
    first = np.maximum(steps - window, 0)
    means = (total[steps] - total[first]) / (steps - first)
    return np.where(lost[steps] > lost[first], np.nan, means)


def self_certainty(logits: Array) -> Array:
    """KL(uniform || p) = -(1/V) sum log p - log V over the V tokens that can come; nat, larger is surer.

    Kang et al. 2025, "Scalable Best-of-N Selection for LLMs via Self-Certainty".
    """
    log_p, count = _possible(logits)
    out: Array = -np.where(np.isneginf(log_p), 0.0, log_p).sum(axis=-1) / count - np.log(count)
    return out


def _possible(logits: Array) -> tuple[Array, Array]:
    """`log p`, and how many tokens have a finite one."""
    log_p = log_softmax(logits)
    return log_p, np.maximum((~np.isneginf(log_p)).sum(axis=-1), 1)


def nucleus_size(logits: Array, mass: float = 0.9) -> Array:
    """The least number of tokens that hold together at least `mass`; 1 to V. Holtzman et al. 2020 (top-p)."""
    p = -np.sort(-np.exp(log_softmax(logits)), axis=-1)
    held = np.cumsum(p, axis=-1)
    # A sum of rounded terms may end below a mass of 1: the last token is then the answer.
    sizes = np.minimum((held < mass).sum(axis=-1) + 1, p.shape[-1]).astype(np.float64)
    return np.where(np.isnan(held[..., -1]), np.nan, sizes)


def renyi_divergence(logits: Array, alpha: float = 0.5, temperature: float = 2.0) -> Array:
    """Rényi divergence of p from the uniform distribution, log(sum p^a V^(a - 1)) / (a - 1); nat, larger is surer.

    p is softened by `temperature` first. Darrin et al. 2023, "Rainproof", with its defaults; `alpha` is not 1.
    """
    log_p, count = _possible(np.asarray(logits, dtype=np.float64) / temperature)
    total = np.exp(alpha * log_p).sum(axis=-1)
    out: Array = (np.log(total) + (alpha - 1) * np.log(count)) / (alpha - 1)
    return out


def fisher_rao(logits: Array, temperature: float = 2.0) -> Array:
    """Fisher-Rao distance of p from the uniform distribution, (2/pi) arccos(sum sqrt(p / V)); 0 to 1.

    p is softened by `temperature` first. Darrin et al. 2023, "Rainproof".
    """
    log_p, count = _possible(np.asarray(logits, dtype=np.float64) / temperature)
    overlap = np.exp(log_p / 2).sum(axis=-1) / np.sqrt(count)
    return np.asarray(2 / np.pi * np.arccos(np.clip(overlap, 0.0, 1.0)))


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) = sum p (log p - log q) of two log-distributions `[..., vocab]`; nat, infinite where only q is 0."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_p) * (log_p - log_q)
    out: Array = np.where(np.isneginf(log_p), 0.0, terms).sum(axis=-1)
    return out


def perplexity(logprobs: Array) -> float:
    """exp(-mean log p) of the sampled tokens `[step]`; 1 and more. NaN if a step is lost, or there is none."""
    return float(np.exp(-np.mean(logprobs))) if len(logprobs) else float("nan")
