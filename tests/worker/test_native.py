"""The C kernels against the torch reference: any layout, mask, type and length."""

from __future__ import annotations

import shutil
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer import records
from tracer.rebuilt import rebuild_rows
from tracer.statistics import logits_statistics, logits_summaries
from tracer.worker import native
from tracer.worker.attention import LayerMath
from tracer.worker.batch import Row
from tracer.worker.keys import KeyLayout, _affine
from tracer.worker.layers import Layer
from tracer.worker.maths import choose
from tracer.worker.native import NativeError
from tracer.worker.native_maths import NativeMaths
from tracer.worker.torch_maths import TorchMaths
from tracer.worker.work import Step, Traced, Work

CPU = torch.device("cpu")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHOLE = records.CaptureSpec(None, records.AttentionSpec(dtype="f32"))
LAYOUTS = ("transposed", "rows", "second half", "tiled")


def offsets_of(layout: str, block: int, size: int) -> torch.Tensor:
    """int64 [block, size]: where element (token, dim) lies in a block of one head."""
    token, dim = torch.arange(block)[:, None], torch.arange(size)[None, :]
    if layout == "transposed":
        return dim * block + token
    if layout == "tiled":  # pairs of dims side by side, as the AMX kernel wants them
        return dim // 2 * (2 * block) + token * 2 + dim % 2
    return token * (2 * size) + dim + (size if layout == "second half" else 0)


def make_layer(index: int, layout: str, block: int, size: int, groups: int, maths: LayerMath, cache: Any) -> Layer:
    slopes, heads = maths.alibi_slopes, groups * 2
    if slopes is not None:
        heads = len(slopes)
    elif maths.sinks is not None:
        heads = len(maths.sinks)
    offsets = offsets_of(layout, block, size)
    info = records.LayerInfo(index, f"layer {index}", heads, groups, size, maths.scale)
    return Layer(info, SimpleNamespace(kv_cache=cache), maths, KeyLayout(block, size, offsets, _affine(offsets)))


@dataclass
class Case:
    layer: Layer
    cache: torch.Tensor
    table: torch.Tensor
    works: list[Work]
    query: torch.Tensor


def traced(spec: records.CaptureSpec, heads: list[int], layers: tuple[int, ...] = (0,)) -> Traced:
    request = records.TraceRequest("a" * 32, "b" * 16, True, spec)
    return Traced(request, {layer: slot for slot, layer in enumerate(layers)}, heads)


