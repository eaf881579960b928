"""The C kernels against the torch reference: any layout, mask, type and length."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.cases import (
    LOGITS,
    TYPES,
    Case,
    attend,
    cases,
    check_best,
    check_blocks,
    check_rows,
    collect,
    holding,
    make_layer,
    raw_logits,
    traced,
)
from tracer import records
from tracer.rebuilt import rebuild_rows
from tracer.statistics import logits_statistics, logits_summaries
from tracer.worker import native
from tracer.worker.attention import LayerMath
from tracer.worker.batch import Row
from tracer.worker.fp8 import Quantised
from tracer.worker.layers import Layer
from tracer.worker.maths import choose
from tracer.worker.native import NativeError
from tracer.worker.native_layer import NativeLayer
from tracer.worker.native_maths import NativeMaths
from tracer.worker.self_check import checked_lengths, distinct
from tracer.worker.torch_maths import TorchMaths
from tracer.worker.work import Work

CPU = torch.device("cpu")
WHOLE = records.CaptureSpec(None, records.AttentionSpec(dtype="f32"))


def unchecked(layers: list[Layer]) -> NativeMaths:
    """Without the check at start, which has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("check_layer", "check_logits"):
            patch.setattr(f"tracer.worker.native_maths.{name}", lambda *arguments: None)
        return NativeMaths(native.load(), layers, 3)


@settings(max_examples=120, deadline=None)
@given(cases())
def test_rows_and_features_are_those_of_torch(case: Case) -> None:
    got, said = attend(unchecked([case.layer]), case)
    wanted, expected = attend(TorchMaths(3), case)
    check_rows(got, said, wanted, expected)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["decode", "all"]), st.sampled_from([None, "f16", "f32"]), st.sampled_from([0, 40]))
def test_queries_and_keys_are_those_of_the_cache(case: Case, rows: Any, dtype: Any, sent: int) -> None:
    window = case.layer.math.sliding_window if case.layer.math is not None else None
    info = replace(case.layer.info, sliding_window=window)
    case = replace(case, layer=replace(case.layer, info=info))
    spec = records.QKSpec(rows=rows, dtype=dtype)
    got = collect(unchecked([case.layer]), case, spec, sent)
    wanted = collect(TorchMaths(3), case, spec, sent)
    check_blocks(got, wanted)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_rows_of_a_prompt_are_those_of_torch(case: Case) -> None:
    metadata = SimpleNamespace(block_table=case.table, causal=True)
    maths, plain = unchecked([case.layer]), TorchMaths(3)
    for work in case.works:
        if work.traced.attention is None:
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tracer.worker.rows.PROMPT_ROWS", 20)
            arguments = (case.layer, work, case.query, case.cache, metadata)
            got = [(start, block.copy()) for start, block in maths.prompt(*arguments)]
            wanted = [(start, np.asarray(block)) for start, block in plain.prompt(*arguments)]
        assert [start for start, _ in got] == [start for start, _ in wanted]
        for (_, ours), (_, theirs) in zip(got, wanted, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 if ours.dtype == np.float32 else 5e-4)


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
    native_maths = unchecked([case.layer])
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
    _, [summary] = attend(unchecked([layer]), case)
    assert summary is not None
    assert (summary.top_position, summary.top_layer, summary.top_head) == (5, 0, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(TYPES)), st.integers(1, 4), st.sampled_from([7, 16, 100, 5003]), st.integers(0, 1000),
    st.sampled_from(LOGITS),
)  # fmt: skip
def test_logit_statistics_are_those_of_torch(name: str, rows: int, vocab: int, seed: int, kind: str) -> None:
    logits = raw_logits(kind, rows, vocab, seed).to(TYPES[name])
    spec = records.CaptureSpec(records.LogitsSpec(dtype="f32"))
    works = [Work(Row(f"r{i}", i + 1, i, 1, 5, 6, True), traced(spec, [], ()), i) for i in range(rows)]
    tokens = [seed % vocab, *[None if vocab == 7 else 3] * (rows - 1)]
    maths, k = unchecked([]), 3
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
            check_best(work.logits, wanted, row)
            for field, tolerance in {"entropy": 1e-4, "varentropy": 1e-3, "logprob": 1e-5, "margin": 1e-5}.items():
                said, expected_ = getattr(work.logits, field), getattr(wanted, field)
                assert said == pytest.approx(expected_, abs=tolerance, rel=1e-6, nan_ok=True), field


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_stored_halves_are_those_of_torch(name: str) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    logits = every.view(TYPES[name]) if name != "float32" else torch.randn(1 << 16) * torch.logspace(-9, 5, 1 << 16)
    logits = logits[torch.isfinite(logits.float())][None]
    work = Work(Row("r", 0, 0, 1, 5, 6, True), traced(records.CaptureSpec(records.LogitsSpec()), [], ()), 0)
    step, maths = holding([work]), unchecked([])
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
    maths = unchecked([layer])
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
    maths = unchecked([layer])
    for bad in (
        Case(layer, cache, table, [work], query.bfloat16()),
        Case(layer, cache, table.long(), [work], query),
        Case(layer, torch.randn(4, 16, 1, 16).transpose(1, 2), table, [work], query),
    ):
        with pytest.raises(TypeError):
            attend(maths, bad)


