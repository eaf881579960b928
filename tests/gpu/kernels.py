"""The kernels on the machine's own device against torch on the CPU; `prove.sh` gives this file to pytest.

On a GPU these are the Triton kernels, compiled and run, through the real streams and page-locked copies; tests/worker
runs the same kernels in Triton's interpreter. In a rehearsal without a GPU they are the C kernels.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.worker.cases import Case, attend, cases, check_blocks, check_rows, collect
from tracer.records import QKSpec
from tracer.worker.maths import Maths, choose
from tracer.worker.torch_maths import TorchMaths

DEVICE: Final = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS: Final = {"cuda": "triton", "cpu": "native"}[DEVICE.type]
GPU_CASES: Final = cases(layouts=("rows", "second half"), blocks=(16, 32, 128), sizes=(32, 64, 80), longest=2000)
patient = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def on_device(case: Case) -> tuple[Maths, Case, Case]:
    """The kernels for the case's layer, the case with its tensors on the device, and the case as it is."""

    def moved(values: Any) -> Any:
        return None if values is None else values.to(DEVICE)

    layer, cache = case.layer, moved(case.cache)
    assert layer.math is not None
    assert layer.keys is not None
    info = replace(layer.info, sliding_window=layer.math.sliding_window)
    math = replace(layer.math, alibi_slopes=moved(layer.math.alibi_slopes), sinks=moved(layer.math.sinks))
    keys = replace(layer.keys, offsets=moved(layer.keys.offsets))
    there = replace(layer, info=info, module=SimpleNamespace(kv_cache=cache), math=math, keys=keys)
    maths = choose([there], DEVICE, 3)
    assert maths.name == KERNELS, "the check at a worker's start refused the kernels"
    moved_case = Case(there, cache, moved(case.table), case.works, moved(case.query))
    return maths, moved_case, replace(case, layer=replace(layer, info=info))


@patient
@given(GPU_CASES)
def test_rows_and_their_features_are_torchs(case: Case) -> None:
    maths, there, here = on_device(case)
    check_rows(*attend(maths, there), *attend(TorchMaths(3), here))


@patient
@given(GPU_CASES)
def test_queries_and_keys_are_torchs_bit_for_bit(case: Case) -> None:
    maths, there, here = on_device(case)
    for rows in ("decode", "all"):
        check_blocks(collect(maths, there, QKSpec(rows=rows), 0), collect(TorchMaths(3), here, QKSpec(rows=rows), 0))


def test_a_gpu_was_used() -> None:
    if DEVICE.type == "cpu":
        pytest.skip("a rehearsal without a GPU")
    assert torch.cuda.get_device_capability() >= (8, 0)
