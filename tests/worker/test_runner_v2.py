"""RunnerV2 on vLLM's real V2 runner class, driven on a CPU.

`CpuRunner` is a subclass: scheduling, dispatch of graphs, the order of calls, the grammar's place, preemption and the
asynchronous output are vLLM's own code. Replaced is what only a GPU can do: Triton kernels, streams, graph replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu import cudagraph_utils, model_runner
from vllm.v1.worker.gpu.async_utils import AsyncOutput, StepTimingCollector
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.states import RequestState

from tracer import context, records
from tracer.worker import compat
from tracer.worker.attention import LayerMath
from tracer.worker.layers import Layer
from tracer.worker.runner_v2 import RunnerV2, refusal
from tracer.worker.step import StepTracer
from tracer.worker.torch_maths import TorchMaths

VOCAB, HIDDEN, CPU = 11, 6, torch.device("cpu")


class Quiet:
    """Takes any call and does nothing: parts of the runner that have no say in what is tested."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Model(torch.nn.Module):  # type: ignore[misc]
    """Notes in which mode it ran; its logits tell the hidden state they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.during_forward: Callable[[], None] = lambda: None

    def forward(self, **inputs: Any) -> torch.Tensor:
        self.during_forward()
        return hidden_rows(inputs["positions"].shape[0])

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, :1] * torch.arange(VOCAB)


def hidden_rows(count: int) -> torch.Tensor:
    return torch.arange(1.0, count + 1)[:, None].expand(count, HIDDEN)


class Sampler(Quiet):
    def __call__(self, logits: torch.Tensor, batch: InputBatch) -> SamplerOutput:
        samples = batch.num_computed_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np
        ones = torch.from_numpy(samples.astype(np.int32))
        return SamplerOutput(logits.argmax(-1, keepdim=True), None, None, ones, torch.zeros_like(ones))


def forbid_the_best(logits: torch.Tensor, *args: Any) -> None:
    logits[:, VOCAB - 1] = -torch.inf  # in place, as the real bitmask kernel does


class CpuAsyncOutput(AsyncOutput):  # type: ignore[misc]
    """The constructor without its streams; `get_output` is vLLM's."""

    def __init__(self, model_runner_output: Any, sampler_output: Any, num_sampled_tokens: Any, **rest: Any) -> None:
        self.model_runner_output = model_runner_output
        self.sampled_token_ids = sampler_output.sampled_token_ids.numpy()
        self.num_sampled_tokens_np = num_sampled_tokens.numpy()
        self.copy_event = Quiet()
        self.sampling_mask_tensors = self.num_nans = self.logprobs_tensors = None
        self.pending_aux_output = self._has_fault = self.routed_experts_cpu = None
        self.prompt_logprobs_dict: dict[str, Any] = {}
        self.prompt_token_id_logprobs_dict: dict[str, Any] = {}


def request_states() -> Any:
    """The real `RequestState` with plain arrays instead of memory shared with a GPU."""
    states: Any = object.__new__(RequestState)
    states.req_id_to_index, states.index_to_req_id, states.free_indices = {}, {}, list(range(4))
    for name in ("prompt_len", "prefill_len"):
        setattr(states, name, SimpleNamespace(np=np.zeros(4, np.int32), gpu=None, copy_to_uva=lambda: None))
    for name in ("total_len", "all_token_ids", "num_computed_tokens"):
        setattr(states, name, SimpleNamespace(gpu=None, apply_write=Quiet().x, stage_write=Quiet().x,
                                              stage_write_elem=Quiet().x))  # fmt: skip
    for name in ("max_seq_len", "num_computed_prefill_tokens", "num_computed_tokens_np"):
        setattr(states, name, np.zeros(4, np.int32))
    states.draft_tokens = torch.zeros(4, 0)
    return states