WRONG: dict[str, Any] = {
    "scale": 0.31, "window": 21, "soft_cap": 49.0, "slopes": None, "sinks": None, "key_scale": 2.0, "per_dim": 17,
    "dtype": 4,
}  # fmt: skip


@pytest.mark.parametrize("field", [None, *WRONG])
def test_kernels_that_disagree_are_not_used(
    field: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = torch.zeros(9, 1, 32, 16, dtype=torch.uint8)
    math_ = LayerMath(0.3, 20, 50.0, torch.tensor([0.01, 0.02]), torch.tensor([0.5, 1.0]))
    layer = make_layer(0, "transposed", 32, 8, 1, math_, cache)
    assert layer.keys is not None
    layer = replace(layer, keys=replace(layer.keys, quantised=Quantised(torch.float8_e4m3fn, 1.5)))
    layer.module.dtype, layer.module._k_scale_float = torch.float32, 1.5
    made = NativeLayer.of

    def of(layer: Layer) -> NativeLayer:
        native_layer = made(layer)
        if field is not None:
            setattr(native_layer.struct, field, WRONG[field])
        return native_layer

    monkeypatch.setattr(NativeLayer, "of", of)
    assert choose([layer], CPU, 3).name == ("native" if field is None else "torch")
    assert ("are not those of torch" in caplog.text) == (field is not None)


def test_logits_that_disagree_are_not_used(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(logits: torch.Tensor, k: int) -> Any:
        return logits_statistics(logits + 1.0, k)

    monkeypatch.setattr("tracer.worker.self_check.logits_statistics", shifted)
    assert choose([], CPU, 3).name == "torch"
    assert "logprob of a row of logits is not that of torch" in caplog.text


def test_the_check_goes_past_blocks_and_windows() -> None:
    layer = make_layer(0, "transposed", 128, 8, 1, LayerMath(1.0, sliding_window=1024), torch.zeros(9, 1, 128, 16))
    assert checked_lengths(layer) == (1, 33, 70, 128, 129, 1024, 1025, 1088)
    wide = replace(layer, math=LayerMath(1.0, sliding_window=8192))
    assert checked_lengths(wide) == (1, 33, 70, 128, 129)
    layer.module.kv_cache = torch.zeros(1, 1, 128, 16)
    assert checked_lengths(layer) == (1, 33, 70, 128)


def test_layers_that_are_the_same_to_the_kernels_are_checked_once() -> None:
    cache = torch.zeros(2, 1, 16, 16)
    first = make_layer(0, "rows", 16, 8, 1, LayerMath(1.0), cache)
    same = replace(first, info=replace(first.info, index=1))
    scaled = replace(first, math=LayerMath(2.0))
    windowed = replace(first, math=LayerMath(1.0, sliding_window=5))
    sinks = replace(first, math=LayerMath(1.0, sinks=torch.zeros(2)))
    layers = [first, same, scaled, windowed, sinks, sinks]
    assert [any(layer is found for found in distinct(layers)) for layer in layers] == [True, False, *[True] * 4]
    assert sum(1 for _ in distinct(layers)) == 5


@settings(max_examples=40, deadline=None)
@given(cases(longest=120, most=3), st.sampled_from([30.0, 1e4, 1e30]))
def test_huge_scores_make_rows(case: Case, factor: float) -> None:
    query = case.query.float() * factor
    if case.layer.query_dtype != torch.float16 or factor < 1e4:
        case = replace(case, query=query.to(case.query.dtype))
    got, _ = attend(unchecked([case.layer]), case)
    wanted, _ = attend(TorchMaths(3), case)
    for ours, theirs in zip(got, wanted, strict=True):
        for name, values in ours.items():
            if name == "attention_summary" and case.layer.math is not None and case.layer.math.sinks is not None:
                continue  # All of a row may go to the sink: torch's features take such a row for none.
            lost = np.isnan(theirs[name])
            np.testing.assert_array_equal(np.isnan(values), lost, err_msg=name)
        if "attention" in ours:
            total = ours["attention"].astype(np.float64).sum(-1)
            assert ((total < 1.001) | np.isnan(total)).all()
            assert np.nanmin(ours["attention"], initial=0.0) >= 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["key", "query", "hidden key"])
@pytest.mark.parametrize("window", [None, 5])
def test_a_row_of_what_are_no_numbers_is_none(bad: float, where: str, window: int | None) -> None:
    cache, query = torch.randn(4, 1, 16, 16), torch.rand(1, 2, 8) + 0.1
    cache[1, 0, 7 if where == "key" else 1, 3] = 1.0 if where == "query" else bad
    if where == "query":
        query[0, 0, 3] = bad
    layer = make_layer(0, "rows", 16, 8, 1, LayerMath(1.0, sliding_window=window), cache)
    row = Row("r", 0, 0, 1, 9, 8, samples=True)
    case = Case(layer, cache, torch.tensor([[1]], dtype=torch.int32), [Work(row, traced(WHOLE, [0, 1]))], query)
    [got], [said] = attend(unchecked([layer]), case)
    [wanted], [expected] = attend(TorchMaths(3), case)
    lost = np.isnan(got["attention"][0]).all(-1).tolist()
    hidden = where == "hidden key" and window is not None
    one = bad == -np.inf and where != "query"  # A score of -inf is a weight of 0 beside others.
    assert lost == ([False, False] if hidden or one else [True, where != "query"])
    for name, values in wanted.items():
        np.testing.assert_allclose(got[name], values, atol=1e-5, err_msg=name)
    assert said is not None
    assert expected is not None
    assert said.top_position == expected.top_position
    assert said.entropy == pytest.approx(expected.entropy, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout", ["transposed", "rows", "tiled"])
def test_every_byte_of_a_cache_is_the_number_that_torch_says(dtype: torch.dtype, layout: str) -> None:
    cache = torch.zeros(1, 1, 32, 16, dtype=torch.uint8)
    offsets = make_layer(0, layout, 32, 8, 1, LayerMath(1.0), cache)
    assert offsets.keys is not None
    cache.view(-1)[offsets.keys.offsets.flatten()] = torch.arange(256, dtype=torch.uint8)
    layer = replace(offsets, keys=replace(offsets.keys, quantised=Quantised(dtype, 0.3)))
    layer.module.dtype, layer.module._k_scale_float = torch.float32, 0.3
    work = Work(Row("r", 0, 0, 1, 31, 32, samples=True), traced(WHOLE, [0, 1]))
    case = Case(layer, cache, torch.tensor([[0]], dtype=torch.int32), [work], torch.randn(1, 2, 8))
    [found] = collect(unchecked([layer]), case, records.QKSpec(dtype="f32"), 0)
    keys = np.concatenate([found["key_prompt"][0][:, 0, 0], found["key"][0][0]])
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float() * 0.3
    np.testing.assert_array_equal(keys.flatten(), expected.numpy())


def test_new_scales_are_noticed() -> None:
    cache = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    layer = make_layer(0, "rows", 16, 8, 1, LayerMath(1.0), cache)
    assert layer.keys is not None
    layer = replace(layer, keys=replace(layer.keys, quantised=Quantised(torch.float8_e4m3fn, 0.5)))
    layer.module.dtype, layer.module._k_scale_float = torch.float32, 0.5
    work = Work(Row("r", 0, 0, 1, 9, 10, samples=True), traced(WHOLE, [0, 1]))
    case = Case(layer, cache, torch.tensor([[1]], dtype=torch.int32), [work], torch.randn(1, 2, 8))
    for maths in (unchecked([layer]), TorchMaths(3)):
        attend(maths, case)
        layer.module._k_scale_float = 0.25
        with pytest.raises(ValueError, match="k_scale has changed"):
            attend(maths, case)
        layer.module._k_scale_float = 0.5


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


GROWN = """
import torch
from tracer.worker import native
torch.set_num_threads(1)
library = native.load()
assert (library.threads(), library.team(1), library.team(4)) == (1, 1, 1)
torch.set_num_threads(8)
assert (library.threads(), library.team(1), library.team(4)) == (8, 1, 4)
"""


def test_no_thread_works_without_scratch_of_its_own() -> None:
    """Other libraries enlarge the pool after the scratch was made: vLLM's n-gram proposer does, by numba."""
    done = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[-2000:]) == (0, "")
