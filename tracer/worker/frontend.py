"""Where generations begin and end: vLLM's `OutputProcessor`, in the process that calls the engine.

The same class stands behind the HTTP server and behind the offline `LLM`, sees every sequence of `n > 1` on its own,
and hears of finishes, stop strings, aborts and dead engines. It is where a generation gets its span ID and where the
`TraceRequest` is put into `SamplingParams.extra_args`; a client's own value under our key never passes.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal
from weakref import WeakKeyDictionary

from tracer import config, context
from tracer._guard import Guard
from tracer.capture_request import beam_search_refusal, embeddings_refusal
from tracer.config import Settings
from tracer.context import ACTIVE, EXTRA_ARGS_KEY, TEXT_KEY, Inbound
from tracer.export import Channel, engine_infos, mark_hooked, process_channel
from tracer.records import CaptureSpec, EngineInfo, GenerationEnd, GenerationStart, PlainGeneration, TraceRequest
from tracer.regions import find_regions
from tracer.sampling import Sampler
from tracer.step_spans import parse_step_spans
from tracer.worker import compat
from tracer.worker.reasoning import Thinking
from tracer.worker.tokens import TokenBytes, token_bytes

__all__ = ["Frontend", "install"]

PARAMETERS: Final = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed", "max_tokens")
"""Sampling parameters that have a GenAI attribute of the same name under `gen_ai.request`."""
MAX_UNSENT: Final = 4096
"""Ends that wait for room in the queue."""
LOG: Final = logging.getLogger("vllm.tensorspan")


@dataclass(slots=True)
class _Generation:
    """One open generation."""

    request: TraceRequest | PlainGeneration
    """A PlainGeneration if it is only counted."""
    bytes_of: TokenBytes | None
    engine: int
    """`id` of the output processor that runs it: a process may hold several engines."""
    prompt_tokens: int = 0
    on_end: Callable[[int, int], None] | None = None
    thinking_tokens: int | None = None
    output_ids: list[int] = field(default_factory=list)
    first_token_ns: int | None = None
    cached_tokens: int = 0
    finish_reason: str = "stop"


class Frontend:
    """Sends GenerationStart and GenerationEnd for each traced sequence of this process, PlainGeneration for others."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sampler = Sampler.of(settings)
        self._step_spans = parse_step_spans(settings.step_spans)
        self._counting = config.metrics_counted()
        self._guard = Guard()
        self._open: dict[str, _Generation] = {}
        self._unsent: deque[GenerationEnd | PlainGeneration] = deque(maxlen=MAX_UNSENT)
        self._thinking = Thinking()
        self._tables: dict[int, TokenBytes] = {}
        self._engines: WeakKeyDictionary[Any, tuple[EngineInfo, ...]] = WeakKeyDictionary()
        """By output processor, that is, by engine: a script may start one after the other."""

    def begin(self, processor: Any, request: Any, choice: int, *, served: bool) -> None:
        """Before vLLM registers `request` (an `EngineCoreRequest`): decide, announce, attach.

        served: True behind `AsyncLLM`, which may answer a network, False behind the synchronous `LLM`.
        Raises CaptureRequestError or CaptureUnavailableError to an offline caller who asked for the impossible; a
        client of the server has been told by the middleware already.
        """
        if request.sampling_params is None:
            return
        extra, model = request.sampling_params.extra_args or {}, self._model(processor, request)
        inbound, text = self._origin(extra, model, served=served)
        if inbound is None and text:
            capture = context.parse_capture(text)
            inbound = self._offline(capture, model)
        traced = None
        if inbound is not None and (inbound.sampled or inbound.capture is not None):
            if inbound.source == "offline" and inbound.capture is not None:
                if request.prompt_token_ids is None:
                    raise embeddings_refusal()
                context.check_capture(inbound.capture, self._engine_infos(processor))
            with self._guard("announcing a generation"):
                traced = self._announce(processor, request, choice, inbound)
        if traced is None and self._counting:
            with self._guard("counting a generation"):
                self._open[request.request_id] = self._plain(processor, request, choice, inbound)
        _attach(request, traced)

    def _plain(self, processor: Any, request: Any, choice: int, inbound: Inbound | None) -> _Generation:
        """A generation without spans and capture, of which the metrics hear once, at its end."""
        plain = PlainGeneration(
            model=self._model(processor, request),
            operation="text_completion" if inbound is None else inbound.operation,
            start_ns=context.wall_clock_ns(),
            parent_span_id=None if inbound is None else inbound.parent_span_id,
            choice=choice,
            prompt_tokens=_prompt_tokens(request),
        )
        return _Generation(plain, None, id(processor))

    def _origin(self, extra: dict[str, Any], model: str, *, served: bool) -> tuple[Inbound | None, str]:
        """Who asked: the middleware, a `capture(...)` block, or the text of an offline request.

        An asynchronous engine may stand behind any HTTP server, which passes its clients' `vllm_xargs` on: there a
        text counts only if the middleware has judged it.
        """
        inbound = ACTIVE.get()
        if inbound is not None or context.in_http_request.get():
            return inbound, ""
        text = "" if served else str(extra.get(TEXT_KEY) or "")
        return (self._offline(None, model) if not text and self._settings.trace else None), text

    def _offline(self, capture: CaptureSpec | None, model: str) -> Inbound:
        """A request that nobody's trace belongs to."""
        made = Inbound.offline(capture)
        sampled = self._sampler.decide(made.trace_id, None, {"model": model})
        return replace(made, sampled=sampled, step_spans=self._step_spans)

    def _announce(self, processor: Any, request: Any, choice: int, inbound: Inbound) -> TraceRequest | None:
        trace_id, span_id = inbound.issue()
        traced = TraceRequest(trace_id, span_id, inbound.sampled, inbound.capture)
        table = token_bytes(processor.tokenizer, self._tables) if inbound.capture is not None else None
        start = self._start(request, choice, inbound, traced, table, self._model(processor, request))
        if not self._channel().send(start):
            LOG.warning("tensorspan: the queue is full; generation %s is not traced", traced.span_id)
            return None
        self._open[request.request_id] = _Generation(
            traced, table, id(processor), start.prompt_tokens, inbound.on_end if inbound.capture is not None else None,
        )  # fmt: skip
        return traced

    def _start(
        self, request: Any, choice: int, inbound: Inbound, traced: TraceRequest, table: TokenBytes | None, model: str
    ) -> GenerationStart:
        ids = tuple(request.prompt_token_ids or ())
        captured = inbound.capture is not None
        texts = table(ids) if table is not None and self._settings.capture_text else ()
        return GenerationStart(
            trace_id=traced.trace_id,
            span_id=traced.span_id,
            parent_span_id=inbound.parent_span_id,
            sampled=inbound.sampled,
            start_ns=context.wall_clock_ns(),
            request_id=request.request_id,
            model=model,
            operation=inbound.operation,
            choice=choice,
            prompt_tokens=_prompt_tokens(request),
            max_tokens=request.sampling_params.max_tokens,
            params=_parameters(request.sampling_params),
            capture=inbound.capture,
            prompt_token_ids=ids if captured else (),
            prompt_token_bytes=texts,
            regions=find_regions(inbound.messages, table(ids)) if table is not None else (),
            owner=inbound.owner,
            step_spans=inbound.step_spans,
            conversation_id=inbound.conversation_id,
        )

    def outputs(self, processor: Any, outputs: Sequence[Any]) -> None:
        """After vLLM has processed a batch of `EngineCoreOutput`."""
        with self._guard("following outputs"):
            self._send_ends()
            for output in outputs:
                generation = self._open.get(output.request_id)
                if generation is not None:
                    self._follow(processor, output, generation)

    def _follow(self, processor: Any, output: Any, generation: _Generation) -> None:
        if output.new_token_ids and generation.first_token_ns is None:
            generation.first_token_ns = context.wall_clock_ns()
        generation.output_ids.extend(output.new_token_ids)
        if output.prefill_stats is not None:
            generation.cached_tokens = output.prefill_stats.num_cached_tokens
        if output.request_id in processor.request_states:
            return
        infos = self._engine_infos(processor) if isinstance(generation.request, TraceRequest) else ()
        if infos:
            parser, output_ids = infos[0].reasoning_parser, generation.output_ids
            generation.thinking_tokens = self._thinking.tokens(processor, parser, output_ids)
        reason = "stop" if output.finish_reason is None else str(output.finish_reason)
        self._end(output.request_id, "error" if reason == "error" else "ok", reason)

    def vanished(self, processor: Any, status: Literal["aborted", "error"], error: str = "") -> None:
        """End every generation that this engine has forgotten without a finish (`aborted`), or all (`error`)."""
        with self._guard("ending generations"):
            for request_id, generation in list(self._open.items()):
                if generation.engine != id(processor):
                    continue
                if status == "error" or request_id not in processor.request_states:
                    self._end(request_id, status, "abort" if status == "aborted" else "error", error)

    def _end(self, request_id: str, status: Literal["ok", "aborted", "error"], reason: str, error: str = "") -> None:
        generation = self._open.pop(request_id)
        if isinstance(generation.request, PlainGeneration):
            self._unsent.append(_counted(generation.request, generation, status, error))
        else:
            self._unsent.append(self._traced_end(generation.request, generation, status, reason, error))
        self._send_ends()
        if generation.on_end is not None:
            generation.on_end(generation.prompt_tokens, len(generation.output_ids))

    def _traced_end(
        self,
        request: TraceRequest,
        generation: _Generation,
        status: Literal["ok", "aborted", "error"],
        reason: str,
        error: str,
    ) -> GenerationEnd:
        ids = tuple(generation.output_ids)
        captured = request.capture is not None
        texts = generation.bytes_of(ids) if generation.bytes_of is not None and self._settings.capture_text else ()
        return GenerationEnd(
            trace_id=request.trace_id,
            span_id=request.span_id,
            end_ns=context.wall_clock_ns(),
            status=status,
            finish_reason=reason,
            output_tokens=len(ids),
            cached_tokens=generation.cached_tokens,
            first_token_ns=generation.first_token_ns,
            error=error,
            reasoning_tokens=generation.thinking_tokens,
            output_token_ids=ids if captured else (),
            output_token_bytes=texts,
        )

    def _send_ends(self) -> None:
        """A refused end is kept: without it the generation would stay open in the exporter."""
        while self._unsent and self._channel().send(self._unsent[0]):
            self._unsent.popleft()

    @property
    def idle(self) -> bool:
        """True if no generation of this process is followed: the hooks then do nothing more."""
        return not self._open and not self._unsent

    def _channel(self) -> Channel:
        return process_channel(self._settings)

    def _engine_infos(self, processor: Any) -> tuple[EngineInfo, ...]:
        infos = self._engines.get(processor) or engine_infos(self._settings)
        self._engines[processor] = infos
        return infos

    def _model(self, processor: Any, request: Any) -> str:
        if request.lora_request is not None:
            return str(request.lora_request.lora_name)
        infos = self._engine_infos(processor)
        return infos[0].model if infos else ""


