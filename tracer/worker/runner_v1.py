"""vLLM's first model runner (`vllm.v1.worker.gpu_model_runner.GPUModelRunner`; on CPUs the only one) as a `Runner`.

Order of `input_batch.req_ids` = `query_start_loc` = block table = logits rows, from `_prepare_inputs` to sampling.
"""

from __future__ import annotations

from typing import Any

from tracer.worker import compat
from tracer.worker.batch import Arrival, Row, StepPlan, StepView
from tracer.worker.step import StepTracer

__all__ = ["RunnerV1", "plan_v1"]


def plan_v1(output: Any) -> StepPlan:
    """A `SchedulerOutput` as both runners get it."""
    arrived = [Arrival(new.req_id, _extra_args(new.sampling_params)) for new in output.scheduled_new_reqs]
    return StepPlan(
        arrived=tuple(arrived),
        resumed=frozenset(output.scheduled_cached_reqs.resumed_req_ids),
        finished=frozenset(output.finished_req_ids),
        scheduled=frozenset(output.num_scheduled_tokens),
    )


def _extra_args(params: Any) -> dict[str, Any] | None:
    return None if params is None else params.extra_args


class RunnerV1:
    """Adapter of one V1 runner instance."""

    version = "V1"

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._scheduled: dict[str, int] = {}
        self._demoted = False
        self._graph = "NONE"

    def plan(self, scheduler_output: Any) -> StepPlan:
        """See `batch.Runner`."""
        self._scheduled = scheduler_output.num_scheduled_tokens
        return plan_v1(scheduler_output)

    def view(self) -> StepView:
        """See `batch.Runner`."""
        batch, rows, first = self._runner.input_batch, [], 0
        discarded = self._runner.discard_request_mask.np
        for index, request_id in enumerate(batch.req_ids[: batch.num_reqs]):
            tokens = self._scheduled[request_id]
            computed = int(batch.num_computed_tokens_cpu[index])
            prompt_tokens = self._runner.requests[request_id].num_prompt_tokens
            rows.append(Row(request_id, index, first, tokens, computed, prompt_tokens, not bool(discarded[index])))
            first += tokens
        return StepView(tuple(rows), self._graph)

    def head(self, hidden: Any) -> Any:
        """See `batch.Runner`."""
        return self._runner.model.compute_logits(hidden)

    def demote(self, demoted: bool) -> None:
        """See `batch.Runner`."""
        self._demoted = demoted

    def install(self, tracer: StepTracer) -> None:
        """Wrap the runner's two entry points and its choice of CUDA graph."""
        self._wrap_dispatch()
        execute, sample = self._runner.execute_model, self._runner.sample_tokens

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if not tracer.begin(scheduler_output):
                return execute(scheduler_output, *args, **kwargs)
            result = execute(scheduler_output, *args, **kwargs)
            state = self._runner.execute_model_state
            logits, hidden = (None, None) if state is None else (state.logits, state.hidden_states)
            tracer.forward_done(logits, hidden)
            return result

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            step = tracer.take_step()
            output = sample(*args, **kwargs)
            return output if step is None else tracer.finish(step, output)

        self._runner.execute_model = execute_model
        self._runner.sample_tokens = sample_tokens

    def _wrap_dispatch(self) -> None:
        dispatcher = self._runner.cudagraph_dispatcher
        original, full = dispatcher.dispatch, compat.full_graph_mode()

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            if self._demoted and kwargs.get("valid_modes") in (None, set()):
                kwargs["invalid_modes"] = {*(kwargs.get("invalid_modes") or ()), full}
            mode, descriptor = original(*args, **kwargs)
            self._graph = str(mode.name)
            return mode, descriptor

        dispatcher.dispatch = dispatch
