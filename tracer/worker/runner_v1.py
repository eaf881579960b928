"""vLLM's first model runner (`vllm.v1.worker.gpu_model_runner.GPUModelRunner`; on CPUs the only one) as a `Runner`.

Order of `input_batch.req_ids` = `query_start_loc` = block table = logits rows, from `_prepare_inputs` to sampling.
"""

from __future__ import annotations

from dataclasses import replace
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
        self._output: Any = None
        """The step's `SchedulerOutput`: vLLM may still take drafts out of it before the batch is final."""
        self._drafting = runner.speculative_config is not None
        self._demoted = False
        self._graph = "NONE"

    def plan(self, scheduler_output: Any) -> StepPlan:
        """See `batch.Runner`."""
        self._output = scheduler_output
        return plan_v1(scheduler_output)

    def view(self, *, exact: bool) -> StepView:
        """See `batch.Runner`."""
        batch, rows, first, first_logits = self._runner.input_batch, [], 0, 0
        scheduled, drafted = self._output.num_scheduled_tokens, self._output.scheduled_spec_decode_tokens
        discarded, computed = self._runner.discard_request_mask.np, self._computed(batch, exact=exact)
        for index, request_id in enumerate(batch.req_ids[: batch.num_reqs]):
            tokens, drafts = scheduled[request_id], len(drafted.get(request_id, ()))
            prompt_tokens = self._runner.requests[request_id].num_prompt_tokens
            samples = not bool(discarded[index])
            row = Row(request_id, index, first, tokens, computed[index], prompt_tokens, samples, drafts)
            rows.append(replace(row, first_logits=first_logits) if self._drafting else row)
            first, first_logits = first + tokens, first_logits + drafts + 1
        return StepView(tuple(rows), self._graph)

    def _computed(self, batch: Any, *, exact: bool) -> list[int]:
        """Tokens of each request whose keys are in the cache.

        With drafts under asynchronous scheduling the host counts all of the last step's drafts as accepted until the
        forward pass has been queued: whoever must know before that waits for the device.
        """
        if exact and self._runner.use_async_spec_decode:
            known: list[int] = self._runner.num_computed_tokens[: batch.num_reqs].tolist()
            return known
        host: list[int] = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        return host

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
            tracer.forward_done(None if state is None else state.logits)
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