def _prompt_tokens(request: Any) -> int:
    return len(request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids)


def _counted(
    plain: PlainGeneration, generation: _Generation, status: Literal["ok", "aborted", "error"], error: str
) -> PlainGeneration:
    return replace(
        plain,
        end_ns=context.wall_clock_ns(),
        status=status,
        error=error,
        output_tokens=len(generation.output_ids),
        first_token_ns=generation.first_token_ns,
    )


def _parameters(params: Any) -> dict[str, int | float | str | bool | list[str]]:
    """The request's sampling parameters under their GenAI names."""
    out = {name: getattr(params, name) for name in PARAMETERS if getattr(params, name, None) is not None}
    if params.stop:
        out["stop_sequences"] = list(params.stop)
    if params.n > 1:
        out["choice.count"] = params.n
    return out


def _attach(request: Any, traced: TraceRequest | None) -> None:
    """Give the engine our TraceRequest, or make sure that it gets none; the caller's object is not changed."""
    extra = request.sampling_params.extra_args
    if traced is None and (not extra or EXTRA_ARGS_KEY not in extra):
        return
    params = copy.copy(request.sampling_params)
    params.extra_args = {key: value for key, value in (extra or {}).items() if key not in (EXTRA_ARGS_KEY, TEXT_KEY)}
    if traced is not None:
        params.extra_args[EXTRA_ARGS_KEY] = context.to_extra_args(traced)
        if _needs_every_query(traced.capture):
            # No query and no hidden state exists for positions that come from the prefix cache.
            params.skip_reading_prefix_cache = True
    request.sampling_params = params


