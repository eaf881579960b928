"""One engine step, from the scheduler's plan to the records: the only mutable state of the worker's side.

    begin(plan) → attention(layer, …) per layer → forward_done(logits) → take_step() → finish(step, output)

Each public method is one telemetry boundary: it never raises into vLLM. What a failure costs is said in the step's
`dropped` list.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from tracer._guard import Guard
from tracer.context import from_extra_args, step_span_id, wall_clock_ns
from tracer.export import Channel
from tracer.records import (
    ArrayRecord,
    AttentionSpec,
    AttentionSummary,
    EngineInfo,
    StepRecord,
    WorkerEnd,
)
from tracer.statistics import logits_statistics, logits_summaries
from tracer.worker.attention import row_features, summarise
from tracer.worker.batch import Runner
from tracer.worker.layers import Layer
from tracer.worker.pack import DTYPES, pack
from tracer.worker.rows import last_row_weights, past_keys, row_weights, worth_batching
from tracer.worker.work import Step, Traced, Work

__all__ = ["StepTracer"]

PREFILL_ROWS: Final = 256
"""Query rows per record of the prompt's map: bounds a record's size."""


class StepTracer:
    """Turns the steps of one worker into records."""

    def __init__(self, channel: Channel, runner: Runner, layers: Sequence[Layer], info: EngineInfo, topk: int) -> None:
        self._channel = channel
        self._runner = runner
        self._layers = {layer.info.index: layer for layer in layers if layer.math is not None}
        self._info = info
        self._topk = max(2, min(topk, info.vocab_size))
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
            self._wants_attention = any(traced.slots for traced in scheduled)
            self._runner.demote(self._wants_attention)
            self._step = Step(wall_clock_ns()) if scheduled else None
        return self._step is not None

    def _arrive(self, request_id: str, extra_args: dict[str, Any] | None) -> None:
        request = from_extra_args(extra_args)
        if request is None:
            return
        known = self._traced.get(request_id)
        if known is not None:  # Runner V2 sees a preempted request as a new one.
            known.attempt += 1
            return
        capture = request.capture
        if capture is None or not capture.wants_attention:
            self._traced[request_id] = Traced(request, {}, [])
            return
        spec = capture.attention or AttentionSpec()
        wanted = [index for index in spec.layers or sorted(self._layers) if index in self._layers]
        heads = list(spec.heads or range(self._info.num_heads))
        self._traced[request_id] = Traced(request, {index: slot for slot, index in enumerate(wanted)}, heads)

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
            works = [work for work in self._works(step) if index in work.traced.slots]
            for work in self._attend_together(self._layers[index], works, query, kv_cache, metadata):
                with self._guard(f"attention of layer {index}"):
                    self._attend_or_say(self._layers[index], work, query, kv_cache, metadata)

    def _attend_together(
        self, layer: Layer, works: list[Work], query: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> list[Work]:
        """Rows that need no more than their last query, in one pass; returns the requests that are still to do."""
        batch = [work for work in works if work.row.samples and not work.wants_prompt]
        if not worth_batching([work.row for work in batch]):
            return works
        with self._guard(f"attention of layer {layer.info.index}"):
            rows = last_row_weights(layer, [work.row for work in batch], query, cache, metadata)
            for work, weights in zip(batch, rows, strict=True):
                self._keep(work, layer.info.index, weights)
            return [work for work in works if work not in batch]
        return works

    def _works(self, step: Step) -> list[Work]:
        """The traced rows of this step, worked out when the batch is first final."""
        if step.view is None:
            step.view = self._runner.view()
            rows = [row for row in step.view.rows if row.request_id in self._traced]
            step.works = [Work(row, self._traced[row.request_id]) for row in rows]
        return step.works

    def _attend_or_say(self, layer: Layer, work: Work, query: torch.Tensor, cache: torch.Tensor, metadata: Any) -> None:
        try:
            self._attend(layer, work, query, cache, metadata)
        except Exception as error:
            work.traced.problems.append(f"attention: layer {layer.info.index}: {error}")
            raise

    def _attend(self, layer: Layer, work: Work, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any) -> None:
        row = work.row
        if not (row.samples or work.wants_prompt):
            return
        keys = past_keys(layer, row, kv_cache, metadata)
        if work.wants_prompt:
            self._prompt_rows(layer, work, query, keys)
        if row.samples:
            last = query[row.first + row.tokens - 1 : row.first + row.tokens]
            weights = row_weights(layer, last, keys, torch.full((1,), row.position, device=keys.device))[:, 0]
            self._keep(work, layer.info.index, weights)

    def _keep(self, work: Work, index: int, weights: torch.Tensor) -> None:
        """Put one layer's row [heads, keys] in its place of the step's block."""
        traced = work.traced
        if work.weights is None:
            shape = (len(traced.slots), len(traced.heads), weights.shape[-1])
            work.weights = torch.zeros(shape, dtype=torch.float32, device=weights.device)
        chosen = [head for head in traced.heads if head < weights.shape[0]]
        work.layers_seen += 1
        every = len(chosen) == weights.shape[0]
        work.weights[traced.slots[index], : len(chosen)] = weights if every else weights[chosen]

    def _prompt_rows(self, layer: Layer, work: Work, query: torch.Tensor, keys: torch.Tensor) -> None:
        """Send this chunk's rows of the prompt's map, a bounded number at a time."""
        row, traced = work.row, work.traced
        assert traced.attention is not None
        for start in range(row.computed, min(row.position + 1, row.prompt_tokens), PREFILL_ROWS):
            stop = min(start + PREFILL_ROWS, row.position + 1, row.prompt_tokens)
            part = query[row.first + start - row.computed : row.first + stop - row.computed]
            weights = row_weights(layer, part, keys[:, :stop], torch.arange(start, stop, device=keys.device))
            chosen = [head for head in traced.heads if head < weights.shape[0]]
            block = weights[chosen].to(DTYPES[traced.attention.dtype])
            where = (traced.slots[layer.info.index], 0, start, 0)
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
            sampling = [work for work in step.works if work.row.samples]
            if logits is None or not sampling:
                return
            for place, work in enumerate(sampling):
                work.logits_row = place
            # Pinned and asynchronous on a GPU: a pageable copy would wait for the whole forward pass.
            picked = torch.tensor([work.row.index for work in sampling], pin_memory=logits.is_cuda)
            step.logits = logits.index_select(0, picked.to(logits.device, non_blocking=True)).to(torch.float32)
            step.statistics = logits_statistics(step.logits, self._topk)

    def take_step(self) -> Step | None:
        """The step waiting for its tokens; the tracer is free for the next one."""
        step, self._step = self._step, None
        return step

    def finish(self, step: Step, output: Any) -> Any:
        """Complete the step when its tokens are known: now, or when an asynchronous output is fetched."""
        if not hasattr(output, "get_output"):
            self._complete(step, output)
            return output
        fetch = output.get_output

        def get_output() -> Any:
            result = fetch()
            self._complete(step, result)
            return result

        output.get_output = get_output
        return output

    def _complete(self, step: Step, output: Any) -> None:
        with self._guard("records"), torch.no_grad():
            end_ns = wall_clock_ns()
            sampled = dict(zip(output.req_ids, output.sampled_token_ids, strict=False))
            for work in step.works:
                work.token = next(iter(sampled.get(work.row.request_id) or ()), None)
            with self._guard("logits"):
                _summarise_logits(step)
            for work in step.works:
                with self._guard("a step's record"):
                    self._send_or_count(step, work, end_ns)

    def _settle(self, traced: Traced) -> None:
        """One step less to wait for; the end is said after the last record, whichever thread wrote it."""
        with self._lock:
            traced.pending -= 1
            last = traced.finished and traced.pending == 0
        if last:
            self._say_end(traced)

    def _send_or_count(self, step: Step, work: Work, end_ns: int) -> None:
        try:
            if work.weights is not None:
                work.features = row_features(work.weights, work.row.prompt_tokens)
            self._send(work, self._record(step, work, end_ns), self._arrays(step, work))
        except Exception:
            work.traced.lost += 1
            raise
        finally:
            self._settle(work.traced)

    def _record(self, step: Step, work: Work, end_ns: int) -> StepRecord:
        row, request, view = work.row, work.traced.request, step.view
        assert view is not None
        return StepRecord(
            trace_id=request.trace_id,
            span_id=request.span_id,
            step_span_id=step_span_id(request.span_id, row.position, work.traced.attempt),
            step=row.step,
            phase="prefill" if row.is_prefill else "decode",
            attempt=work.traced.attempt,
            position=row.position,
            tokens=row.tokens,
            kv_len=row.position + 1,
            start_ns=step.start_ns,
            end_ns=end_ns,
            sampled=request.sampled,
            batch_requests=len(view.rows),
            batch_tokens=view.tokens,
            cuda_graph=view.cuda_graph,
            token_id=work.token,
            logits=work.logits,
            attention=self._attention(work),
            capture=request.capture is not None,
        )

    def _attention(self, work: Work) -> AttentionSummary | None:
        if work.weights is None or work.features is None:
            return None
        return summarise(work.weights, work.features, list(work.traced.slots), work.traced.heads)

    def _arrays(self, step: Step, work: Work) -> list[tuple[str, torch.Tensor, tuple[int, ...]]]:
        """(name, tensor, start) of everything this row stores."""
        capture = work.traced.request.capture
        out: list[tuple[str, torch.Tensor, tuple[int, ...]]] = []
        if capture is None:
            return out
        if capture.logits is not None and step.logits is not None and work.logits_row >= 0:
            row = step.logits[work.logits_row]
            dtype = DTYPES[capture.logits.dtype]
            if capture.logits.top is None:
                out.append(("logits", row.to(dtype), (0,)))
            else:
                values, ids = torch.topk(row, capture.logits.top)
                out += [("logits_topk", values.to(dtype), (0,)), ("logits_topk_id", ids.to(torch.int32), (0,))]
        if work.weights is not None and work.features is not None:
            if capture.attention is not None:
                out.append(("attention", work.weights.to(DTYPES[capture.attention.dtype]), (0, 0, 0)))
            out.append(("attention_summary", work.features, (0, 0, 0)))
        return out

    def _send(self, work: Work, record: StepRecord, arrays: list[tuple[str, torch.Tensor, tuple[int, ...]]]) -> None:
        """Hand the record over whole; without its arrays if the queue is full; else count it."""
        traced = work.traced
        slots, payload = pack(arrays)
        # Taken before sending: the next step's forward pass may add to the list meanwhile.
        problems, traced.problems = traced.problems, []
        if self._channel.send(replace(record, arrays=slots, dropped=tuple(problems)), payload):
            return
        problems += [f"{name}: queue full" for name, _, _ in arrays]
        if arrays and self._channel.send(replace(record, dropped=tuple(problems))):
            return
        traced.lost += 1
        traced.problems = [*problems, "step: queue full", *traced.problems]


def _summarise_logits(step: Step) -> None:
    if step.logits is None or step.statistics is None:
        return
    works = [work for work in step.works if work.logits_row >= 0]  # In the order of their rows.
    summaries = logits_summaries(step.logits, step.statistics, [work.token for work in works])
    for work, summary in zip(works, summaries, strict=True):
        work.logits = summary


def _check_layers(work: Work) -> None:
    """A row with a layer missing is no row: zeros would pass for weights.

    Layers are missed if a step ran under a FULL CUDA graph after all, or if one of them failed.
    """
    asked = len(work.traced.slots) if work.row.samples else 0
    if work.layers_seen < asked:
        work.weights = None
        if not any(problem.startswith("attention: layer") for problem in work.traced.problems):
            work.traced.problems.append(f"attention: {asked - work.layers_seen} of {asked} layers were not seen")
