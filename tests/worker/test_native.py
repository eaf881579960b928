"""The C kernels against the torch reference: any layout, mask, type and length."""

from __future__ import annotations

import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.cases import (
    TYPES,
    Case,
    attend,
    cases,
    check_blocks,
    check_rows,
    collect,
    holding,
    make_layer,
    traced,
)
from tracer import records
from tracer.rebuilt import rebuild_rows
from tracer.statistics import logits_statistics, logits_summaries
from tracer.worker import native
from tracer.worker.attention import LayerMath
from tracer.worker.batch import Row
from tracer.worker.keys import KeyLayout
from tracer.worker.layers import Layer
from tracer.worker.maths import choose
from tracer.worker.native import NativeError
from tracer.worker.native_maths import NativeMaths
from tracer.worker.torch_maths import TorchMaths
from tracer.worker.work import Work

CPU = torch.device("cpu")
WHOLE = records.CaptureSpec(None, records.AttentionSpec(dtype="f32"))


@settings(max_examples=120, deadline=None)
@given(cases())
def test_rows_and_features_are_those_of_torch(case: Case) -> None:
    got, said = attend(NativeMaths(native.load(), [case.layer], 3), case)
    wanted, expected = attend(TorchMaths(3), case)
    check_rows(got, said, wanted, expected)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["decode", "all"]), st.sampled_from([None, "f16", "f32"]), st.sampled_from([0, 40]))
def test_queries_and_keys_are_those_of_the_cache(case: Case, rows: Any, dtype: Any, sent: int) -> None:
    window = case.layer.math.sliding_window if case.layer.math is not None else None
    info = replace(case.layer.info, sliding_window=window)
    case = replace(case, layer=replace(case.layer, info=info))
    spec = records.QKSpec(rows=rows, dtype=dtype)
    got = collect(NativeMaths(native.load(), [case.layer], 3), case, spec, sent)
    wanted = collect(TorchMaths(3), case, spec, sent)
    check_blocks(got, wanted)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_rows_rebuilt_from_queries_and_keys_are_those_of_the_worker(case: Case) -> None:
    maths = case.layer.math
    assert maths is not None
    facts = {
        "scale": maths.scale, "soft_cap": maths.soft_cap, "sliding_window": maths.sliding_window,
        "alibi_slopes": None if maths.alibi_slopes is None else maths.alibi_slopes.tolist(),
        "sink_logits": None if maths.sinks is None else maths.sinks.tolist(),
    }  # fmt: skip
    native_maths = NativeMaths(native.load(), [case.layer], 3)
    whole = [Work(work.row, traced(WHOLE, list(range(case.layer.info.num_heads)))) for work in case.works]
    whole = [replace(work, row=replace(work.row, prompt_tokens=work.row.position + 1)) for work in whole]
    case = replace(case, works=whole)
    stored, _ = attend(native_maths, case)
    for work, arrays, blocks in zip(case.works, stored, collect(native_maths, case, records.QKSpec(), 0), strict=True):
        key = blocks["key"][0][:1]
        if "key_prompt" in blocks:
            key = np.concatenate([blocks["key_prompt"][0][:, 0], key])
        rows = rebuild_rows(blocks["query"][0][:1], key, np.array([work.row.position]), facts)
        np.testing.assert_allclose(rows[:, 0], arrays["attention"][0], rtol=0, atol=1e-5)