def _needs_every_query(capture: CaptureSpec | None) -> bool:
    if capture is None:
        return False
    specs = (capture.attention, capture.qk, capture.hidden_states, capture.router)
    return capture.prompt_logits is not None or any(spec is not None and spec.rows == "all" for spec in specs)


def install(settings: Settings) -> None:
    """Hook `OutputProcessor` in this process, once."""
    frontend = Frontend(settings)
    owner = compat.output_processor_class()

    def add_request(original: Any) -> Any:
        def hooked(self: Any, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, *rest: Any, **named: Any) -> Any:  # noqa: E501  # fmt: skip
            if request.request_id not in self.request_states:
                queue = rest[0] if rest else named.get("queue")
                frontend.begin(self, request, request_index, served=queue is not None)
            return original(self, request, prompt, parent_req, request_index, *rest, **named)

        return hooked

    def process_outputs(original: Any) -> Any:
        def hooked(self: Any, engine_core_outputs: Sequence[Any], *rest: Any, **named: Any) -> Any:
            result = original(self, engine_core_outputs, *rest, **named)
            if not frontend.idle:
                frontend.outputs(self, engine_core_outputs)
            return result

        return hooked

    def abort_requests(original: Any) -> Any:
        def hooked(self: Any, request_ids: Iterable[str], internal: bool) -> Any:
            result = original(self, request_ids, internal)
            if not frontend.idle:
                frontend.vanished(self, "aborted")
            return result

        return hooked

    def propagate_error(original: Any) -> Any:
        def hooked(self: Any, e: Exception) -> Any:
            frontend.vanished(self, "error", f"{type(e).__name__}: {e}")
            return original(self, e)

        return hooked

    hooks = (add_request, process_outputs, abort_requests, propagate_error)
    for hook in hooks:
        compat.patch(owner, hook.__name__, hook)
    if (searching := compat.beam_search_class()) is not None:
        compat.patch(searching, "beam_search", lambda original: _one_search(original, settings))
    mark_hooked()


def _one_search(original: Any, settings: Settings) -> Any:
    """Offline beam search, of which vLLM makes a request per beam and step: no capture, and one trace of them all."""

    def beam_search(*args: Any, **named: Any) -> Any:
        inbound = ACTIVE.get()
        if inbound is not None and inbound.capture is not None:
            raise beam_search_refusal("LLM.generate with n")
        if inbound is None and not settings.trace:
            return original(*args, **named)
        # Unlike `Inbound.offline`, whose generations are traces of their own.
        together = Inbound(context.new_trace_id(), sampled=inbound.sampled if inbound is not None else True)
        token = ACTIVE.set(together)
        try:
            return original(*args, **named)
        finally:
            ACTIVE.reset(token)
            if inbound is not None:
                inbound.issued.extend(together.issued)

    return beam_search
