"""RunnerV1's view, plan and demotion on vLLM's own scheduler output, graph dispatcher and V1 runner source."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu_model_runner import ExecuteModelState, GPUModelRunner

from tracer.worker import compat
from tracer.worker.batch import Arrival
from tracer.worker.runner_v1 import RunnerV1, plan_v1


def dispatcher(mode: CUDAGraphMode) -> Any:
    """vLLM's dispatcher with graphs for 1, 2, 4 and 8 tokens."""
    config = VllmConfig()
    compilation = config.compilation_config
    compilation.splitting_ops = list(compilation._attention_ops)
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = [1, 2, 4, 8], 8
    made = CudagraphDispatcher(config)
    made.initialize_cudagraph_keys(mode)
    return made


def adapter(mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> tuple[RunnerV1, Any]:
    runner = SimpleNamespace(
        cudagraph_dispatcher=dispatcher(mode),
        input_batch=SimpleNamespace(req_ids=["a", "b", None], num_reqs=2, num_computed_tokens_cpu=np.array([7, 4, 0])),
        discard_request_mask=SimpleNamespace(np=np.array([False, True, False])),
        requests={"a": SimpleNamespace(num_prompt_tokens=5), "b": SimpleNamespace(num_prompt_tokens=9)},
        speculative_config=None,
        use_async_spec_decode=False,
        num_computed_tokens=torch.tensor([6, 4, 0]),
    )
    made = RunnerV1(runner)
    made._wrap_dispatch()
    return made, runner


def output(tokens: dict[str, int], **more: Any) -> SchedulerOutput:
    base = replace(SchedulerOutput.make_empty(), num_scheduled_tokens=tokens, **more)
    return replace(base, total_num_scheduled_tokens=sum(tokens.values()))


def test_plan_says_who_came_who_left_and_who_was_preempted() -> None:
    params = SamplingParams(extra_args={"tensorspan": [1]})
    new = NewRequestData("n", [1, 2], [], params, None, ([0],), 0, None)
    pooled = NewRequestData("p", [1], [], None, None, ([0],), 0, None)
    cached = replace(CachedRequestData.make_empty(), req_ids=["a"], resumed_req_ids={"a"})
    plan = plan_v1(output({"n": 2, "p": 1, "a": 1}, scheduled_new_reqs=[new, pooled], scheduled_cached_reqs=cached,
                          finished_req_ids={"z"}))  # fmt: skip
    assert plan.arrived == (Arrival("n", {"tensorspan": [1]}), Arrival("p", None))
    assert plan.resumed == frozenset("a")
    assert plan.finished == frozenset("z")
    assert plan.scheduled == frozenset("npa")


def test_view_follows_the_batchs_order_and_marks_chunks_that_sample_nothing() -> None:
    made, _ = adapter()
    made.plan(output({"b": 3, "a": 1}))
    decode, chunk = made.view(exact=True).rows
    assert (decode.request_id, decode.first, decode.position, decode.step, decode.is_prefill) == ("a", 0, 7, 3, False)
    assert (chunk.request_id, chunk.first, chunk.tokens, chunk.position, chunk.step) == ("b", 1, 3, 6, None)
    assert made.view(exact=True).tokens == 4


def test_each_draft_token_is_a_row_of_its_own() -> None:
    _, runner = adapter()
    runner.speculative_config, runner.discard_request_mask.np[1] = object(), False
    made = RunnerV1(runner)
    made.plan(output({"a": 3, "b": 5}, scheduled_spec_decode_tokens={"a": [1, 2]}))
    a, b = made.view(exact=True).rows
    assert [(part.first, part.position, part.step, part.logits_row) for part in a.parts()] == [
        (0, 7, 3, 0), (1, 8, 4, 1), (2, 9, 5, 2)
    ]  # fmt: skip
    assert all(not part.is_prefill and part.tokens == 1 for part in a.parts())
    assert [(part.first, part.tokens, part.step, part.logits_row) for part in b.parts()] == [(3, 5, 0, 3)]


def test_what_only_the_device_knows_is_asked_for_when_it_is_needed() -> None:
    made, runner = adapter()
    runner.use_async_spec_decode = True
    made.plan(output({"a": 1, "b": 3}))
    assert [row.computed for row in made.view(exact=True).rows] == [6, 4]
    assert [row.computed for row in made.view(exact=False).rows] == [7, 4]


@pytest.mark.parametrize(
    ("mode", "demoted"),
    [
        (CUDAGraphMode.FULL_AND_PIECEWISE, "PIECEWISE"),
        (CUDAGraphMode.FULL, "NONE"),
        (CUDAGraphMode.FULL_DECODE_ONLY, "NONE"),
        (CUDAGraphMode.PIECEWISE, "PIECEWISE"),
        (CUDAGraphMode.NONE, "NONE"),
    ],
)
def test_a_demoted_step_gets_the_best_graph_that_is_not_full(mode: CUDAGraphMode, demoted: str) -> None:
    made, runner = adapter(mode)
    made.plan(output({"a": 1, "b": 1}))
    dispatch = runner.cudagraph_dispatcher.dispatch
    plain, _ = dispatch(num_tokens=2, uniform_decode=True)
    assert plain == (CUDAGraphMode.FULL if mode.decode_mode() == CUDAGraphMode.FULL else mode)
    made.demote(True)
    chosen, descriptor = dispatch(num_tokens=2, uniform_decode=True, valid_modes=None, invalid_modes=None)
    assert (chosen.name, made.view(exact=True).cuda_graph, descriptor.num_tokens) == (demoted, demoted, 2)
    made.demote(False)
    assert dispatch(num_tokens=2, uniform_decode=True)[0] == plain


def test_modes_that_vllm_fixed_itself_are_left_alone() -> None:
    """`force_eager`, and the second look-up after data-parallel ranks agreed on a mode."""
    made, runner = adapter()
    made.demote(True)
    dispatch = runner.cudagraph_dispatcher.dispatch
    assert dispatch(num_tokens=2, valid_modes={CUDAGraphMode.NONE})[0] == CUDAGraphMode.NONE
    synced = {CUDAGraphMode.FULL, CUDAGraphMode.NONE}
    assert dispatch(num_tokens=2, uniform_decode=True, valid_modes=synced)[0] == CUDAGraphMode.FULL
    excluded = dispatch(num_tokens=2, uniform_decode=True, invalid_modes={CUDAGraphMode.PIECEWISE})
    assert excluded == (CUDAGraphMode.NONE, BatchDescriptor(2)), "what vLLM excludes stays excluded"


@pytest.mark.parametrize("name", compat.V1_ATTRIBUTES)
def test_the_names_of_these_stand_ins_are_the_real_runners(name: str) -> None:
    assert f"self.{name}" in inspect.getsource(GPUModelRunner.__init__)


def test_logits_wait_in_the_state_between_the_two_calls() -> None:
    assert "logits" in ExecuteModelState._fields
    assert "self.execute_model_state.logits" not in inspect.getsource(GPUModelRunner.execute_model)
    sample = inspect.getsource(GPUModelRunner.sample_tokens)
    assert sample.index("self.execute_model_state = None") < sample.index("apply_grammar_bitmask(")