@st.composite
def cases(draw: Any) -> Case:
    dtype = TYPES[draw(st.sampled_from(list(TYPES)))]
    block, size = draw(st.sampled_from([16, 32, 96, 128])), draw(st.sampled_from([8, 32, 64, 80]))
    groups, per_group = draw(st.sampled_from([(1, 1), (1, 6), (2, 2), (3, 3), (2, 4)]))
    heads = groups * per_group
    maths = LayerMath(
        scale=draw(st.sampled_from([0.05, 0.3])),
        sliding_window=draw(st.sampled_from([None, 1, 17, 1000])),
        soft_cap=draw(st.sampled_from([None, 2.0, 50.0])),
        alibi_slopes=draw(st.sampled_from([None, torch.linspace(0.01, 0.5, heads)])),
        sinks=draw(st.sampled_from([None, torch.linspace(-1.0, 3.0, heads)])),
    )
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    per_row = -(-max(lengths) // block)
    blocks = per_row * len(lengths) + 1
    cache = torch.randn(blocks, groups, block, 2 * size, generator=generator).to(dtype)
    table = torch.randperm(blocks, generator=generator)[: per_row * len(lengths)].view(len(lengths), -1)
    offsets = offsets_of(draw(st.sampled_from(LAYOUTS)), block, size)
    info = records.LayerInfo(0, "layer 0", heads, groups, size, maths.scale)
    layout = KeyLayout(block, size, offsets, _affine(offsets))
    layer = Layer(info, SimpleNamespace(kv_cache=cache), maths, layout)
    works, first = [], 0
    for index, length in enumerate(lengths):
        dtype_name = draw(st.sampled_from(["f32", "f16"]))
        chosen = draw(st.sampled_from([list(range(heads)), [heads - 1], [0, heads + 1]]))
        attention = draw(st.sampled_from([records.AttentionSpec(dtype=dtype_name), None]))
        spec = records.CaptureSpec(None, attention, summary=True)
        tokens = draw(st.integers(1, min(3, length)))
        row = Row(f"r{index}", index, first, tokens, length - tokens, draw(st.integers(1, length)), samples=True)
        works.append(Work(row, traced(spec, chosen)))
        first += tokens
    query = torch.randn(first, heads + 1, size, generator=generator).to(dtype)[:, :heads]
    return Case(layer, cache, table.to(torch.int32), works, query)


def on_host(values: Any) -> np.ndarray:
    out: np.ndarray = values.numpy() if isinstance(values, torch.Tensor) else values
    return out


def attend(maths: Any, case: Case) -> tuple[list[dict[str, np.ndarray]], list[records.AttentionSummary | None]]:
    works = [Work(work.row, work.traced) for work in case.works]
    step = Step(0, works=works, rows=works)
    metadata = SimpleNamespace(block_table=case.table, causal=True)
    maths.attention(step, case.layer, works, case.query, case.cache, metadata)
    maths.finish(step)
    arrays = [{name: on_host(values).copy() for name, values, _ in work.arrays} for work in works]
    maths.release(step)
    return arrays, [work.attention for work in works]


@settings(max_examples=120, deadline=None)
@given(cases())
def test_rows_and_features_are_those_of_torch(case: Case) -> None:
    got, said = attend(NativeMaths(native.load(), [case.layer], 3), case)
    wanted, expected = attend(TorchMaths(3), case)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            assert ours[name].dtype == values.dtype
            tolerance = {"attention": 1e-5 if values.dtype == np.float32 else 5e-4, "attention_summary": 1e-4}[name]
            np.testing.assert_allclose(ours[name], values, rtol=0, atol=tolerance, err_msg=name)
    for mine, reference in zip(said, expected, strict=True):
        assert mine is not None
        assert reference is not None
        assert mine.entropy == pytest.approx(reference.entropy, abs=1e-4)
        assert mine.sink_mass == pytest.approx(reference.sink_mass, abs=1e-4)
        assert mine.top_weight == pytest.approx(reference.top_weight, abs=1e-5)


def collect(maths: Any, case: Case, spec: records.QKSpec, sent: int) -> list[dict[str, tuple[np.ndarray, Any]]]:
    request = records.TraceRequest("a" * 32, "b" * 16, True, records.CaptureSpec(qk=spec))
    works = [Work(work.row, Traced(request, {}, [], {0: 0}, keys_sent=sent)) for work in case.works]
    step = Step(0, works=works, sources=works)
    maths.collect(step, case.layer, works, case.query, case.cache, SimpleNamespace(block_table=case.table, causal=True))
    maths.finish(step)
    out = [
        {name: (on_host(values).copy(), start) for name, values, start in (*work.blocks, *work.arrays)}
        for work in works
    ]
    maths.release(step)
    return out


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["decode", "all"]), st.sampled_from([None, "f16", "f32"]), st.sampled_from([0, 40]))
def test_queries_and_keys_are_those_of_the_cache(case: Case, rows: Any, dtype: Any, sent: int) -> None:
    window = case.layer.math.sliding_window if case.layer.math is not None else None
    info = replace(case.layer.info, sliding_window=window)
    case = replace(case, layer=replace(case.layer, info=info))
    spec = records.QKSpec(rows=rows, dtype=dtype)
    got = collect(NativeMaths(native.load(), [case.layer], 3), case, spec, sent)
    wanted = collect(TorchMaths(3), case, spec, sent)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, (values, start) in theirs.items():
            np.testing.assert_array_equal(ours[name][0], values)
            assert ours[name][0].dtype == values.dtype
            assert ours[name][1] == start


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
    step = Step(0, works=works)
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
    step, maths = Step(0, works=[work]), NativeMaths(native.load(), [], 3)
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


def test_the_library_is_built_once_and_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = native._built()
    made = first.stat()
    assert native._built() == first
    assert first.stat().st_mtime_ns == made.st_mtime_ns
    assert stat.S_IMODE(made.st_mode) == 0o700
    assert [item.name for item in first.parent.iterdir()] == [first.name]