class CpuRunner(model_runner.GPUModelRunner):  # type: ignore[misc]
    def __init__(self, config: Any, manager: Any) -> None:
        self.vllm_config, self.parallel_config, self.model_config = config, config.parallel_config, SimpleNamespace()
        self.observability_config = SimpleNamespace(cudagraph_metrics=False)
        self.cudagraph_manager, self.model, self.device = manager, Model(), CPU
        self.req_states, self.sampler = request_states(), Sampler()
        self.structured_outputs_worker: Any = SimpleNamespace(apply_grammar_bitmask=forbid_the_best)
        self.input_buffers = InputBuffers(4, 32, CPU)
        self.model_state: Any = SimpleNamespace(
            num_new_sampled_tokens_per_step=1, prepare_inputs=lambda *a: {}, prepare_attn=lambda *a, **k: {},
            **{name: Quiet().x for name in ("add_request", "remove_request", "apply_staged_writes",
                                            "preprocess_state", "postprocess_state")},
        )  # fmt: skip
        self.prompt_logprobs_worker: Any = SimpleNamespace(
            add_request=Quiet().x, remove_request=Quiet().x, compute_prompt_token_id_logprobs=lambda *a: {},
            compute_prompt_logprobs=lambda compute, hidden, *a: dict.fromkeys((), compute(hidden[:1])),
        )  # fmt: skip
        self.block_tables = self.lora_state = self.eplb = Quiet()
        self.attn_groups: list[Any] = []
        self.kv_connector, self.step_timing, self.kv_cache_config = NO_OP_KV_CONNECTOR, StepTimingCollector(), None
        self.is_first_pp_rank = self.is_last_pp_rank = True
        self.decode_query_len, self.num_speculative_steps, self.dcp_size = 1, 0, 1
        self.use_pp = self.is_encoder_decoder = self.uses_inputs_embeds = self.use_aux_hidden_state_outputs = False
        self.output_copy_stream, self.check_ep_fault = None, False
        if not hasattr(type(self), "dp_size"):  # properties from vLLM 0.32 on
            self.dp_size, self.dp_rank = 1, 0
        self.dcp_rank, self.cp_interleave = 0, 1
        self.reached: dict[str, int] = {}
        """What only the device knows: a request's valid tokens, where the scheduler counts drafts as accepted."""
        for name in ("pp_handler", "pooling_runner", "encoder_cache", "aux_output_connector", "pcp_manager",
                     "lora_config", "ubatch_runner", "adaptive_verification", "batch_sharder", "rejection_sampler",
                     "speculator", "fast_prefill", "execute_model_state", "kv_block_zeroer",
                     "routed_experts_capturer"):  # fmt: skip
            setattr(self, name, None)

    main_stream = None

    def prepare_inputs(self, scheduler_output: Any, state: Any, desc: Any, *adapters: int) -> InputBatch:
        """The numpy half of the original (from vLLM 0.31 on told of adapters); the other half are Triton kernels."""
        count, tokens = len(state.req_ids), int(state.num_scheduled_tokens.sum())
        starts = np.concatenate([[0], np.cumsum(state.num_scheduled_tokens)]).astype(np.int32)
        drafted = scheduler_output.scheduled_spec_decode_tokens
        drafts = np.array([len(drafted.get(name, ())) for name in state.req_ids], np.int32)
        computed = self.req_states.num_computed_tokens_np[state.idx_mapping_np]
        batch = InputBatch.make_dummy(count, tokens, self.input_buffers)
        for name, first, host in zip(state.req_ids, starts, computed, strict=False):
            batch.positions[first:] = torch.arange(len(batch.positions) - first) + self.reached.get(name, int(host))
        return replace(
            batch,
            req_ids=state.req_ids, idx_mapping_np=state.idx_mapping_np, query_start_loc_np=starts,
            num_scheduled_tokens=state.num_scheduled_tokens, prefill_len_np=state.prefill_len_np,
            num_computed_tokens_np=computed, query_start_loc=torch.from_numpy(starts),
            num_draft_tokens=int(drafts.sum()), num_draft_tokens_per_req=drafts if drafted else None,
            cu_num_logits_np=np.concatenate([[0], np.cumsum(drafts + 1)]).astype(np.int32),
            logits_indices=torch.cat([torch.arange(end - 1 - n, end) for end, n in np.stack([starts[1:], drafts], 1)]),
        )  # fmt: skip

    def prepare_attn(self, *args: Any) -> Any:
        return (), {}

    prepare_dummy_attn = prepare_attn

    def postprocess_sampled(self, *args: Any) -> None: ...


