"""vLLM's second model runner (`vllm.v1.worker.gpu.model_runner.GPUModelRunner`, what GPUs get) as a `Runner`.

One step: `execute_model` (dispatch of CUDA graphs → `prepare_inputs` → forward) and `sample_tokens` (`sample`, which
computes the logits, masks them in place and samples; then an `AsyncOutput`). Dummy runs come through the same
`execute_model` and `compute_logits`; they neither reach `prepare_inputs` nor `sample`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tracer.worker import compat
from tracer.worker.batch import Row, StepPlan, StepView
from tracer.worker.runner_v1 import plan_v1
from tracer.worker.step import StepTracer

__all__ = ["RunnerV2", "refusal"]


def refusal(runner: Any) -> str | None:
    """Why the steps of this V2 runner cannot be captured, or None."""
    checks = (
        (runner.adaptive_verification is not None, "adaptive verification keeps the batch's rows on the GPU only"),
        (runner.model_state.num_new_sampled_tokens_per_step != 1, "the model samples several tokens per step"),
        (runner.batch_sharder is not None, "batch-sharded sampling leaves no rank with all logits"),
        (runner.ubatch_runner is not None, "dual-batch overlap runs the layers on parts of the batch"),
        (runner.pcp_manager is not None, "prefill context parallelism deals the rows out to ranks"),
        (runner.fast_prefill is not None, "fast prefill of KV-sharing layers runs them on parts of the batch"),
        (runner.cudagraph_manager is None, "model runner V2 has not set up its CUDA graphs yet"),
    )
    return next((reason for failed, reason in checks if failed), None)


class RunnerV2:
    """Adapter of one V2 runner instance."""

    version = "V2"

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._batch: Any = None
        """The step's `InputBatch`: a snapshot, its numpy arrays are made anew for each step."""
        self._descriptor: Any = None
        self._demoted = False
        self._awaits_logits = False
        self._hidden: Any = None
        """Hidden states [tokens, width] of the step that is sampled."""

    def plan(self, scheduler_output: Any) -> StepPlan:
        """See `batch.Runner`; V2 has a preempted request removed and later arrive again, never `resumed`."""
        self._batch = None
        return plan_v1(scheduler_output)

    def view(self, *, exact: bool) -> StepView:
        """See `batch.Runner`."""
        batch = self._batch
        if batch is None:
            raise RuntimeError("the step has no input batch")
        drafts = [0] * batch.num_reqs
        if batch.num_draft_tokens_per_req is not None:
            drafts = batch.num_draft_tokens_per_req.tolist()
        first_logits = batch.cu_num_logits_np[: batch.num_reqs + 1].tolist()
        if first_logits[-1] != batch.num_reqs + sum(drafts):
            raise RuntimeError("the batch has other logits than one per request and draft token")
        settled = exact or not self._runner.num_speculative_steps
        prompts = self._runner.req_states.prompt_len.np[batch.idx_mapping_np].tolist()
        firsts, counts = batch.query_start_loc_np.tolist(), batch.num_scheduled_tokens.tolist()
        computed, prefills = self._computed(batch, exact=exact), batch.prefill_len_np.tolist()
        rows = []
        for at, name in enumerate(batch.req_ids):
            # `prefill_len` is the prompt plus, after a preemption, the output so far; vLLM's sampler compares likewise.
            samples = computed[at] + counts[at] - drafts[at] >= prefills[at]
            row = Row(name, at, firsts[at], counts[at], computed[at], prompts[at], samples, drafts[at])
            rows.append(replace(row, first_logits=first_logits[at]))
        return StepView(tuple(rows), str(self._descriptor.cg_mode.name), settled)

    def _computed(self, batch: Any, *, exact: bool) -> list[int]:
        """Tokens of each request whose keys are in the cache; of an engine with drafts only the device knows."""
        if exact and self._runner.num_speculative_steps:
            known: list[int] = batch.positions[batch.query_start_loc[: batch.num_reqs].long()].tolist()
            return known
        host: list[int] = batch.num_computed_tokens_np.tolist()
        return host

    def head(self, hidden: Any) -> Any:
        """See `batch.Runner`."""
        return self._runner.model.compute_logits(hidden)

    def demote(self, demoted: bool) -> None:
        """See `batch.Runner`."""
        self._demoted = demoted

    def install(self, tracer: StepTracer) -> None:
        """Wrap the runner's two entry points, what builds the batch, what makes logits, and the choice of graph."""
        self._wrap_prepare_inputs()
        self._wrap_dispatch()
        self._wrap_execute_model(tracer)
        self._wrap_sampling(tracer)

    def _wrap_execute_model(self, tracer: StepTracer) -> None:
        original = self._runner.execute_model

        def execute_model(
            scheduler_output: Any, intermediate_tensors: Any = None, dummy_run: bool = False, *args: Any, **kwargs: Any
        ) -> Any:
            if dummy_run:
                return original(scheduler_output, intermediate_tensors, dummy_run, *args, **kwargs)
            tracer.begin(scheduler_output)
            try:
                return original(scheduler_output, intermediate_tensors, dummy_run, *args, **kwargs)
            finally:
                self._demoted = False  # a dummy run may be next, and must not slow the other data-parallel ranks

        self._runner.execute_model = execute_model

    def _wrap_prepare_inputs(self) -> None:
        """`prepare_inputs` knows the rows and, after all ranks agreed, the graph; only real steps get here."""
        original = self._runner.prepare_inputs

        def prepare_inputs(scheduler_output: Any, batch_req_state: Any, batch_desc: Any, *args: Any, **kw: Any) -> Any:
            batch = original(scheduler_output, batch_req_state, batch_desc, *args, **kw)
            self._batch, self._descriptor = batch, batch_desc
            return batch

        self._runner.prepare_inputs = prepare_inputs

    def _wrap_sampling(self, tracer: StepTracer) -> None:
        """Logits as `compute_logits` returns them inside `sample`: before the grammar's mask is applied in place."""
        sample, sample_tokens = self._runner.sample, self._runner.sample_tokens
        compute_logits = self._runner.model.compute_logits

        def computed(*args: Any, **kwargs: Any) -> Any:
            logits = compute_logits(*args, **kwargs)
            if self._awaits_logits:  # else a dummy run or prompt logprobs
                self._awaits_logits = False
                tracer.forward_done(logits, self._hidden)
            return logits

        def sampled(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            self._awaits_logits, self._hidden = True, hidden_states
            try:
                output = sample(hidden_states, *args, **kwargs)
            finally:
                self._hidden = None
                if self._awaits_logits:  # another way to logits: the step goes without, its rows are settled now
                    self._awaits_logits = False
                    tracer.forward_done(None)
            tokens = getattr(next(iter(output), None), "sampled_token_ids", None)
            if tokens is not None:
                tracer.sampled(tokens)
            return output

        def tokens_sampled(*args: Any, **kwargs: Any) -> Any:
            output = sample_tokens(*args, **kwargs)
            step = tracer.take_step()
            return output if step is None or output is None else tracer.finish(step, output)

        self._runner.model.compute_logits = computed
        self._runner.sample, self._runner.sample_tokens = sampled, tokens_sampled

    def _wrap_dispatch(self) -> None:
        """`CudaGraphManager.dispatch`: FULL graphs want a uniform batch, so a batch said not to be gets PIECEWISE.

        Where there is no PIECEWISE graph, or other data-parallel ranks must follow (they agree on the least mode, but
        each looks up its own graph unless that is NONE), the step runs without graphs.
        """
        manager, none, full = self._runner.cudagraph_manager, compat.no_graph_mode(), compat.full_graph_mode()
        original, ranks = manager.dispatch, self._runner.parallel_config.data_parallel_size

        def dispatch(
            num_reqs: int,
            num_tokens: int,
            uniform_token_count: int | None,
            num_active_loras: int,
            max_query_len: int | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if not self._demoted:
                uniform = uniform_token_count
                return original(num_reqs, num_tokens, uniform, num_active_loras, max_query_len, *args, **kwargs)
            found = original(num_reqs, num_tokens, None, num_active_loras, None, *args, **kwargs)
            if found.cg_mode != full and ranks == 1:
                return found
            shape = {"num_tokens": num_tokens, "num_reqs": num_reqs}
            return replace(found, cg_mode=none, uniform_token_count=None, max_query_len=None, **shape)

        manager.dispatch = dispatch
