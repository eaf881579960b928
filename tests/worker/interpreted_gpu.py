"""The Triton kernels and `GpuMaths` on CPU tensors, under Triton's interpreter; `test_gpu.py` runs this file.

The interpreter must be chosen before Triton is first imported, hence the process of its own and the name that pytest
does not collect.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
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
    on_host,
    traced,
)
from tracer import records
from tracer.statistics import logits_statistics, logits_summaries
from tracer.worker import gpu_check, maths, triton_layer
from tracer.worker.attention import LayerMath, row_features, summarise
from tracer.worker.batch import Row
from tracer.worker.device import Mark
from tracer.worker.gpu_maths import GpuMaths, summarise_rows
from tracer.worker.layers import Layer
from tracer.worker.torch_maths import TorchMaths
from tracer.worker.triton_layer import GpuError
from tracer.worker.work import Step, Traced, Work

assert os.environ.get("TRITON_INTERPRET") == "1", "this file runs in a process of its own, see test_gpu.py"

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
affine = cases(layouts=("transposed", "rows", "second half"), blocks=(16, 32), sizes=(8, 80), longest=150, most=3)


@dataclass
class LateMark:
    """A point in a queue of a `LateDevice`."""

    device: LateDevice
    at: int

    def synchronize(self) -> None:
        self.device.arrive(self.at)


@dataclass
class LateDevice:
    """Does at once what is queued, but a copy to the host arrives only when somebody waits for a mark behind it."""

    areas: list[torch.Tensor] = field(default_factory=list)
    on_the_way: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    queued: int = 0
    made: int = 0

    def empty(self, size: int) -> torch.Tensor:
        self.made += 1
        return torch.full((size,), 0x5A, dtype=torch.uint8)

    def pinned(self, size: int) -> torch.Tensor:
        self.areas.append(torch.full((size,), 0xA5, dtype=torch.uint8))
        return self.areas[-1]

    def mark(self) -> LateMark:
        return LateMark(self, self.queued)

    @contextmanager
    def aside(self, after: Mark, *, late: bool = False) -> Iterator[None]:
        before = [(area, area.clone()) for area in self.areas]
        self.queued += 1
        yield
        for area, old in before:
            if not torch.equal(area, old):
                self.on_the_way.append((self.queued, area, area.clone()))
                area.copy_(old)

    def arrive(self, at: int) -> None:
        for _, area, values in [copy for copy in self.on_the_way if copy[0] <= at]:
            area.copy_(values)
        self.on_the_way = [copy for copy in self.on_the_way if copy[0] > at]


def gpu_maths(layers: list[Layer]) -> GpuMaths:
    """Without the check at start, which has its own test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("check_layer", "check_logits"):
            patch.setattr(f"tracer.worker.gpu_maths.{name}", lambda *arguments: None)
        return GpuMaths(LateDevice(), layers, 3)


