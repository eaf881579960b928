"""Families of models on the machine's own engine, by attention backend; `prove.sh` gives this file to pytest.

In float32 every row is that of Transformers' eager attention on the CPU. FlashAttention has no float32: there, in
bfloat16, weights times values must be the backend's own output (`tracer.worker.rehearsal`), and the first layer, whose
inputs are exact, must be near the eager one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from tests.integration.models import FAMILIES, make_model
from tests.integration.oracle import oracle
from tests.integration.runs import prompt
from tracer import config, open_capture
from tracer.export import engine_infos
from tracer.worker import compat

GPU: Final = torch.cuda.is_available()
EXACT: Final = ("TRITON_ATTN", "FLEX_ATTENTION") if GPU else ("CPU_ATTN",)
ROUNDED: Final = ("FLASH_ATTN", "TRITON_ATTN") if GPU else ("CPU_ATTN",)
FLEX_LACKS: Final = {"gpt_oss": "sinks"}
OPTIONS: Final[dict[str, Any]] = {"gpu_memory_utilization": 0.3, "enforce_eager": False} if GPU else {}
WHOLE: Final = "logits;dtype=f32, attention;rows=all;dtype=f32, qk;rows=all"


def backend(name: str) -> dict[str, Any]:
    return OPTIONS | ({"attention_backend": name} if GPU else {})


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_rows_are_those_of_eager(
    family: str, name: str, models: Path, offline: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    if name == "FLEX_ATTENTION" and family in FLEX_LACKS:
        pytest.skip(f"FlexAttention has no {FLEX_LACKS[family]}")
    path, tokens = make_model(family, models), prompt(70)
    with offline(path, **backend(name)) as (llm, record), record(WHOLE) as run:
        [info] = engine_infos(config.load())
        assert (info.kernels, {layer.backend for layer in info.layers}) == ("triton" if GPU else "native", {name})
        [answer] = generate(llm, [tokens])
    cap, want = open_capture(run.store, run.span_ids[0]), oracle(path, tokens + answer)
    assert cap.complete, cap.missing
    np.testing.assert_allclose(np.asarray(cap.logits), want.logits[69 : 69 + len(answer)], rtol=0, atol=1e-3)
    for layer, rows in enumerate(want.attention):
        got = np.asarray(cap.attention_prefill[layer])[..., :70]
        np.testing.assert_allclose(got, rows[:, :70, :70], rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.asarray(cap.qk_prefill[layer]), rows[:, :70, :70], rtol=0, atol=1e-5)
        for step in range(len(answer)):
            for head in range(len(rows)):
                row = cap.row(step=step, layer=layer, head=head)
                np.testing.assert_allclose(row, rows[head, 69 + step, : 70 + step], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_bfloat16_rows_explain_the_backends_output(
    family: str,
    name: str,
    models: Path,
    offline: Callable[..., Any],
    generate: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "version", lambda: "0.99.0")  # one that must pass the test at the worker's start
    path, tokens = make_model(family, models), prompt(70)
    with offline(path, dtype="bfloat16", **backend(name)) as (llm, record):
        [info] = engine_infos(config.load())
        assert (info.logits_unsupported, {layer.backend for layer in info.layers}) == (None, {name})
        with record("logits, attention;dtype=f32") as run:
            [answer] = generate(llm, [tokens])
    cap, want = open_capture(run.store, run.span_ids[0]), oracle(path, tokens + answer)
    assert cap.complete, cap.missing
    for step in range(len(answer)):
        row = cap.row(step=step, layer=0, head=1)
        np.testing.assert_allclose(row, want.attention[0, 1, 69 + step, : 70 + step], rtol=0, atol=0.05)