class Channel:
    """Keeps the records, and answers as a queue with room does."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, record: Any, payload: Any = ()) -> bool:
        self.sent.append(record)
        return True

    @property
    def steps(self) -> list[records.StepRecord]:
        return [record for record in self.sent if isinstance(record, records.StepRecord)]


class Engine:
    """A hooked runner with a scheduler's hands."""

    def __init__(self, runner: CpuRunner) -> None:
        self.runner, self.channel = runner, Channel()
        self.adapter = RunnerV2(runner)
        info = records.LayerInfo(0, "layer", 1, 1, 2, 1.0)
        layer = Layer(info, None, LayerMath(1.0), None)
        engine = records.EngineInfo("m", "0", "V2", "cpu", "float32", VOCAB, 64, layers=(info,))
        self.tracer = StepTracer(self.channel, self.adapter, [layer], engine, TorchMaths(3))  # type: ignore[arg-type]
        self.adapter.install(self.tracer)

    def run(self, output: SchedulerOutput, grammar: GrammarOutput | None = None) -> Any:
        assert self.runner.execute_model(output) is None
        return self.runner.sample_tokens(grammar)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """A maker of engines with the real graph manager in a given mode."""
    config = VllmConfig()
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8]
    config.compilation_config.max_cudagraph_capture_size = 8
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: rank)
    monkeypatch.setattr(cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: None))
    monkeypatch.setattr(model_runner, "build_slot_mappings_by_layer", lambda *args: {})
    monkeypatch.setattr(model_runner, "AsyncOutput", CpuAsyncOutput)

    def made(mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> Engine:
        manager = cudagraph_utils.ModelCudaGraphManager(config, CPU, mode, 1)
        manager._graphs_captured = True
        manager.run_fullgraph = lambda desc: hidden_rows(desc.num_tokens)
        return Engine(CpuRunner(config, manager))

    with set_current_vllm_config(config):
        yield made


LOGITS = records.CaptureSpec(logits=records.LogitsSpec())
ATTENTION = records.CaptureSpec(attention=records.AttentionSpec())


def arrival(
    name: str, prompt: int, capture: records.CaptureSpec | None, output: int = 0, computed: int = 0
) -> NewRequestData:
    extra = None
    if capture is not None:
        extra = {
            context.EXTRA_ARGS_KEY: context.to_extra_args(records.TraceRequest("ab" * 16, "cd" * 8, capture=capture))
        }
    return NewRequestData(
        name, [1] * prompt, [], SamplingParams(max_tokens=9, extra_args=extra), None, ([0],), computed, None,
        prefill_token_ids=[1] * (prompt + output),
    )  # fmt: skip


def scheduled(tokens: dict[str, int], new: tuple[NewRequestData, ...] = (), **more: Any) -> SchedulerOutput:
    """`tokens` of each request; those that are not new go on at `computed[name]`."""
    computed = more.pop("computed", {})
    cached = CachedRequestData.make_empty()
    cached.req_ids, cached.num_computed_tokens = list(computed), list(computed.values())
    cached.new_block_ids = [None] * len(computed)
    base = replace(SchedulerOutput.make_empty(), scheduled_new_reqs=list(new), scheduled_cached_reqs=cached)
    return replace(base, num_scheduled_tokens=tokens, total_num_scheduled_tokens=sum(tokens.values()), **more)


def test_logits_of_the_prompts_rows_come_from_the_steps_hidden_states(make: Callable[..., Engine]) -> None:
    engine = make()
    sent: list[tuple[Any, Any]] = []

    def send(record: Any, payload: Any = ()) -> bool:
        sent.extend((item.start, np.frombuffer(payload[0], np.float32)) for item in getattr(record, "arrays", ()))
        return True

    engine.channel.send = send  # type: ignore[method-assign]
    asked = records.CaptureSpec(prompt_logits=records.LogitsSpec(dtype="f32"))
    engine.run(scheduled({"a": 1, "p": 2}, (arrival("a", 1, None), arrival("p", 5, asked))))
    engine.run(scheduled({"p": 3}, computed={"p": 2}))
    starts = [start for start, _ in sent]
    assert starts == [(0, 0), (2, 0)], "the last row is the first step's"
    # Hidden states count the rows of a step: `p` comes second in the first and is alone in the second.
    for (_, values), rows in zip(sent, ([2, 3], [1, 2]), strict=True):
        np.testing.assert_array_equal(values.reshape(2, VOCAB), np.outer(rows, np.arange(VOCAB)))


def test_rows_of_a_mixed_batch_are_those_of_vllms_order(make: Callable[..., Engine]) -> None:
    engine = make()
    engine.run(scheduled({"a": 3}, (arrival("a", 3, None),)))
    new = (arrival("long", 6, LOGITS), arrival("z", 5, None))
    engine.run(scheduled({"z": 5, "long": 4, "a": 1}, new, computed={"a": 3}))
    view = engine.adapter.view(exact=True)
    assert [row.request_id for row in view.rows] == ["a", "long", "z"], "decodes first, whatever the scheduler's order"
    first, chunk, whole = view.rows
    assert (whole.first, whole.tokens, whole.step) == (5, 5, 0)
    assert (first.first, first.tokens, first.computed, first.step, first.is_prefill) == (0, 1, 3, 1, False)
    assert (chunk.first, chunk.tokens, chunk.position, chunk.samples, chunk.step) == (1, 4, 3, False, None)
    engine.run(scheduled({"long": 2}, computed={"long": 4}))
    (last,) = engine.adapter.view(exact=True).rows
    assert (last.computed, last.samples, last.step, last.prompt_tokens) == (4, True, 0, 6)


def test_logits_are_copied_before_the_grammar_and_tokens_come_with_the_output(make: Callable[..., Engine]) -> None:
    engine = make()
    grammar = GrammarOutput(["a"], np.zeros((1, 1), np.int32))
    output = engine.run(scheduled({"b": 2, "a": 3}, (arrival("b", 2, None), arrival("a", 3, LOGITS))), grammar)
    assert isinstance(output, AsyncOutput)
    assert engine.channel.steps == [], "nothing is said before the tokens are known"
    assert output.get_output().sampled_token_ids == [[VOCAB - 2], [VOCAB - 2]]
    (record,) = engine.channel.steps
    assert (record.token_id, record.step, record.position, record.batch_requests) == (VOCAB - 2, 0, 2, 2)
    assert record.logits is not None
    assert record.logits.topk_ids[0] == VOCAB - 1, "the model's best token, which the grammar forbade"
    assert record.logits.rank == 1


def test_a_surplus_step_leaves_the_step_before_it_alone(make: Callable[..., Engine]) -> None:
    engine = make()  # asynchronous scheduling: step 2 runs before step 1's tokens are fetched
    first = engine.run(scheduled({"a": 3}, (arrival("a", 3, LOGITS),)))
    second = engine.run(scheduled({"b": 5, "a": 1}, (arrival("b", 5, None),), computed={"a": 3}))
    _ = first.get_output(), second.get_output()
    said = [(record.step, record.position, record.batch_requests) for record in engine.channel.steps]
    assert said == [(0, 2, 1), (1, 3, 2)]


def test_a_chunk_that_samples_nothing_has_a_step_without_token(make: Callable[..., Engine]) -> None:
    engine = make()
    engine.run(scheduled({"a": 2}, (arrival("a", 5, LOGITS),))).get_output()
    (record,) = engine.channel.steps
    assert (record.step, record.token_id, record.logits, record.phase) == (None, None, None, "prefill")


def test_a_preempted_request_comes_back_as_a_second_attempt(make: Callable[..., Engine]) -> None:
    engine = make()
    engine.run(scheduled({"a": 3}, (arrival("a", 3, LOGITS),))).get_output()
    engine.run(scheduled({"a": 1}, computed={"a": 3})).get_output()
    engine.run(scheduled({"b": 2}, (arrival("b", 2, None),), preempted_req_ids={"a"})).get_output()
    engine.run(scheduled({"a": 4}, (arrival("a", 3, LOGITS, output=2),))).get_output()
    engine.run(scheduled({"a": 1}, computed={"a": 4})).get_output()
    said = [(record.step, record.attempt, record.tokens) for record in engine.channel.steps]
    assert said == [(0, 1, 3), (1, 1, 1), (None, 2, 4), (2, 2, 1)]
    engine.run(scheduled({"b": 1}, computed={"b": 2}, finished_req_ids={"a"}))
    assert isinstance(engine.channel.sent[-1], records.WorkerEnd)


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
def test_only_steps_that_hold_captured_attention_leave_full_graphs(
    make: Callable[..., Engine], mode: CUDAGraphMode, demoted: str
) -> None:
    engine = make(mode)
    ran: list[str] = []
    engine.runner.model.during_forward = lambda: ran.append("python")
    engine.run(scheduled({"a": 3, "b": 3}, (arrival("a", 3, LOGITS), arrival("b", 3, ATTENTION))))
    engine.run(scheduled({"a": 1}, computed={"a": 3}))
    plain = engine.adapter.view(exact=True).cuda_graph
    assert plain == ("FULL" if mode.decode_mode() == CUDAGraphMode.FULL else mode.name)
    ran.clear()
    engine.run(scheduled({"a": 1, "b": 1}, computed={"a": 4, "b": 3}))
    assert (engine.adapter.view(exact=True).cuda_graph, ran) == (demoted, ["python"])
    engine.run(scheduled({"a": 1}, computed={"a": 5}))
    assert engine.adapter.view(exact=True).cuda_graph == plain, "full graphs are back with the next step"


def test_with_data_parallel_ranks_the_demoted_step_asks_for_no_graph(make: Callable[..., Engine]) -> None:
    """vLLM takes the least mode of all ranks, but ranks look up their own graph unless it is NONE (`dp_utils`)."""
    engine = make()
    runner = engine.runner
    runner.parallel_config = SimpleNamespace(data_parallel_size=2)
    adapter = RunnerV2(runner)
    adapter._wrap_dispatch()
    assert runner.cudagraph_manager.dispatch(2, 2, 1, num_active_loras=0).cg_mode == CUDAGraphMode.FULL
    adapter.demote(True)
    found = runner.cudagraph_manager.dispatch(2, 2, 1, num_active_loras=0, max_query_len=1)
    assert (found.cg_mode, found.num_tokens, found.num_reqs) == (CUDAGraphMode.NONE, 2, 2)


def accepting(**numbers: int) -> Callable[..., SamplerOutput]:
    """A rejection sampler that takes so many draft tokens of each request."""

    def sample(logits: torch.Tensor, batch: InputBatch, *rest: Any) -> SamplerOutput:
        taken = [numbers[name] for name in batch.req_ids]
        tokens = torch.full((len(taken), 3), -1)
        for row, (number, first) in enumerate(zip(taken, batch.cu_num_logits_np, strict=False)):
            tokens[row, : number + 1] = logits[first : first + number + 1].argmax(-1)
        sampled = torch.tensor(taken) + 1
        return SamplerOutput(tokens, None, None, sampled, torch.zeros_like(sampled))

    return sample


def draft(runner: CpuRunner) -> None:
    """Give it a drafting model, whose work is nobody's concern here."""
    runner.num_speculative_steps, runner.draft_tokens_handler, runner._draft_workspace_lane = 2, Quiet(), 0
    runner.speculator = SimpleNamespace(
        draft_logits=None, supports_mm_inputs=False, propose=lambda batch, *a, **k: torch.zeros(batch.num_reqs, 2)
    )
    no = SimpleNamespace(gpu=None)
    vars(runner.sampler)["sampling_states"] = SimpleNamespace(temperature=no, seeds=no)
    states = runner.req_states
    states.draft_tokens, states.last_sampled_tokens, states.next_prefill_tokens = torch.zeros(4, 2), None, None


@pytest.mark.parametrize("capture", [LOGITS, ATTENTION])
def test_drafts_give_a_step_for_each_token_that_was_accepted(
    make: Callable[..., Engine], capture: records.CaptureSpec
) -> None:
    engine = make()
    runner = engine.runner
    draft(runner)
    drafts = {"a": [5, 5], "b": [5]}
    seen: list[list[tuple[int, int, int]]] = []

    def during_forward() -> None:
        if engine.tracer.wants_attention:  # as the first attention layer does
            works = engine.tracer._works(engine.tracer._step)  # type: ignore[arg-type]
            seen.append([(work.row.first, work.row.position, work.row.logits_row) for work in works])

    runner.model.during_forward = during_forward
    outputs = [engine.run(scheduled({"a": 3, "b": 4}, (arrival("a", 3, capture), arrival("b", 4, None))))]
    # The scheduler runs ahead: it counts every draft as accepted until it has been told.
    for computed, reached, taken in (
        ({"a": 3, "b": 4}, {}, {"a": 1, "b": 1}),
        ({"a": 6, "b": 6}, {"a": 5}, {"a": 0, "b": 1}),
    ):
        runner.reached, runner.rejection_sampler = reached, accepting(**taken)
        tokens = {"a": 3, "b": 2}
        outputs.append(engine.run(scheduled(tokens, computed=computed, scheduled_spec_decode_tokens=drafts)))

    fetched = [output.get_output().sampled_token_ids for output in outputs]
    assert [[len(ids) for ids in one] for one in fetched] == [[1, 1], [2, 2], [2, 1]]
    steps = engine.channel.steps
    steps = engine.channel.steps
    assert [(step.position, step.step, step.tokens) for step in steps] == [(2, 0, 3), (3, 1, 1), (4, 2, 1), (5, 3, 1)]
    assert [(step.drafts, step.drafts_accepted) for step in steps] == [(0, 0), (2, 1), (2, 1), (2, 0)]
    assert [step.token_id for step in steps] == [fetched[0][0][0], *fetched[1][1], *fetched[2][1]]
    assert [step.batch_tokens for step in steps] == [7, 5, 5, 5]
    assert len({step.step_span_id for step in steps}) == 4
    assert seen == ([] if capture is LOGITS else [[(0, 2, 0)], [(2, 3, 2), (3, 4, 3), (4, 5, 4)],
                                                  [(2, 5, 2), (3, 6, 3), (4, 7, 4)]])  # fmt: skip


def test_dummy_runs_and_prompt_logprobs_are_not_steps(make: Callable[..., Engine]) -> None:
    engine = make()
    engine.run(scheduled({"a": 3}, (arrival("a", 3, ATTENTION),)))
    before = engine.adapter.view(exact=True)
    engine.runner.execute_model(scheduled({"_dummy_req_0": 1}), dummy_run=True)
    assert engine.adapter.view(exact=True) == before
    assert not engine.adapter._demoted, "a dummy run gets the graph that the other ranks expect"
    assert not engine.tracer.wants_attention
    engine.runner.model.compute_logits(hidden_rows(2))
    assert engine.channel.steps == []


def test_without_its_logits_a_step_still_has_its_own_rows(make: Callable[..., Engine]) -> None:
    engine = make()
    del engine.runner.model.compute_logits  # the hook is gone, e.g. with a reloaded model
    first = engine.run(scheduled({"a": 3}, (arrival("a", 3, LOGITS),)))
    engine.run(scheduled({"b": 5}, (arrival("b", 5, None),)))
    first.get_output()
    assert [(record.position, record.logits) for record in engine.channel.steps] == [(2, None)]


def test_untraced_steps_send_nothing_and_return_vllms_own_output(make: Callable[..., Engine]) -> None:
    engine = make()
    output = engine.run(scheduled({"a": 2}, (arrival("a", 2, None),)))
    assert "get_output" not in vars(output)
    assert (output.get_output().sampled_token_ids, engine.channel.sent) == ([[VOCAB - 1]], [])


def test_a_failed_forward_pass_reaches_vllm_and_ends_the_demotion(make: Callable[..., Engine]) -> None:
    engine = make()

    def fail() -> None:
        raise RuntimeError("CUDA error")

    engine.runner.model.during_forward = fail
    with pytest.raises(RuntimeError, match="CUDA error"):
        engine.runner.execute_model(scheduled({"a": 2}, (arrival("a", 2, ATTENTION),)))
    assert not engine.adapter._demoted
    assert engine.runner.sample_tokens(None) is None


@pytest.mark.parametrize(
    "change",
    [
        {"adaptive_verification": 1}, {"batch_sharder": 1}, {"ubatch_runner": 1},
        {"pcp_manager": 1}, {"fast_prefill": 1}, {"cudagraph_manager": None},
        {"model_state": SimpleNamespace(num_new_sampled_tokens_per_step=4)},
    ],
)  # fmt: skip
def test_what_cannot_be_captured_is_refused(make: Callable[..., Engine], change: dict[str, Any]) -> None:
    runner = make().runner
    assert refusal(runner) is None
    assert compat.missing_attributes(runner, compat.V2_ATTRIBUTES) == []
    runner.__dict__.update(change)
    assert refusal(runner)


def test_results_are_fetched_before_sampling_and_its_tokens_are_told_on_the_device(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, calls = make(), []
    maths = engine.tracer._maths
    monkeypatch.setattr(maths, "copy", lambda step: calls.append("copy"))
    monkeypatch.setattr(maths, "sampled", lambda step, tokens: calls.append(tokens.tolist()))
    engine.run(scheduled({"a": 2}, (arrival("a", 2, LOGITS),)))
    assert calls == ["copy", [[VOCAB - 1]]]


def test_what_the_layers_gave_is_fetched_although_the_logits_fail(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, calls = make(), []

    def fails(*arguments: Any) -> None:
        raise TypeError("logits of an odd type")

    monkeypatch.setattr(engine.tracer._maths, "logits", fails)
    monkeypatch.setattr(engine.tracer._maths, "copy", lambda step: calls.append("copy"))
    with pytest.raises(TypeError, match="odd type"):
        engine.run(scheduled({"a": 2}, (arrival("a", 2, LOGITS),)))
    assert calls == ["copy"]


def test_a_batch_that_is_not_known_is_not_guessed_at(make: Callable[..., Engine]) -> None:
    engine = make()
    engine.run(scheduled({"a": 2}, (arrival("a", 2, None),)))
    engine.adapter._batch = replace(engine.adapter._batch, cu_num_logits_np=np.array([0, 3], np.int32))
    with pytest.raises(RuntimeError, match="other logits"):
        engine.adapter.view(exact=True)
    engine.adapter.plan(SchedulerOutput.make_empty())
    with pytest.raises(RuntimeError, match="no input batch"):
        engine.adapter.view(exact=True)