@pytest.fixture(autouse=True, scope="module")
def _small_tiles() -> Iterator[None]:
    """Rows of several tiles without long rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_layer, "TILE", 64)
        yield


@quick
@given(affine)
def test_rows_and_features_are_those_of_torch(case: Case) -> None:
    got, said = attend(gpu_maths([case.layer]), case)
    wanted, expected = attend(TorchMaths(3), case)
    check_rows(got, said, wanted, expected)


@quick
@given(affine, st.sampled_from(["decode", "all"]), st.sampled_from([None, "f16", "f32"]), st.sampled_from([0, 40]))
def test_queries_and_keys_are_those_of_the_cache(case: Case, rows: Any, dtype: Any, sent: int) -> None:
    assert case.layer.math is not None
    info = replace(case.layer.info, sliding_window=case.layer.math.sliding_window)
    case = replace(case, layer=replace(case.layer, info=info))
    spec = records.QKSpec(rows=rows, dtype=dtype)
    got = collect(gpu_maths([case.layer]), case, spec, sent)
    check_blocks(got, collect(TorchMaths(3), case, spec, sent))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(TYPES)), st.integers(1, 20), st.sampled_from([7, 100, 5000]), st.integers(0, 1000),
    st.sampled_from([None, 4]), st.sampled_from(["f16", "f32"]), st.sampled_from(["device", "host", "wrong"]),
)  # fmt: skip
def test_logit_statistics_are_those_of_torch(
    name: str, rows: int, vocab: int, seed: int, top: int | None, dtype: Any, told: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows + 1, vocab, generator=generator) * 6).to(TYPES[name])
    spec = records.CaptureSpec(records.LogitsSpec(top=top, dtype=dtype))
    works = [Work(Row(f"r{i}", i + 1, i, 1, 5, 6, True), traced(spec, [], ()), i) for i in range(rows)]
    tokens = [seed % vocab, *[None if vocab == 7 else 3] * (rows - 1)]
    step, gpu, kept = holding(works), gpu_maths([]), logits[1:].clone()
    gpu.logits(step, works, logits)
    logits.zero_()  # what a sampler may do with its own tensor
    gpu.copy(step)
    if told != "host":
        ids = torch.tensor([0, *[token or 0 for token in tokens]], dtype=torch.int32)[:, None]
        gpu.sampled(step, ids if told == "device" else ids.flip(0))
    for work, token in zip(works, tokens, strict=True):
        work.token = token
    gpu.finish(step)
    reference, expected_step = TorchMaths(3), holding([replace(work, arrays=[], logits=None) for work in works])
    expected_step.logits = kept.float()
    expected_step.statistics = logits_statistics(kept.float(), 3)
    reference.finish(expected_step)
    assert [work.logits is None for work in works] == [token is None for token in tokens]
    expected = logits_summaries(kept.float(), expected_step.statistics, tokens)
    for work, other, wanted in zip(works, expected_step.works, expected, strict=True):
        assert work.logits == wanted
        assert len(work.arrays) == len(other.arrays)
        for (ours, values, start), (theirs, others, other_start) in zip(work.arrays, other.arrays, strict=True):
            assert (ours, start) == (theirs, other_start)
            np.testing.assert_array_equal(on_host(values), on_host(others))
            assert on_host(values).dtype == on_host(others).dtype


def test_each_draft_is_told_its_own_token() -> None:
    logits, spec = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)), records.CaptureSpec()
    row = Row("r", 1, 0, 3, 5, 4, samples=True, drafts=2, first_logits=1)
    works = [Work(part, traced(spec, [], ()), place) for place, part in enumerate(row.parts())]
    step, gpu = holding(works), gpu_maths([])
    gpu.logits(step, works, logits)
    gpu.copy(step)
    gpu.sampled(step, torch.tensor([[9, -1, -1], [7, 3, -1]]))
    assert step.buffers.logits_plan.ranked
    for work in works:
        work.take([7, 3], settled=True)
    gpu.finish(step)
    expected = logits_summaries(logits[1:], logits_statistics(logits[1:], 3), [7, 3, None])
    assert [work.logits for work in works] == [*expected[:2], None]
    assert [work.rejected for work in works] == [False, False, True]


def layer_of(cache: torch.Tensor, **maths_of: Any) -> Layer:
    return make_layer(0, "rows", 16, 8, 1, LayerMath(1.0, **maths_of), cache)


def one_row(length: int) -> Work:
    spec = records.CaptureSpec(records.LogitsSpec(dtype="f32"), records.AttentionSpec(dtype="f32"), qk=records.QKSpec())
    request = records.TraceRequest("a" * 32, "b" * 16, True, spec)
    return Work(Row("r", 0, 0, 1, length - 1, length, samples=True), Traced(request, {0: 0}, [0, 1], {0: 0}), 0)


def forward(gpu: Any, layer: Layer, work: Work, query: torch.Tensor, logits: torch.Tensor) -> Step:
    """A step as the model's thread runs it."""
    step, table = holding([work]), torch.tensor([[1, 2]], dtype=torch.int32)
    metadata = SimpleNamespace(block_table=table, causal=True)
    with torch.inference_mode():
        gpu.attention(step, layer, [work], query, layer.module.kv_cache, metadata)
        gpu.collect(step, layer, [work], query, layer.module.kv_cache, metadata)
    with torch.no_grad():  # around the runner's methods, not in them
        gpu.logits(step, [work], logits)
        gpu.copy(step)
    return step


def taken(gpu: Any, step: Step, token: int) -> dict[str, np.ndarray]:
    """What is sent of a step, copied as the queue copies it."""
    [work] = step.works
    work.token = token
    with torch.no_grad():
        gpu.finish(step)
    found = {name: on_host(values).copy() for name, values, _ in work.arrays + work.blocks}
    gpu.release(step)
    return found


def test_two_steps_in_flight_are_finished_on_another_thread() -> None:
    """As under asynchronous scheduling: the next step is queued before the tokens of the one before arrive."""
    layer, generator = layer_of(torch.randn(3, 1, 16, 16)), torch.Generator().manual_seed(1)
    gpu, plain = gpu_maths([layer]), TorchMaths(3)
    inputs = [
        (torch.randn(1, 2, 8, generator=generator), torch.randn(1, 50, generator=generator)) for _ in range(6)
    ]  # fmt: skip
    wanted = [
        taken(plain, forward(plain, layer, one_row(20 + at), *given_), at) for at, given_ in enumerate(inputs)
    ]  # fmt: skip
    found: list[dict[str, np.ndarray]] = []
    before: Step | None = None
    for at, given_ in enumerate(inputs):
        step = forward(gpu, layer, one_row(20 + at), *given_)
        if at % 3:
            with torch.inference_mode():
                gpu.sampled(step, torch.tensor([[at]]))
        if before is not None:
            last: Step = before
            thread = threading.Thread(target=lambda last=last, at=at: found.append(taken(gpu, last, at - 1)))
            thread.start()
            thread.join()
        before = step
    assert before is not None
    found.append(taken(gpu, before, 5))
    assert len(gpu._pool) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert (
            ours.keys() == theirs.keys() == {"attention", "attention_summary", "logits", "query", "key", "key_prompt"}
        )
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)


