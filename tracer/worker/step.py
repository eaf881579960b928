"""One engine step, from the scheduler's plan to the records: the only mutable state of the worker's side.

    begin(plan) → attention(layer, …) per layer → forward_done(logits) → take_step() → finish(step, output)

Each public method is one telemetry boundary: it never raises into vLLM. What a failure costs is said in the step's
`dropped` list.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Final

import torch

from tracer._guard import Guard
from tracer.context import from_extra_args, wall_clock_ns
from tracer.export import Channel
from tracer.records import ArrayRecord, AttentionSpec, EngineInfo, TraceRequest, WorkerEnd
from tracer.worker.batch import Runner
from tracer.worker.device import indices
from tracer.worker.emit import send_blocks, send_step
from tracer.worker.layers import Layer
from tracer.worker.maths import Maths
from tracer.worker.pack import DTYPES, pack
from tracer.worker.rows import past_keys, row_weights
from tracer.worker.shares import own_heads, takes_part
from tracer.worker.work import Step, Traced, Work

__all__ = ["StepTracer"]

PREFILL_ROWS: Final = 256
"""Query rows per record of the prompt's map: bounds a record's size."""


class StepTracer:
    """Turns the steps of one worker into records."""

    def __init__(
        self, channel: Channel, runner: Runner, layers: Sequence[Layer], info: EngineInfo, maths: Maths
    ) -> None:
        self._channel = channel
        self._runner = runner
        self._layers = {layer.info.index: layer for layer in layers if layer.math is not None}
        self._info = info
        self._maths = maths
        self._guard = Guard()
        self._traced: dict[str, Traced] = {}
        self._step: Step | None = None
        self._wants_attention = False
        self._lock = threading.Lock()
        """Guards `pending` and `finished`: tokens may arrive on vLLM's output thread."""

    # -- before the forward pass -------------------------------------------------------------------------------

    def begin(self, scheduler_output: Any) -> bool:
        """Note arrivals and departures; True if the coming step holds a traced request."""
        self._step, self._wants_attention = None, False
        with self._guard("begin"):
            plan = self._runner.plan(scheduler_output)
            for request_id in plan.finished:
                self._forget(request_id)
            for arrival in plan.arrived:
                self._arrive(arrival.request_id, arrival.extra_args)
            for request_id in plan.resumed & self._traced.keys():
                self._traced[request_id].attempt += 1
            scheduled = [self._traced[name] for name in plan.scheduled & self._traced.keys()]
            self._wants_attention = any(traced.slots or traced.qk_slots for traced in scheduled)
            self._runner.demote(any(traced.watched for traced in scheduled))
            self._step = Step(wall_clock_ns()) if scheduled else None
        return self._step is not None

    def _arrive(self, request_id: str, extra_args: dict[str, Any] | None) -> None:
        request = from_extra_args(extra_args)
        if request is None or not takes_part(self._info, request.capture):
            return
        known = self._traced.get(request_id)
        if known is not None:  # Runner V2 sees a preempted request as a new one.
            known.attempt += 1
            return
        self._traced[request_id] = self._asked(request)

    def _asked(self, request: TraceRequest) -> Traced:
        """The request with the layers and heads that it stores."""
        capture = request.capture
        if capture is None or not capture.wants_layers:
            return Traced(request, {}, [])
        spec = capture.attention or AttentionSpec()
        slots = self._slots(spec.layers) if capture.wants_attention else {}
        qk_slots = self._slots(capture.qk.layers) if capture.qk is not None else {}
        heads, own = own_heads(self._info, spec.heads, next(iter(qk_slots), None))
        return Traced(request, slots if heads else {}, heads, qk_slots, own, watched=bool(slots or qk_slots))

    def _slots(self, layers: tuple[int, ...] | None) -> dict[int, int]:
        """Layer index → place on the stored axis, without layers that cannot be captured."""
        wanted = [index for index in layers or sorted(self._layers) if index in self._layers]
        return {index: slot for slot, index in enumerate(wanted)}

    def _forget(self, request_id: str) -> None:
        traced = self._traced.pop(request_id, None)
        if traced is None:
            return
        with self._lock:
            traced.finished = True
            owed = traced.pending > 0
        if not owed:
            self._say_end(traced)

    def _say_end(self, traced: Traced) -> None:
        request = traced.request
        self._channel.send(WorkerEnd(request.trace_id, request.span_id, self._info.rank, traced.lost))

    # -- during the forward pass -------------------------------------------------------------------------------

    @property
    def wants_attention(self) -> bool:
        """The one comparison that an attention layer makes on every step."""
        return self._wants_attention

    def attention(self, index: int, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any) -> None:
        """Weights of layer `index` for every row that asked for them; the cache already holds this step's keys."""
        step = self._step
        if step is None:
            return
        with self._guard("attention"), torch.no_grad():
            layer = self._layers[index]
            self._works(step)
            rows = [work for work in step.rows if index in work.traced.slots]
            sources = [work for work in step.sources if index in work.traced.qk_slots]
            if rows:
                self._or_say("attention", rows, self._maths.attention, step, layer, rows, query, kv_cache, metadata)
            if sources:
                self._or_say("qk", sources, self._maths.collect, step, layer, sources, query, kv_cache, metadata)
            for work in step.prompts:
                if index in work.traced.slots:
                    self._or_say("attention_prefill", [work], self._prompt, layer, work, query, kv_cache, metadata)

    def _works(self, step: Step) -> list[Work]:
        """The traced rows of this step, worked out when the batch is first final."""
        if step.view is None:
            step.view = self._runner.view(exact=self._wants_attention)
            rows = [row for row in step.view.rows if row.request_id in self._traced]
            step.hold([Work(part, self._traced[row.request_id]) for row in rows for part in row.parts()])
        return step.works

    def _or_say(self, what: str, works: list[Work], action: Callable[..., None], *arguments: Any) -> None:
        """`action`; a failure is said by each of `works` and costs nobody else anything."""
        with self._guard(what):
            try:
                action(*arguments)
            except Exception as error:
                layer = next(item for item in arguments if isinstance(item, Layer))
                for work in works:
                    work.traced.problems.append(f"{what}: layer {layer.info.index}: {error}")
                raise

    def _prompt(self, layer: Layer, work: Work, query: torch.Tensor, cache: torch.Tensor, metadata: Any) -> None:
        self._prompt_rows(layer, work, query, past_keys(layer, work.row, cache, metadata))

    def _prompt_rows(self, layer: Layer, work: Work, query: torch.Tensor, keys: torch.Tensor) -> None:
        """Send this chunk's rows of the prompt's map, a bounded number at a time."""
        row, traced = work.row, work.traced
        assert traced.attention is not None
        for start in range(row.computed, min(row.position + 1, row.prompt_tokens), PREFILL_ROWS):
            stop = min(start + PREFILL_ROWS, row.position + 1, row.prompt_tokens)
            part = query[row.first + start - row.computed : row.first + stop - row.computed]
            weights = row_weights(layer, part, keys[:, :stop], torch.arange(start, stop, device=keys.device))
            chosen = [head for head in traced.heads if head < weights.shape[0]]
            block = weights[indices(chosen, weights.device)].to(DTYPES[traced.attention.dtype])
            where = (traced.slots[layer.info.index], traced.own.slot, start, 0)
            arrays, payload = pack([("attention_prefill", block, where)])
            record = ArrayRecord(traced.request.trace_id, traced.request.span_id, traced.attempt, arrays)
            if not self._channel.send(record, payload):
                traced.problems.append("attention_prefill: queue full")

    # -- after the forward pass --------------------------------------------------------------------------------

    def forward_done(self, logits: torch.Tensor | None) -> None:
        """Copy and count the traced rows of the raw logits [batch rows, vocab] before anything changes them."""
        step, self._wants_attention = self._step, False
        self._runner.demote(False)
        if step is None:
            return
        with self._guard("logits"), torch.no_grad():
            for work in self._works(step):
                _check_layers(work)
                work.traced.pending += 1
            try:
                self._logits(step, logits)
            finally:
                self._maths.copy(step)

    def _logits(self, step: Step, logits: torch.Tensor | None) -> None:
        sampling = [work for work in step.works if work.row.samples]
        if logits is None or not sampling or self._info.rank:  # Where ranks gather logits, all have them: one stores.
            return
        for place, work in enumerate(sampling):
            work.logits_row = place
        self._maths.logits(step, sampling, logits)

    def sampled(self, tokens: torch.Tensor) -> None:
        """The sampler's token IDs [batch rows, 1], on the device and not waited for."""
        if self._step is not None:
            with self._guard("sampled"), torch.no_grad():
                self._maths.sampled(self._step, tokens)

    def take_step(self) -> Step | None:
        """The step waiting for its tokens; the tracer is free for the next one."""
        step, self._step = self._step, None
        return step

    def finish(self, step: Step, output: Any) -> Any:
        """Complete the step when its tokens are known: now, or when an asynchronous output is fetched."""
        if not hasattr(output, "get_output"):
            self._complete(step, output)
            return output
        fetch, lock = output.get_output, threading.Lock()
        fetched: list[Any] = []

        def get_output() -> Any:
            with lock:
                if not fetched:
                    fetched.append(fetch())
                    self._complete(step, fetched[0])
            return fetched[0]

        output.get_output = get_output
        if self._info.rank:  # vLLM asks rank 0 alone for its tokens; all ranks sample the same.
            self._aside.submit(self._fetch, get_output)
        return output

    def _fetch(self, get_output: Callable[[], Any]) -> None:
        with self._guard("fetching the step's tokens"):
            get_output()

    @cached_property
    def _aside(self) -> ThreadPoolExecutor:
        """One thread that waits for the device where the step must not."""
        device = torch.device(self._info.device)
        choose_device = torch.cuda.set_device if device.type == "cuda" else bool
        return ThreadPoolExecutor(1, "tensorspan-finish", choose_device, (device,))

    def _complete(self, step: Step, output: Any) -> None:
        with self._guard("records"), torch.no_grad():
            end_ns = wall_clock_ns()
            sampled = dict(zip(output.req_ids, output.sampled_token_ids, strict=False))
            for work in step.works:
                work.take(sampled.get(work.row.request_id) or (), settled=step.settled)
            with self._guard("summaries"):
                self._maths.finish(step)
            for work in step.works:
                with self._guard("a step's record"):
                    self._send_or_count(step, work, end_ns)
            self._maths.release(step)

    def _send_or_count(self, step: Step, work: Work, end_ns: int) -> None:
        try:
            if not work.rejected:
                send_blocks(self._channel, work)
                send_step(self._channel, step, work, end_ns)
        except Exception:
            work.traced.lost += 1
            raise
        finally:
            self._settle(work.traced)

    def _settle(self, traced: Traced) -> None:
        """One step less to wait for; the end is said after the last record, whichever thread wrote it."""
        with self._lock:
            traced.pending -= 1
            last = traced.finished and traced.pending == 0
        if last:
            self._say_end(traced)


def _check_layers(work: Work) -> None:
    """Say it if layers were missed: a step ran under a FULL CUDA graph after all, or one of them failed."""
    for what, wanted, seen, slots in (
        ("attention", work.wants_row, work.layers_seen, work.traced.slots),
        ("qk", bool(work.traced.qk_slots), work.qk_seen, work.traced.qk_slots),
    ):
        said = any(problem.startswith(f"{what}: layer") for problem in work.traced.problems)
        if wanted and seen < len(slots) and not said:
            work.traced.problems.append(f"{what}: {len(slots) - seen} of {len(slots)} layers were not seen")
    if work.has_qk:  # In the order of steps, also where tokens arrive on another thread.
        work.traced.keys_sent = work.row.position + 1
