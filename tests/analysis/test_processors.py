"""The rebuilt distribution against a second implementation in PyTorch, one step and one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tracer.analysis.logit_signals import log_softmax
from tracer.analysis.processors import Sampling, final_logprobs, processor_shift, removed_mass

PROMPT, OUTPUT = [3, 5, 5], [7, 7, 9, 1]
LOGITS = np.random.default_rng(5).normal(0, 3, (4, 30)).astype(np.float16)


def reference(row: Any, so_far: list[int], chosen: Sampling) -> Any:
    z = torch.tensor(row, dtype=torch.float64)
    for token in range(len(z)):
        if token in PROMPT or token in so_far:
            z[token] = z[token] / chosen.repetition_penalty if z[token] > 0 else z[token] * chosen.repetition_penalty
        z[token] -= chosen.frequency_penalty * so_far.count(token) + chosen.presence_penalty * (token in so_far)
    z /= chosen.temperature
    p = torch.softmax(z, 0)
    z[p < chosen.min_p * p.max()] = -torch.inf
    if chosen.top_k > 0:
        z[z < torch.topk(z, chosen.top_k).values[-1]] = -torch.inf
    p, above = torch.softmax(z, 0), 0.0
    for token in torch.argsort(z, descending=True).tolist():
        if above >= chosen.top_p:
            z[token] = -torch.inf
        above += float(p[token])
    return torch.log_softmax(z, 0)


@pytest.mark.parametrize(
    "chosen",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_k=-1, top_p=0.8),
        Sampling(min_p=0.05),
        Sampling(repetition_penalty=1.3),
        Sampling(presence_penalty=0.5, frequency_penalty=0.25),
        Sampling(0.6, 0.9, 12, 0.01, 1.1, 0.2, 0.1),
    ],
)
def test_against_a_second_implementation(chosen: Sampling) -> None:
    final = final_logprobs(LOGITS, chosen, PROMPT, OUTPUT)
    for step, row in enumerate(LOGITS):
        np.testing.assert_allclose(final[step], reference(row, OUTPUT[:step], chosen), atol=1e-9)
    p, q = np.exp(final), np.exp(log_softmax(LOGITS))
    shift = [sum(p[i, v] * np.log(p[i, v] / q[i, v]) for v in range(30) if p[i, v]) for i in range(4)]
    np.testing.assert_allclose(processor_shift(LOGITS, final), shift, atol=1e-9)
    np.testing.assert_allclose(removed_mass(LOGITS, final), np.where(p > 0, 0, q).sum(axis=1), atol=1e-12)


def test_nothing_done_is_no_shift() -> None:
    final = final_logprobs(LOGITS, Sampling())
    np.testing.assert_allclose(processor_shift(LOGITS, final), 0, atol=1e-12)
    assert removed_mass(LOGITS, final).tolist() == [0, 0, 0, 0]


def test_greedy_is_the_best_token_after_penalties() -> None:
    logits = np.array([[2.0, 1.9, 0.0]])
    final = final_logprobs(logits, Sampling(temperature=0.0, repetition_penalty=2.0), prompt=[0])
    assert final[0].tolist() == [-np.inf, 0.0, -np.inf]
    assert processor_shift(logits, final) == pytest.approx(-log_softmax(logits)[:, 1])


def test_what_cannot_be_repeated_is_refused() -> None:
    chosen = Sampling.of({"temperature": 0.5, "other": ["logit_bias", "structured_outputs"]})
    with pytest.raises(ValueError, match="cannot be rebuilt: logit_bias, structured_outputs changed it"):
        final_logprobs(LOGITS, chosen)
    with pytest.raises(TypeError, match="beam"):
        Sampling.of({"beam": 3})


def test_a_lost_row_stays_lost() -> None:
    rows = np.concatenate([LOGITS[:1], np.full((1, 30), np.nan, np.float16)])
    for chosen in (Sampling(temperature=0.0), Sampling(0.7, 0.9, 5, 0.1)):
        final = final_logprobs(rows, chosen)
        assert np.isnan(processor_shift(rows, final)).tolist() == [False, True]
        assert np.isnan(removed_mass(rows, final)).tolist() == [False, True]