def test_the_summary_names_the_largest_weight_outside_the_first_position() -> None:
    cache = torch.zeros(2, 1, 16, 16)
    layer = make_layer(0, "transposed", 16, 8, 1, LayerMath(1.0), cache)
    flat = cache[1, 0].reshape(-1)
    for dim in range(8):
        flat[dim * 16 + 5] = 3.0  # token 5 of the block
    work = Work(Row("r", 0, 0, 1, 9, 10, samples=True), traced(records.CaptureSpec(summary=True), [0, 1]))
    query = torch.ones(1, 2, 8)
    query[0, 1] = -1.0
    case = Case(layer, cache, torch.tensor([[1]], dtype=torch.int32), [work], query)
    _, [summary] = attend(NativeMaths(native.load(), [layer], 3), case)
    assert summary is not None
    assert (summary.top_position, summary.top_layer, summary.top_head) == (5, 0, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(TYPES)), st.integers(1, 4), st.sampled_from([7, 16, 100, 5000]), st.integers(0, 1000),
    st.booleans(),
)  # fmt: skip
def test_logit_statistics_are_those_of_torch(name: str, rows: int, vocab: int, seed: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows + 1, vocab, generator=generator) * 6).to(TYPES[name])
    if masked:
        logits[:, vocab // 2] = -torch.inf
    spec = records.CaptureSpec(records.LogitsSpec(dtype="f32"))
    works = [Work(Row(f"r{i}", i + 1, i, 1, 5, 6, True), traced(spec, [], ()), i) for i in range(rows)]
    tokens = [seed % vocab, *[None if vocab == 7 else 3] * (rows - 1)]
    maths, k = NativeMaths(native.load(), [], 3), 3
    step = holding(works)
    before = logits.clone()
    maths.logits(step, works, logits)
    logits.zero_()  # what a sampler may do with its own tensor
    for work, token in zip(works, tokens, strict=True):
        work.token = token
    maths.finish(step)
    kept = before[1:].float()
    expected = logits_summaries(kept, logits_statistics(kept, k), tokens)
    for work, wanted, row in zip(works, expected, kept, strict=True):
        [(_, stored, _)] = work.arrays
        np.testing.assert_array_equal(np.asarray(stored), row.numpy())
        assert (work.logits is None) == (wanted is None)
        if wanted is not None and work.logits is not None:
            assert work.logits.rank == wanted.rank
            assert work.logits.topk_logprobs == pytest.approx(wanted.topk_logprobs, abs=1e-5)
            assert work.logits.entropy == pytest.approx(wanted.entropy, abs=1e-4)
            assert work.logits.varentropy == pytest.approx(wanted.varentropy, abs=1e-3)
            assert work.logits.logprob == pytest.approx(wanted.logprob, abs=1e-5)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_stored_halves_are_those_of_torch(name: str) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    logits = every.view(TYPES[name]) if name != "float32" else torch.randn(1 << 16) * torch.logspace(-9, 5, 1 << 16)
    logits = logits[torch.isfinite(logits.float())][None]
    work = Work(Row("r", 0, 0, 1, 5, 6, True), traced(records.CaptureSpec(records.LogitsSpec()), [], ()), 0)
    step, maths = holding([work]), NativeMaths(native.load(), [], 3)
    maths.logits(step, [work], logits)
    maths.finish(step)
    [(_, stored, _)] = work.arrays
    np.testing.assert_array_equal(np.asarray(stored), logits[0].float().to(torch.float16).numpy())


def test_buffers_are_used_again() -> None:
    cache = torch.randn(4, 1, 16, 16)
    layer = make_layer(0, "rows", 16, 8, 1, LayerMath(1.0), cache)
    spec = records.CaptureSpec(None, records.AttentionSpec())
    work = Work(Row("r", 0, 0, 1, 9, 10, samples=True), traced(spec, [0, 1]))
    case = Case(layer, cache, torch.tensor([[1]], dtype=torch.int32), [work], torch.randn(1, 2, 8))
    maths = NativeMaths(native.load(), [layer], 3)
    attend(maths, case)
    [buffers] = maths._pool
    memory = buffers.rows
    attend(maths, case)
    assert maths._pool[0].rows is memory


def test_what_the_kernel_was_not_told_about_is_refused() -> None:
    cache = torch.randn(4, 1, 16, 16)
    layer = make_layer(0, "rows", 16, 8, 1, LayerMath(1.0), cache)
    spec = records.CaptureSpec(None, records.AttentionSpec())
    work = Work(Row("r", 0, 0, 1, 9, 10, samples=True), traced(spec, [0, 1]))
    table, query = torch.tensor([[1]], dtype=torch.int32), torch.randn(1, 2, 8)
    maths = NativeMaths(native.load(), [layer], 3)
    for bad in (
        Case(layer, cache, table, [work], query.bfloat16()),
        Case(layer, cache, table.long(), [work], query),
        Case(layer, torch.randn(4, 16, 1, 16).transpose(1, 2), table, [work], query),
    ):
        with pytest.raises(TypeError):
            attend(maths, bad)


def test_kernels_that_disagree_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    cache = torch.randn(4, 1, 16, 16)
    good = make_layer(0, "rows", 16, 8, 1, LayerMath(1.0), cache)
    assert good.keys is not None
    lying = Layer(good.info, good.module, good.math, KeyLayout(16, 8, good.keys.offsets, (0, 1, 16)))
    assert choose([good], CPU, 3).name == "native"
    wrong = NativeMaths(native.load(), [good], 3)
    wrong._layers[0].struct.scale = 2.0
    with pytest.raises(NativeError, match="differ from torch"):
        wrong._check(good)
    assert lying.keys is not None


def test_without_a_compiler_torch_does_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NativeError, match="install one"):
        native.load.__wrapped__()


def test_a_library_that_others_could_have_written_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._built().parent.chmod(0o777)
    with pytest.raises(NativeError, match="not this user's alone"):
        native._built()


def test_the_library_is_built_once_and_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = native._built()
    made = first.stat()
    assert native._built() == first
    assert first.stat().st_mtime_ns == made.st_mtime_ns
    assert stat.S_IMODE(made.st_mode) == 0o700
    assert [item.name for item in first.parent.iterdir()] == [first.name]
