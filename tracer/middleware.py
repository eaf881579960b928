"""The edge: reads what a request asks for, says in the answer what it gets, and makes the SERVER span.

Pure ASGI, for any server around vLLM's app: `vllm serve --middleware tracer.middleware.TracingMiddleware`. Nothing here
waits for telemetry, and a request that asks for no capture never fails because of us. One `_Exchange` per request owns
all that changes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final, Protocol

from tracer import config, metrics_page
from tracer._guard import Guard
from tracer.authorise import KEY_HEADER, Gate
from tracer.baggage import baggage_member
from tracer.budgets import captured_bytes
from tracer.clients import header_lines
from tracer.config import Settings
from tracer.context import (
    ACTIVE,
    Inbound,
    SpanContext,
    check_capture,
    format_traceparent,
    in_http_request,
    new_span_id,
    new_trace_id,
    parse_capture,
    parse_traceparent,
    wall_clock_ns,
)
from tracer.keys import Key
from tracer.log_context import LOG_SPAN, LogSpan
from tracer.metrics_page import MetricsPage
from tracer.problems import REFUSALS, Problem, problem_of
from tracer.records import CaptureSpec, EngineInfo, Record, RequestSpan
from tracer.request_body import RequestBody
from tracer.sampling import Sampler
from tracer.semconv import CONVERSATION_ID
from tracer.step_spans import HEADER as STEPS_HEADER
from tracer.step_spans import parse_step_spans

__all__ = ["MAX_BODY", "MAX_REFS", "ROUTES", "TracingMiddleware"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

ROUTES: Final = {
    "/v1/chat/completions": "chat",
    "/v1/chat/completions/batch": "chat",
    "/v1/completions": "text_completion",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/cohere/v2/chat": "chat",
    "/inference/v1/generate": "text_completion",
}
"""vLLM's routes that generate, with the GenAI name of what they do."""
MAX_BODY: Final = 64_000_000
"""Bytes of a request body that is inspected; a larger one is passed on unread, and only headers can ask."""
MAX_REFS: Final = 64
"""References named in one response header; clients refuse header lines of more than 64 kB."""
OURS: Final = (b"trace-capture", KEY_HEADER, STEPS_HEADER)
GUARD: Final = Guard()


class Outlet(Protocol):
    """The part of `tracer.export.Channel` that is used here."""

    def send(self, record: Record, /) -> bool:
        """Take the record, or refuse it; never wait."""


