"""The distribution a token was really drawn from, rebuilt from raw logits and the request's sampling parameters.

vLLM's sampler changes raw logits in this order: penalties, temperature, min-p, top-k, top-p. That is repeated here.
What cannot be repeated from a capture (grammars, biases, bad words, custom processors) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tracer.analysis.logit_signals import kl_divergence, log_softmax

__all__ = ["Sampling", "final_logprobs", "processor_shift", "removed_mass"]

Array = NDArray[Any]
GREEDY_BELOW: Final = 1e-5
"""Temperatures that vLLM's sampler takes for 0."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The parameters that change the distribution, by vLLM's names and with its defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    other: tuple[str, ...] = field(default=())
    """Names of what else may have changed it and cannot be repeated here."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Sampling:
        """From a mapping by those names; TypeError names one that is not known."""
        plain: dict[str, Any] = dict(values)
        return cls(**plain | {"other": tuple(plain.get("other", ()))})


def final_logprobs(
    logits: Array, sampling: Sampling, prompt: Sequence[int] | Array = (), output: Sequence[int] | Array = ()
) -> Array:
    """Log-distribution `[step, vocab]` that each token was drawn from; minus infinity for tokens that could not come.

    logits: raw `[step, vocab]`; prompt, output: token IDs that the penalties look at, of which step i sees the output's
    first i. Greedy sampling (temperature 0) gives the best token alone. Raises ValueError naming what cannot be
    repeated.
    """
    if sampling.other:
        raise ValueError(f"the final distribution cannot be rebuilt: {', '.join(sampling.other)} changed it")
    values = np.array(logits, dtype=np.float64)
    _penalise(values, sampling, np.asarray(prompt, np.int64), np.asarray(output, np.int64))
    if sampling.temperature < GREEDY_BELOW:
        return _greedy(values)
    values /= sampling.temperature
    if sampling.min_p > 0:
        p = np.exp(log_softmax(values))
        values[p < sampling.min_p * p.max(axis=-1, keepdims=True)] = -np.inf
    if 0 < sampling.top_k < values.shape[-1]:
        values[values < np.partition(values, -sampling.top_k, axis=-1)[..., [-sampling.top_k]]] = -np.inf
    if sampling.top_p < 1:
        _keep_nucleus(values, sampling.top_p)
    return log_softmax(values)


def _penalise(values: Array, sampling: Sampling, prompt: Array, output: Array) -> None:
    """In place. Repetition looks at the prompt and the output so far, presence and frequency at the output alone."""
    if sampling.repetition_penalty == 1 and not sampling.presence_penalty and not sampling.frequency_penalty:
        return
    seen = np.zeros(values.shape[-1], dtype=bool)
    seen[prompt] = True
    counts = np.zeros(values.shape[-1])
    for step in range(len(values)):
        if step:
            counts[output[step - 1]] += 1
        chosen = seen | (counts > 0)
        repeated, factor = values[step, chosen], sampling.repetition_penalty
        values[step, chosen] = np.where(repeated > 0, repeated / factor, repeated * factor)
        values[step] -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)


def _greedy(values: Array) -> Array:
    out = np.full(values.shape, -np.inf)
    np.put_along_axis(out, values.argmax(axis=-1)[..., None], 0.0, axis=-1)
    out[~np.isfinite(values.max(axis=-1))] = np.nan
    return out


def _keep_nucleus(values: Array, mass: float) -> None:
    """In place: drop the least likely tokens that hold together at most 1 - `mass`, and keep at least one."""
    order = values.argsort(axis=-1)
    p = np.exp(log_softmax(np.take_along_axis(values, order, axis=-1)))
    drop = np.cumsum(p, axis=-1) <= 1 - mass
    drop[..., -1] = False
    np.put_along_axis(values, order, np.where(drop, -np.inf, np.take_along_axis(values, order, axis=-1)), axis=-1)


def processor_shift(logits: Array, final: Array) -> Array:
    """KL(final || raw) of each step: how far processors moved the distribution; nat, `[step]`.

    final: log-distribution `[step, vocab]` of `final_logprobs`. Greedy sampling moves it by minus the best token's
    raw log p.
    """
    return kl_divergence(final, log_softmax(logits))


def removed_mass(logits: Array, final: Array) -> Array:
    """Raw probability of the tokens that processors made impossible; 0 to 1, `[step]`."""
    p = np.exp(log_softmax(logits))
    lost = np.isnan(final).any(axis=-1)
    return np.where(lost, np.nan, np.where(np.isneginf(final), p, 0.0).sum(axis=-1))