def test_memory_is_used_again() -> None:
    layer = layer_of(torch.randn(3, 1, 16, 16))
    device, gpu = LateDevice(), gpu_maths([layer])
    gpu._device = device
    for length in (12, 13):
        made = device.made
        taken(gpu, forward(gpu, layer, one_row(length), torch.randn(1, 2, 8), torch.randn(1, 50)), 3)
    assert device.made == made
    [buffers] = gpu._pool
    assert all(area.used == 0 for area in (buffers.rows, buffers.picks, buffers.logits, buffers.ranks))


def test_results_that_were_never_copied_are_not_read() -> None:
    layer = layer_of(torch.randn(3, 1, 16, 16))
    gpu, work = gpu_maths([layer]), one_row(12)
    step, metadata = holding([work]), SimpleNamespace(block_table=torch.tensor([[1]], dtype=torch.int32))
    gpu.attention(step, layer, [work], torch.randn(1, 2, 8), layer.module.kv_cache, metadata)
    with pytest.raises(GpuError, match="not copied"):
        gpu.finish(step)
    assert work.traced.problems == ["step: its results were not copied to the host"]


@pytest.mark.parametrize(
    "maths_of",
    [{}, {"sliding_window": 9, "sinks": torch.tensor([0.5, 1.0])}, {"alibi_slopes": torch.tensor([0.1, 0.2])}],
)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_the_check_at_start_passes_what_is_right(maths_of: dict[str, Any], order: tuple[int, ...]) -> None:
    shape = [(3, 1, 16, 16)[axis] for axis in order]
    cache = torch.randn(shape).permute([order.index(axis) for axis in range(4)])  # also tokens outside of heads
    assert GpuMaths(LateDevice(), [layer_of(cache, **maths_of)], 3).name == "triton"


@pytest.mark.parametrize("wrong", [{"scale": 2.0}, {"inside": (8, 16, 1)}, {"window": 3}])
def test_kernels_that_disagree_are_not_used(wrong: dict[str, Any]) -> None:
    layer = layer_of(torch.randn(3, 1, 16, 16))
    gpu = gpu_maths([layer])
    gpu._layers[0] = replace(gpu._layers[0], **wrong)
    with pytest.raises(GpuError, match="not those of torch"):
        gpu_check.check_layer(gpu, layer)


def test_logits_that_disagree_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.worker.gpu_maths.queue_logits", lambda *arguments: None)
    with pytest.raises(GpuError, match="not those of torch"):
        GpuMaths(LateDevice(), [], 3)


def test_torch_does_the_work_where_the_kernels_cannot(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.worker.device.CudaDevice", lambda device: LateDevice())
    cache, device = torch.randn(3, 1, 16, 16), torch.device("cuda")
    assert maths.choose([layer_of(cache)], device, 3).name == "triton"
    tiled = make_layer(0, "tiled", 16, 8, 1, LayerMath(1.0), cache)
    assert maths.choose([tiled], device, 3).name == "torch"
    assert "order of keys in a block" in caplog.text


def test_what_the_kernels_were_not_told_about_is_refused() -> None:
    layer, work = layer_of(torch.randn(3, 1, 16, 16)), one_row(12)
    table, query = torch.tensor([[1]], dtype=torch.int32), torch.randn(1, 2, 8)
    for bad in (
        Case(layer, layer.module.kv_cache, table, [work], torch.randn(1, 3, 8)),
        Case(layer, layer.module.kv_cache, table.long(), [work], query),
        Case(layer, torch.randn(3, 16, 2, 16).transpose(1, 2), table, [work], query),
    ):
        with pytest.raises(TypeError):
            attend(gpu_maths([layer]), bad)


def test_the_summary_is_that_of_the_weights() -> None:
    weights = torch.softmax(torch.randn(3, 4, 9) * 3, -1)
    weights[1, 2:] = 0.0
    features = row_features(weights, 4)
    best, at = weights[..., 1:].max(-1)
    tops = torch.stack([best, torch.where(best > 0, at + 1, -1).float()], -1)
    ours = summarise_rows(features.numpy(), tops.numpy(), [2, 5, 7], [0, 1, 4, 6])
    theirs = summarise(weights, features, [2, 5, 7], [0, 1, 4, 6])
    for name in records.AttentionSummary.__dataclass_fields__:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-6)
    nothing = summarise_rows(np.full((1, 1, 4), np.nan, np.float32), np.array([[[0.0, -1.0]]], np.float32), [0], [0])
    assert (nothing.top_layer, nothing.top_position) == (-1, -1)
    assert np.isnan(nothing.entropy)
