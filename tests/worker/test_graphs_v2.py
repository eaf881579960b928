"""The demotion of RunnerV2 on vLLM's own graph managers: with LoRA adapters, and with data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.v1.worker.gpu import cudagraph_utils, dp_utils

from tracer.worker.runner_v2 import RunnerV2

CPU = torch.device("cpu")
BOTH = CUDAGraphMode.FULL_AND_PIECEWISE


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[RunnerV2, Any]]]:
    """A maker of adapters and their real graph managers, with graphs for 1, 2, 4 and 8 tokens."""
    config = VllmConfig()
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8]
    config.compilation_config.max_cudagraph_capture_size = 8
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: rank)
    monkeypatch.setattr(cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: None))

    def made(
        mode: CUDAGraphMode = BOTH, ranks: int = 1, adapters: Sequence[int] = (), **more: Any
    ) -> tuple[RunnerV2, Any]:
        cases = [0, *adapters] if adapters else None
        manager: Any = cudagraph_utils.CudaGraphManager(config, CPU, mode, 1, lora_capture_cases=cases, **more)
        manager._graphs_captured = True
        runner = SimpleNamespace(cudagraph_manager=manager, parallel_config=SimpleNamespace(data_parallel_size=ranks))
        adapter = RunnerV2(runner)
        adapter._wrap_dispatch()
        return adapter, manager

    with set_current_vllm_config(config):
        yield made


@pytest.mark.parametrize(
    ("mode", "demoted"), [(BOTH, "PIECEWISE"), (CUDAGraphMode.FULL, "NONE"), (CUDAGraphMode.FULL_DECODE_ONLY, "NONE")]
)
@pytest.mark.parametrize(("active", "captured"), [(0, 0), (1, 1), (2, 4), (3, 4), (9, 4)])
def test_a_demoted_step_keeps_its_number_of_adapters(
    hooked: Callable[..., Any], mode: CUDAGraphMode, demoted: str, active: int, captured: int
) -> None:
    """vLLM captures graphs for some numbers of active adapters; the LoRA kernels launch for the number it chose."""
    adapter, manager = hooked(mode, adapters=(1, 4))
    plain = manager.dispatch(3, 3, 1, num_active_loras=active, max_query_len=1)
    assert (plain.cg_mode.name, plain.num_tokens, plain.num_active_loras) == ("FULL", 4, captured)
    adapter.demote(True)
    found = manager.dispatch(3, 3, 1, num_active_loras=active, max_query_len=1)
    padded = 4 if demoted == "PIECEWISE" else 3
    assert (found.cg_mode.name, found.num_tokens, found.num_active_loras) == (demoted, padded, captured)
    assert (found.uniform_token_count, found.max_query_len) == (None, None)
    adapter.demote(False)
    assert manager.dispatch(3, 3, 1, num_active_loras=active, max_query_len=1) == plain


def test_graphs_of_decodes_with_drafts_are_left_too(hooked: Callable[..., Any]) -> None:
    """A graph for any mix of query lengths up to a bound is found by that bound instead of by uniformity."""
    adapter, manager = hooked(varlen_decode=True)
    assert manager.dispatch(2, 2, None, num_active_loras=0, max_query_len=1).cg_mode == CUDAGraphMode.FULL
    adapter.demote(True)
    assert manager.dispatch(2, 2, None, num_active_loras=0, max_query_len=1).cg_mode == CUDAGraphMode.PIECEWISE


def agreed(monkeypatch: pytest.MonkeyPatch, managers: Sequence[Any], tokens: Sequence[int], **more: Any) -> list[Any]:
    """What each data-parallel rank runs after vLLM's own agreement; the collective sums what the ranks put in."""
    columns: list[torch.Tensor] = []

    class OwnPartGivenError(Exception):
        """The rank waits for the others."""

    def put_in(tensor: torch.Tensor, group: object = None) -> None:
        columns.append(tensor.clone())
        raise OwnPartGivenError

    def summed(tensor: torch.Tensor, group: object = None) -> None:
        tensor.copy_(torch.stack(columns).sum(0))

    def run(rank: int, reduce: Callable[..., None]) -> Any:
        group = SimpleNamespace(cpu_group=None, cpu_all_reduce_=reduce)  # the method from vLLM 0.33 on
        monkeypatch.setattr(dp_utils, "get_dp_group", lambda: group)
        monkeypatch.setattr(dp_utils, "dist", SimpleNamespace(all_reduce=reduce), raising=False)
        monkeypatch.setattr(dp_utils, "should_skip_dp_coordination", lambda: False, raising=False)
        count = tokens[rank]
        found, _ = dp_utils.dispatch_cg_and_sync_dp(managers[rank], count, count, 1, 2, rank, max_query_len=1, **more)
        return found

    for rank in range(2):
        with pytest.raises(OwnPartGivenError):
            run(rank, put_in)
    return [run(rank, summed) for rank in range(2)]


@pytest.mark.parametrize("mode", [BOTH, CUDAGraphMode.FULL])
def test_data_parallel_ranks_leave_their_graphs_together(
    hooked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, mode: CUDAGraphMode
) -> None:
    first, second = hooked(mode, ranks=2), hooked(mode, ranks=2)
    managers = (first[1], second[1])
    plain = agreed(monkeypatch, managers, (2, 3))
    assert [(found.cg_mode.name, found.num_tokens) for found in plain] == [("FULL", 4)] * 2, "padded to one size"
    first[0].demote(True)
    found = agreed(monkeypatch, managers, (2, 3))
    assert [(one.cg_mode.name, one.num_tokens) for one in found] == [("NONE", 2), ("NONE", 3)]
    second[0].demote(True)
    assert [one.cg_mode.name for one in agreed(monkeypatch, managers, (2, 3))] == ["NONE", "NONE"]
    first[0].demote(False)
    second[0].demote(False)
    assert agreed(monkeypatch, managers, (2, 3)) == plain


def test_a_rank_that_vllm_runs_eagerly_is_not_asked(
    hooked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter, manager), (_, other) = hooked(ranks=2), hooked(ranks=2)
    adapter.demote(True)
    found = agreed(monkeypatch, (manager, other), (2, 3), need_eager=True)
    assert [(one.cg_mode.name, one.num_tokens) for one in found] == [("NONE", 2), ("NONE", 3)]