class TracingMiddleware:
    """ASGI middleware; does nothing at all unless the settings enable tensorspan."""

    def __init__(
        self,
        app: App,
        settings: Settings | None = None,
        channel: Outlet | None = None,
        engines: Callable[[], Sequence[EngineInfo]] | None = None,
    ) -> None:
        """Raises SettingsError if captures need a key and there is none, or a setting cannot be used."""
        self.app = app
        self.settings = config.load() if settings is None else settings
        used = self.settings if self.settings.active else Settings()
        self.gate, self.sampler = Gate.of(used), Sampler.of(used)
        if self.settings.active and (channel is None or engines is None):
            # Servers build middleware before they serve: the exporter process may be waited for here.
            with GUARD("connecting the middleware"):
                channel, engines = _process_defaults(self.settings, channel, engines)
        self.channel = channel
        self.engines = engines or tuple
        # Only the channel knows the socket where no process before this one has chosen it.
        self.page = MetricsPage(app, getattr(channel, "settings", self.settings).socket)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if not self.settings.active or scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        # On every route: whatever reaches the engine from here may not ask for captures by itself.
        token = in_http_request.set(True)
        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if scope["type"] == "http" and scope["method"] == "POST" and path in ROUTES:
                await _Exchange(self, scope, path, receive, send).run()
            elif scope["type"] == "http" and self.settings.view and (path + "/").startswith("/tensorspan/"):
                await self._view(scope, receive, send)
            elif scope["type"] == "http" and scope["method"] == "GET" and path in metrics_page.PATHS:
                await self.page(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        finally:
            in_http_request.reset(token)

    @cached_property
    def _view(self) -> App:
        """The pages under `/tensorspan/`, made when somebody asks for one."""
        from tracer.server.app import make_app

        return make_app(self.settings)


class _Exchange:
    """One request and its response."""

    def __init__(
        self, owner: TracingMiddleware, scope: MutableMapping[str, Any], route: str, receive: Receive, send: Send
    ) -> None:
        self.owner, self.scope, self.route = owner, scope, route
        self._receive, self._send = receive, send
        self.start_ns = wall_clock_ns()
        self.headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        lines = header_lines(self.headers, b"traceparent")
        self.parent = parse_traceparent(lines[0]) if len(lines) == 1 else None
        self.span = _server_span(self.parent)
        self._decide({})
        self.replay: deque[Message] = deque()
        self.inbound: Inbound | None = None
        self.refs: tuple[str, ...] = ()
        self.capture_status = "off"
        self.requested = ""
        self.source = ""
        self.key: Key | None = None
        """With which the capture was granted."""
        self.refusal = ""
        """Why it was not."""
        self.status_code = 0
        """0 until a response has begun."""
        self.disconnected = False
        self.ended = False
        """The last body byte has been handed to the server."""
        self.reported = False

    async def run(self) -> None:
        """Judge the request, pass it on or refuse it, and report the SERVER span exactly once."""
        token, said = ACTIVE.set(None), LOG_SPAN.set(LogSpan(self.span.trace_id, self.span.span_id, self.span.sampled))
        try:
            await self._serve()
        except asyncio.CancelledError:
            self.report("client disconnected")
            raise
        except BaseException as error:
            self.status_code = self.status_code or (0 if self.disconnected else 500)
            self.report(f"{type(error).__name__}: {error}"[:200])
            raise
        finally:
            ACTIVE.reset(token)
            LOG_SPAN.reset(said)
        self.report("" if self.ended else "response incomplete")

    async def _serve(self) -> None:
        body = await self._read_body()
        problem: Problem | None = None
        with GUARD("judging a request"):
            problem = self._judge(body)
        if problem is not None:
            await self._refuse(problem)
            return
        ACTIVE.set(self.inbound)
        await self.owner.app(self._inner_scope(), self.receive, self.send)

    async def _read_body(self) -> bytes | None:
        """The whole body, kept for the app too; None if it is too large or never came in full."""
        parts: list[bytes] = []
        size = 0
        while size <= MAX_BODY:
            message = await self._receive()
            self.replay.append(message)
            if message["type"] != "http.request":
                self.disconnected = True
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body", False):
                return b"".join(parts)
        return None

    def _judge(self, body: bytes | None) -> Problem | None:
        """Decide what is captured and set `inbound`; the problem to answer with if the request asks for too much."""
        request = RequestBody(body)
        if self.owner.sampler.asks_for_model and isinstance(model := request.fields.get("model"), str):
            self._decide({"model": model})
            LOG_SPAN.set(LogSpan(self.span.trace_id, self.span.span_id, self.span.sampled))
        try:
            capture = self._requested_capture(request)
            step_spans = self._step_spans()
            if capture is not None:
                self.key = self.owner.gate.authorise(self.scope)
                check_capture(capture, self.owner.engines())
                request.check()
                self.owner.gate.admit(self.key)
        except REFUSALS as error:
            problem = problem_of(error)
            self.capture_status, self.refusal = problem.capture, problem.detail
            return problem
        self._admit(capture, request, step_spans)
        return None

    def _decide(self, facts: dict[str, str]) -> None:
        """Whether this request is traced; with what its body says once that is known."""
        known = {"path": self.route, **facts}
        if header := self.owner.settings.tenant_header:
            known["tenant"] = ",".join(header_lines(self.headers, header.lower().encode()))
        asked = None if self.parent is None else self.parent.sampled
        self.span = replace(self.span, sampled=self.owner.sampler.decide(self.span.trace_id, asked, known))

    def _step_spans(self) -> int:
        """How fine the step spans are: by the header, else by the setting."""
        lines = header_lines(self.headers, STEPS_HEADER)
        return parse_step_spans(", ".join(lines) if lines else self.owner.settings.step_spans)

    def _requested_capture(self, request: RequestBody) -> CaptureSpec | None:
        """The header wins over the field, the field over baggage; the winner decides alone, also for `off`."""
        lines = header_lines(self.headers, b"trace-capture")
        candidates = (
            ("header", ", ".join(lines) if lines else None),
            ("field", request.text()),
            ("baggage", self._baggage("trace-capture")),
        )
        self.source, text = next(((source, text) for source, text in candidates if text is not None), ("", ""))
        self.requested = text
        return parse_capture(text)

    def _admit(self, capture: CaptureSpec | None, request: RequestBody, step_spans: int) -> None:
        captured = capture is not None
        self.inbound = Inbound(
            trace_id=self.span.trace_id,
            parent_span_id=self.span.span_id,
            sampled=self.span.sampled,
            capture=capture,
            operation=ROUTES[self.route],
            messages=request.messages() if captured else (),
            step_spans=step_spans,
            conversation_id=self._conversation(request) if self.span.sampled else "",
            owner=self.key.name if self.key is not None else "",
            on_end=self._payer(capture) if capture is not None else None,
        )
        if captured:
            self.capture_status = "recording"
            self.refs = self.inbound.refs(min(request.generations(), MAX_REFS))

    def _conversation(self, request: RequestBody) -> str:
        """By the Responses API's field, else by baggage, with which an agent can name it once for all its calls."""
        return request.conversation() or self._baggage(CONVERSATION_ID) or ""

    def _baggage(self, name: str) -> str | None:
        return baggage_member(", ".join(header_lines(self.headers, b"baggage")), name)

    def _payer(self, capture: CaptureSpec) -> Callable[[int, int], None]:
        """Charges a generation of so many prompt and output tokens, once it has ended."""
        gate, key, engines = self.owner.gate, self.key, self.owner.engines

        def pay(prompt: int, output: int) -> None:
            gate.budgets.pay(key, max((captured_bytes(capture, each, prompt, output) for each in engines()), default=0))

        return pay

    async def _refuse(self, problem: Problem) -> None:
        await self.send({"type": "http.response.start", "status": problem.status, "headers": problem.headers})
        await self.send({"type": "http.response.body", "body": problem.body})

    def _inner_scope(self) -> MutableMapping[str, Any]:
        """The scope without our headers; a traced request's children belong under our span."""
        headers = [line for line in self.headers if line[0].lower() not in OURS]
        if self.span.sampled:
            # Without a valid parent its `tracestate` belongs to nothing.
            replaced = (b"traceparent",) if self.parent else (b"traceparent", b"tracestate")
            headers = [line for line in headers if line[0].lower() not in replaced]
            headers.append((b"traceparent", format_traceparent(self.span).encode()))
        return {**self.scope, "headers": headers}

    async def receive(self) -> Message:
        """What the app reads: the buffered messages first."""
        if self.replay:
            return self.replay.popleft()
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.ended:
            self.disconnected = True
        return message

    async def send(self, message: Message) -> None:
        """What the app writes: our headers go with the first message, the span after the last."""
        if message["type"] == "http.response.start":
            self.status_code = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._response_headers()]}
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        # Before the await: a server announces the disconnect that follows a complete response at once.
        self.ended = self.ended or last
        await self._send(message)
        if last:
            self.report()

    def _response_headers(self) -> list[tuple[bytes, bytes]]:
        # An error of the app's own before the first byte means that nothing is generated.
        recording = self.capture_status == "recording" and self.status_code < 400
        status = "off" if self.capture_status == "recording" and not recording else self.capture_status
        out = [
            (b"traceresponse", format_traceparent(self.span).encode()),
            (b"trace-capture-status", status.encode()),
        ]
        if recording:
            out.append((b"trace-capture-ref", ", ".join(self.refs).encode()))
        return out

    def report(self, error: str = "") -> None:
        """Send the SERVER span, the first time only."""
        if self.reported:
            return
        self.reported = True
        if self.owner.channel is None:
            return
        with GUARD("reporting a request"):
            self.owner.channel.send(self._request_span("client disconnected" if self.disconnected else error))

    def _request_span(self, error: str) -> RequestSpan:
        return RequestSpan(
            trace_id=self.span.trace_id,
            span_id=self.span.span_id,
            parent_span_id=self.parent.span_id if self.parent else None,
            start_ns=self.start_ns,
            end_ns=wall_clock_ns(),
            method=self.scope["method"],
            route=self.route,
            status_code=self.status_code,
            error=error,
            attributes=self._attributes(),
            sampled=self.span.sampled,
            operation=ROUTES[self.route],
        )

    def _attributes(self) -> dict[str, int | float | str | bool]:
        server, peer = self.scope.get("server") or ("", None), self.scope.get("client") or ("", None)
        client = self.owner.gate.client(self.scope).address
        found: dict[str, int | str | None] = {
            "http.request.method": self.scope["method"],
            "http.route": self.route,
            "http.response.status_code": self.status_code,
            "url.path": self.scope["path"],
            "server.address": server[0],
            "server.port": server[1],
            "client.address": client,
            "network.peer.address": peer[0] if peer[0] != client else None,
            "user_agent.original": ", ".join(header_lines(self.headers, b"user-agent"))[:256],
            "tensorspan.capture.status": self.capture_status,
            "tensorspan.capture.requested": self.requested[:512],
            "tensorspan.capture.source": self.source,
            "tensorspan.capture.policy": self.owner.settings.capture if self.requested else None,
            "tensorspan.capture.key": self.key.name if self.key is not None else None,
            "tensorspan.capture.refusal": self.refusal[:512],
        }
        return {name: value for name, value in found.items() if value}


def _process_defaults(
    settings: Settings, channel: Outlet | None, engines: Callable[[], Sequence[EngineInfo]] | None
) -> tuple[Outlet, Callable[[], Sequence[EngineInfo]]]:
    """This process's channel, and the facts that its workers have published beside the same socket."""
    from tracer import export

    own = export.process_channel(settings)
    return channel or own, engines or (lambda: export.hooked_engines(own.settings))


def _server_span(parent: SpanContext | None) -> SpanContext:
    """Its identity; whether it is sampled is decided later."""
    if parent is None:
        return SpanContext(new_trace_id(), new_span_id(), sampled=False)
    return SpanContext(parent.trace_id, new_span_id(), sampled=False, random=parent.random)
