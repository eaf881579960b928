"""Signals of attention rows; the conventions are in docs/signals.md.

Each function takes weights `[..., key]` of rows whose query sees the keys 0 … n - 1 (n = `visible`, int, shaped
`[...]` or broadcastable to it), as they are stored: not renormalised, 0 after the last visible key. Results are
float64 `[...]`. A row without any weight was not stored and gives NaN.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "attention_entropy",
    "copy_mass",
    "key_mass",
    "lookback_ratio",
    "max_system_attention",
    "region_mass",
    "self_weight",
    "sink_mass",
]

Array = NDArray[Any]
FIRST_KEYS: Final = 5
"""Keys that the seed project's rule leaves out: the sink and its neighbours."""


def _lost(rows: Array) -> Array:
    """True where a row was not stored: a softmax leaves no row without weight."""
    found: Array = ~np.any(rows, axis=-1)
    return found


def _wide(rows: Array) -> Array:
    return np.asarray(rows, dtype=np.float64)


def key_mass(rows: Array, keys: Array) -> Array:
    """Weight on a set of keys, sum of A_j over j in the set; 0 to 1. keys: bool `[key]` or broadcastable to `rows`."""
    total = np.where(keys, _wide(rows), 0.0).sum(axis=-1)
    return np.where(_lost(rows), np.nan, total)


def region_mass(rows: Array, regions: Array) -> Array:
    """`key_mass` of several sets at once, `[..., region]`; regions: bool `[region, key]`."""
    return np.where(_lost(rows)[..., None], np.nan, _wide(rows) @ np.asarray(regions, np.float64).T)


def sink_mass(rows: Array, *, learned: bool | Array) -> Array:
    """Weight that goes nowhere: on position 0, and with learned sinks on them, A_0 + (1 - sum A); 0 to 1.

    learned: whether the layer has learned sinks (broadcastable to `[...]`); without them what a row lacks to 1 is
    rounding, and left out.
    Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks".
    """
    wide = _wide(rows)
    extra = np.where(learned, np.maximum(1.0 - wide.sum(axis=-1), 0.0), 0.0)
    return np.where(_lost(rows), np.nan, wide[..., 0] + extra)


def self_weight(rows: Array, visible: ArrayLike) -> Array:
    """Weight of a row on its own position, A_(n - 1): the last key it sees; 0 to 1."""
    last = np.broadcast_to(np.asarray(visible) - 1, rows.shape[:-1])[..., None]
    return np.where(_lost(rows), np.nan, np.take_along_axis(_wide(rows), last, axis=-1)[..., 0])


def attention_entropy(rows: Array) -> Array:
    """Entropy of a row, -sum A log A; nat. A learned sink's share is no key and has no term."""
    wide = _wide(rows)
    logs = np.log(wide, out=np.zeros_like(wide), where=wide > 0)
    return np.where(_lost(rows), np.nan, -(wide * logs).sum(axis=-1))


def lookback_ratio(rows: Array, prompt: int, visible: ArrayLike) -> Array:
    """Mean weight on the prompt's keys over the sum of that and the mean weight on the answer's keys; 0 to 1.

    Means, not sums, over the `prompt` first keys and over the n - prompt keys of the answer so far; NaN at step 0,
    which has no answer before it. Chuang et al. 2024, "Lookback Lens".
    """
    wide, answer = _wide(rows), np.asarray(visible) - prompt
    context = wide[..., :prompt].mean(axis=-1)
    own = wide[..., prompt:].sum(axis=-1) / np.maximum(answer, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = context / (context + own)
    return np.where(_lost(rows) | (answer < 1), np.nan, ratio)


def copy_mass(rows: Array, keys: ArrayLike, tokens: ArrayLike, visible: ArrayLike) -> Array:
    """Weight on keys that show the predicted token, or stand right before it; 0 to 1.

    rows: `[step, ..., key]`; keys: token IDs x `[key]`; tokens: the predicted y `[step]`; visible: n `[step]`. Key j
    counts where x_j = y, or x_(j + 1) = y with j + 1 < n: heads that match, and induction heads, which look at what
    came next (Olsson et al. 2022). The key at n is y itself, so that the last visible key must not count for it.
    """
    known, wanted = np.asarray(keys), np.asarray(tokens)
    if len(known) != rows.shape[-1]:
        raise ValueError(f"{len(known)} token IDs for rows of {rows.shape[-1]} keys: give one for each key")
    same = known[None, :] == wanted[:, None]
    before = np.zeros_like(same)
    before[:, :-1] = same[:, 1:]
    before &= np.arange(len(known)) + 1 < np.asarray(visible)[:, None]
    shape = (len(wanted), *[1] * (rows.ndim - 2), len(known))
    return key_mass(rows, (same | before).reshape(shape))


def max_system_attention(rows: Array, system: Array) -> Array:
    """The largest head-mean weight on a system token, max over j of mean over h of A_(h, j); 0 to 1.

    rows: `[..., head, key]`, gives `[...]`; system: bool `[key]`. The first five keys are left out, as in the rule of
    the seed project (over 0.10 anywhere in the answer: "verified"), which docs/signals.md says what to think of.
    """
    keys = np.array(system, dtype=bool)
    keys[:FIRST_KEYS] = False
    lost = _lost(rows).all(axis=-1)
    if not keys.any():
        return np.full(lost.shape, np.nan)
    best = _wide(rows).mean(axis=-2)[..., keys].max(axis=-1)
    return np.where(lost, np.nan, best)
