"""The middleware against a small ASGI app: what the app sees, what the client gets, which span is sent."""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from tracer import middleware
from tracer._guard import Guard
from tracer.config import Settings
from tracer.context import ACTIVE, Inbound, in_http_request
from tracer.errors import SettingsError
from tracer.log_context import LOG_SPAN, LogSpan
from tracer.middleware import ROUTES, TracingMiddleware
from tracer.records import AttentionSpec, CaptureSpec, EngineInfo, LayerInfo, LogitsSpec, Record, RequestSpan

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
CHAT = "/v1/chat/completions"
ENGINE = EngineInfo(
    "m", "0.32.0", "V1", "cpu", "bfloat16", 1000, 2048, tuple(LayerInfo(i, f"l{i}", 9, 3, 64, 0.1) for i in range(4))
)
LOGITS = {"Trace-Capture": "logits"}


@dataclass
class Outlet:
    """A channel that remembers."""

    records: list[Record] = field(default_factory=list)

    def send(self, record: Record) -> bool:
        self.records.append(record)
        return True


@dataclass
class Server:
    """The middleware around an app that writes down what it sees."""

    settings: Settings = field(default_factory=lambda: Settings(enabled=True))
    engines: Sequence[EngineInfo] = (ENGINE,)
    client: tuple[str, int] | None = ("127.0.0.1", 5000)
    outlet: Outlet = field(default_factory=Outlet)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    active: list[Inbound | None] = field(default_factory=list)
    in_http: list[bool] = field(default_factory=list)

    async def generate(self, request: Request) -> JSONResponse:
        self.bodies.append(await request.body())
        self.headers.append(dict(request.headers))
        self.active.append(ACTIVE.get())
        self.in_http.append(in_http_request.get())
        return JSONResponse({"ok": True}, int(request.headers.get("answer", 200)))

    def app(self, endpoint: Callable[[Request], Awaitable[Any]] | None = None) -> Starlette:
        routes = [Route(path, endpoint or self.generate, methods=["POST"]) for path in (*ROUTES, "/tokenize")]
        arguments = (self.settings, self.outlet, lambda: self.engines)
        return Starlette(routes=routes, middleware=[Middleware(TracingMiddleware, *arguments)])

    def posts(self, *headers: dict[str, str]) -> list[httpx.Response]:
        """Several requests to the same server process, one after the other."""

        async def call() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app(), client=self.client)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://server:8000") as client:
                return [await client.post(CHAT, headers=each, json={"messages": []}) for each in headers]

        return asyncio.run(call())

    def post(self, path: str = CHAT, headers: dict[str, str] | None = None, **content: Any) -> httpx.Response:
        if not content:
            content["json"] = {"messages": [{"role": "user", "content": "hi"}]}

        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app(), client=self.client)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://server:8000") as client:
                return await client.post(path, headers=headers, **content)

        return asyncio.run(call())

    @property
    def inbound(self) -> Inbound:
        found = self.active[-1]
        assert found is not None
        return found

    @property
    def span(self) -> RequestSpan:
        (record,) = self.outlet.records
        assert isinstance(record, RequestSpan)
        return record


def policy(name: str, **more: Any) -> Server:
    return Server(Settings(enabled=True, capture=name, **more))


# Sampling and the SERVER span


def test_a_traced_request_is_nested_between_caller_and_engine() -> None:
    server = Server()
    answer = server.post(headers=PARENT | {"tracestate": "a=b", "user-agent": "probe"})
    span = server.span
    assert (span.trace_id, span.parent_span_id, span.error) == (TRACE, SPAN, "")
    assert (span.method, span.route, span.status_code) == ("POST", CHAT, 200)
    assert 0 < span.start_ns <= span.end_ns
    assert server.headers[0]["traceparent"] == f"00-{TRACE}-{span.span_id}-01"
    assert server.headers[0]["tracestate"] == "a=b"
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{span.span_id}-01"
    assert answer.headers["trace-capture-status"] == "off"
    assert "trace-capture-ref" not in answer.headers
    inbound = server.inbound
    assert (inbound.trace_id, inbound.parent_span_id, inbound.capture) == (TRACE, span.span_id, None)
    assert (inbound.operation, inbound.messages, inbound.source, inbound.sampled) == ("chat", (), "http", True)
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "url.path": CHAT,
        "server.address": "server",
        "server.port": 8000,
        "client.address": "127.0.0.1",
        "user_agent.original": "probe",
        "tensorspan.capture.status": "off",
    }


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{'0' * 32}-{SPAN}-01"])
def test_without_a_valid_parent_a_new_trace_starts(traceparent: str) -> None:
    server = Server()
    server.post(headers={"traceparent": traceparent, "tracestate": "a=b"})
    span = server.span
    assert span.parent_span_id is None
    assert span.trace_id != TRACE
    assert server.headers[0]["traceparent"] == f"00-{span.trace_id}-{span.span_id}-01"
    assert "tracestate" not in server.headers[0]


@pytest.mark.parametrize(("headers", "trace"), [(UNSAMPLED, True), ({}, False)])
def test_an_unsampled_request_is_only_counted_and_left_alone(headers: dict[str, str], trace: bool) -> None:
    server = Server(Settings(enabled=True, trace=trace))
    answer = server.post(headers=headers)
    assert server.span.sampled is False
    assert (server.inbound.sampled, server.inbound.capture) == (False, None)
    assert server.in_http == [True]
    assert server.headers[0].get("traceparent") == headers.get("traceparent")
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", answer.headers["traceresponse"])


def test_log_lines_of_a_request_know_its_span() -> None:
    seen: list[LogSpan | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(LOG_SPAN.get())
        await ok(scope, receive, send)

    outlet = Outlet()
    asyncio.run(drive(traced(app, outlet), Wire(headers=[(b"traceparent", PARENT["traceparent"].encode())])))
    assert seen == [LogSpan(TRACE, only(outlet).span_id, sampled=True)]
    assert LOG_SPAN.get() is None


def test_two_parents_are_none() -> None:
    outlet, line = Outlet(), (b"traceparent", PARENT["traceparent"].encode())
    asyncio.run(drive(traced(ok, outlet), Wire(headers=[line, line])))
    assert only(outlet).parent_span_id is None


def test_an_unsampled_request_may_still_capture() -> None:
    server = Server()
    answer = server.post(headers=UNSAMPLED | LOGITS)
    assert server.span.sampled is False
    assert server.inbound.sampled is False
    assert server.inbound.capture == CaptureSpec(LogitsSpec())
    assert answer.headers["trace-capture-ref"] == f"{TRACE}/{server.inbound.generation_id(0)}"


def test_disabled_means_untouched() -> None:
    server = Server(Settings(capture="key"))
    answer = server.post(headers=PARENT | LOGITS)
    assert server.headers[0]["trace-capture"] == "logits"
    assert server.headers[0]["traceparent"] == PARENT["traceparent"]
    assert server.in_http == [False]
    assert "traceresponse" not in answer.headers


def test_other_routes_are_untouched_but_known_as_http() -> None:
    server = Server()
    answer = server.post("/tokenize", headers=PARENT | {"Trace-Capture": "nonsense!"})
    assert server.headers[0]["traceparent"] == PARENT["traceparent"]
    assert server.active == [None]
    assert server.in_http == [True]
    assert "traceresponse" not in answer.headers
    assert server.outlet.records == []


def test_contexts_do_not_leak_out_of_the_request() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert ACTIVE.get() is not None

    async def call() -> None:
        await drive(TracingMiddleware(app, Settings(enabled=True), Outlet(), lambda: ()), Wire())
        assert ACTIVE.get() is None
        assert in_http_request.get() is False

    asyncio.run(call())


# Asking for a capture


def test_header_field_baggage_in_that_order() -> None:
    body = {"prompt": "x", "vllm_xargs": {"trace_capture": "attention"}}
    baggage = {"baggage": "tenant=7, trace-capture = logits%3Btop%3D3%2C%20summary;note=1"}
    server = Server()
    server.post(headers=baggage | {"Trace-Capture": "summary"}, json=body)
    server.post(headers=baggage, json=body)
    server.post(headers=baggage, json={"prompt": "x"})
    server.post(headers=baggage | {"Trace-Capture": "summary=?0"}, json=body)
    server.post(json={"prompt": "x", "vllm_xargs": {"trace_capture": None, "tensorspan": "forged"}})
    captures = [inbound.capture for inbound in server.active if inbound is not None]
    assert captures == [
        CaptureSpec(summary=True),
        CaptureSpec(attention=AttentionSpec()),
        CaptureSpec(LogitsSpec(3), summary=True),
        None,
        None,
    ]
    sources = [getattr(record, "attributes", {}).get("tensorspan.capture.source") for record in server.outlet.records]
    assert sources == ["header", "field", "baggage", "header", None]


def test_a_field_spelled_with_escapes_counts_too() -> None:
    server = Server()
    server.post(content=rb'{"vllm_xargs": {"trace\u005fcapture": "logits"}}')
    assert server.inbound.capture == CaptureSpec(LogitsSpec())


def test_the_token_route_keeps_the_field_in_its_sampling_parameters() -> None:
    server = Server()
    params = {"n": 3, "extra_args": {"trace_capture": "logits"}}
    answer = server.post("/inference/v1/generate", json={"token_ids": [1, 2], "sampling_params": params})
    assert server.inbound.operation == "text_completion"
    assert len(answer.headers["trace-capture-ref"].split(", ")) == 3


def test_oversized_baggage_is_ignored() -> None:
    server = Server()
    assert server.post(headers={"baggage": "trace-capture=logits," + "x=" + "y" * 9000}).status_code == 200
    assert server.inbound.capture is None


def test_repeated_header_lines_are_one_request() -> None:
    wire = Wire(headers=[(b"trace-capture", b"logits"), (b"trace-capture", b"summary"), (b"trace-capture-key", b"x")])
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([ACTIVE.get(), scope["headers"]])

    asyncio.run(drive(TracingMiddleware(app, Settings(enabled=True), Outlet(), lambda: [ENGINE]), wire))
    assert seen[0].capture == CaptureSpec(LogitsSpec(), summary=True)
    assert {name for name, _ in seen[1]} == {b"traceparent"}
    assert (b"trace-capture", b"logits") in wire.headers, "the server's own scope is not changed"


@pytest.mark.parametrize(
    ("path", "body", "count", "messages"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hi"}], "n": 3}, 3, (("user", "hi"),)),
        (
            CHAT,
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, {"text": "b"}]},
                    {"role": "assistant", "content": None, "tool_calls": [{}]},
                    {"role": "tool", "content": "42"},
                ]
            },
            1,
            (("system", "be brief"), ("user", "a\nb"), ("tool", "42")),
        ),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "a"}]] * 4}, 4, ()),
        (
            "/v1/chat/completions/batch",
            {"messages": [[{"role": "user", "content": "a"}]]},
            1,
            (("user", "a"),),
        ),
        ("/v1/completions", {"prompt": "once"}, 1, (("user", "once"),)),
        ("/v1/completions", {"prompt": ["once"], "n": None}, 1, (("user", "once"),)),
        ("/v1/completions", {"prompt": ["once", "upon"], "n": 2}, 4, ()),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 1, ()),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, 2, ()),
        (
            "/v1/messages",
            {
                "system": [{"type": "text", "text": "sys"}],
                "messages": [
                    {"role": "user", "content": "hello"},
                    {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "7"}]}]},
                ],
            },
            1,
            (("system", "sys"), ("user", "hello"), ("user", "7")),
        ),
        ("/v1/responses", {"instructions": "sys", "input": "hello"}, 1, (("system", "sys"), ("user", "hello"))),
        (
            "/v1/responses",
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
                    {"type": "function_call_output", "output": "7"},
                    "?",
                ]
            },
            1,
            (("user", "q"), ("tool", "7")),
        ),
    ],
)
def test_generations_and_messages(path: str, body: Any, count: int, messages: tuple[Any, ...]) -> None:
    server = Server()
    answer = server.post(path, LOGITS, json=body)
    assert answer.headers["trace-capture-status"] == "recording"
    assert answer.headers["trace-capture-ref"].split(", ") == list(server.inbound.refs(count))
    assert server.inbound.messages == messages


def test_messages_are_not_read_without_a_capture() -> None:
    server = Server()
    server.post(headers=PARENT)
    assert server.inbound.messages == ()


def test_a_huge_n_does_not_make_a_huge_header() -> None:
    answer = Server().post(headers=LOGITS, json={"prompt": "x", "n": 10**12})
    assert len(answer.headers["trace-capture-ref"].split(", ")) == middleware.MAX_REFS


def test_a_refusal_by_the_app_records_nothing() -> None:
    answer = Server().post(headers=LOGITS | {"answer": "404"})
    assert answer.headers["trace-capture-status"] == "off"
    assert "trace-capture-ref" not in answer.headers


# Refusals


MEMBERS = "logits, attention, qk, summary, prompt_logits, hidden_states, router"


@pytest.mark.parametrize(
    ("headers", "body", "member", "allowed"),
    [
        ({"Trace-Capture": "logit"}, {}, "logit", MEMBERS),
        ({"Trace-Capture": "router=1"}, {}, "router", "the bare word, an inner list of layers, or ?0 (off)"),
        ({"Trace-Capture": "attention=(9)"}, {}, "attention", "this model has layers 0-3"),
        ({"baggage": "trace-capture=%22"}, {}, "", f"the members {MEMBERS}, separated by commas"),
        ({}, {"vllm_xargs": {"trace_capture": ["logits"]}}, "trace_capture", "text"),
        (LOGITS, {"use_beam_search": True}, "use_beam_search", "false"),
        (LOGITS, {"prompt_embeds": "AAAA"}, "prompt_embeds", "text or token IDs"),
    ],
)
def test_malformed_or_impossible_is_400_before_generation(
    headers: dict[str, str], body: Any, member: str, allowed: str
) -> None:
    server = Server()
    answer = server.post(headers=headers | PARENT, json=body)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail", "member", "allowed", "example"}
    assert (problem["status"], problem["member"], problem["allowed"]) == (400, member, allowed)
    assert allowed in problem["detail"]
    assert answer.headers["trace-capture-status"] == "off"
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")
    assert server.bodies == []
    assert server.span.status_code == 400


def test_no_worker_is_501() -> None:
    server = Server(engines=())
    answer = server.post(headers=LOGITS)
    assert answer.status_code == 501
    assert "doctor" in answer.json()["detail"]
    assert answer.headers["trace-capture-status"] == "unavailable"
    assert server.post().status_code == 200, "a request without a capture is served"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_loopback_may_capture(host: str) -> None:
    assert Server(client=(host, 1)).post(headers=LOGITS).headers["trace-capture-status"] == "recording"


@pytest.mark.parametrize("host", ["10.0.0.5", "::2", "::ffff:10.0.0.5", "0.0.0.0", "testclient", "localhost.evil", ""])
def test_others_may_not(host: str) -> None:
    server = Server(client=(host, 1))
    answer = server.post(headers=LOGITS)
    assert answer.status_code == 403
    assert "TENSORSPAN_CAPTURE=loopback" in answer.json()["detail"]
    assert answer.headers["trace-capture-status"] == "denied"
    assert server.span.attributes["tensorspan.capture.status"] == "denied"
    assert server.bodies == []


@pytest.mark.parametrize(
    "name", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Via"]
)
def test_forwarded_requests_are_not_local(name: str) -> None:
    answer = Server().post(headers=LOGITS | {name: "127.0.0.1"})
    assert answer.status_code == 403
    assert name.lower() in answer.json()["detail"]
    assert Server().post(headers={name: "127.0.0.1"}).status_code == 200


def test_a_unix_socket_is_local_and_a_lost_peer_is_not() -> None:
    for server_address, expected in ((("/run/vllm.sock", None), 200), (("10.0.0.1", 8000), 403)):
        wire = Wire(headers=[(b"trace-capture", b"logits")], scope={"client": None, "server": server_address})
        asyncio.run(drive(TracingMiddleware(ok, Settings(enabled=True), Outlet(), lambda: [ENGINE]), wire))
        assert wire.sent[0]["status"] == expected


def test_the_key() -> None:
    server = policy("key", capture_key="geheim-ü")
    server.client = ("10.0.0.5", 1)
    assert server.post(headers=LOGITS).status_code == 403
    assert server.post(headers=LOGITS | {"Trace-Capture-Key": "wrong"}).status_code == 403
    server.bodies.clear()
    answer = server.post(headers=[("Trace-Capture", "logits"), ("Trace-Capture-Key", "geheim-ü".encode())])  # type: ignore[arg-type]
    assert answer.headers["trace-capture-status"] == "recording"
    assert not {"trace-capture", "trace-capture-key"} & set(server.headers[-1])
    assert "geheim" not in repr(server.outlet.records)


def test_named_keys_are_written_down_and_limited(tmp_path: Path) -> None:
    """The audit: who asked for what, and whether it was granted, by the key's name and never the key."""
    file = tmp_path / "keys.toml"
    file.touch(mode=0o600)
    file.write_text('[alice]\nkey = "geheim"\ncaptures_per_minute = 1\n[bob]\nkey = "offen"\nmay = ["read"]')
    server = policy("key", keys_file=str(file))
    server.client = ("10.0.0.5", 1)
    alice, bob = {"Trace-Capture-Key": "geheim"}, {"Trace-Capture-Key": "offen"}
    first, second, reader, uncaptured = server.posts(LOGITS | alice, LOGITS | alice, LOGITS | bob, alice)
    assert first.headers["trace-capture-status"] == "recording"
    assert (second.status_code, second.headers["retry-after"]) == (429, "60")
    assert second.headers["trace-capture-status"] == "denied"
    assert second.json()["detail"].startswith("nothing is left of captures_per_minute of the key alice")
    assert (reader.status_code, uncaptured.status_code) == (403, 200), "bob may only read; no capture, no limit"
    granted, refused, *_ = (record.attributes for record in server.outlet.records if isinstance(record, RequestSpan))
    assert (granted["tensorspan.capture.key"], granted["tensorspan.capture.policy"]) == ("alice", "key")
    assert granted["client.address"] == "10.0.0.5"
    assert refused["tensorspan.capture.refusal"] == second.json()["detail"]
    assert server.active[0] is not None
    assert server.active[0].owner == "alice"
    assert not {"trace-capture", "trace-capture-key"} & set(server.headers[-1])
    assert "geheim" not in repr(server.outlet.records)


def test_an_ended_capture_is_paid_for() -> None:
    server = policy("all", capture_mb_per_hour=0.001)
    first, second = server.posts(LOGITS, LOGITS)
    assert [answer.status_code for answer in (first, second)] == [200, 200], "it is paid when it has ended"

    async def generate(request: Request) -> JSONResponse:
        inbound = ACTIVE.get()
        assert inbound is not None
        assert inbound.on_end is not None
        inbound.on_end(5, 7)
        return JSONResponse({})

    server.generate = generate  # type: ignore[method-assign]
    first, second = server.posts(LOGITS, LOGITS)
    assert (first.status_code, second.status_code) == (200, 429)
    assert "TENSORSPAN_CAPTURE_MB_PER_HOUR" in second.json()["detail"]


@pytest.mark.parametrize("name", ["Trace_Capture", "trace_capture_key", "X-Trace-Capture", "Trace-Capture-Keys"])
def test_names_that_only_look_like_ours_ask_for_nothing(name: str) -> None:
    server = Server()
    assert server.post(headers={name: "logits"}).headers["trace-capture-status"] == "off"


def test_two_keys_are_none() -> None:
    server = policy("key", capture_key="k")
    given = [("Trace-Capture", "logits"), ("Trace-Capture-Key", "wrong"), ("Trace-Capture-Key", "k")]
    assert server.post(headers=given).status_code == 403  # type: ignore[arg-type]


def test_a_trusted_proxy_says_who_the_client_is() -> None:
    server = policy("loopback", trusted_proxies="10.0.0.0/8")
    server.client = ("10.0.0.5", 1)
    local, far = server.posts(*(LOGITS | {"X-Forwarded-For": f"127.0.0.1{more}"} for more in ("", ", 203.0.113.9")))
    assert (local.headers["trace-capture-status"], far.status_code) == ("recording", 403)
    granted, refused = (record.attributes for record in server.outlet.records if isinstance(record, RequestSpan))
    assert (granted["client.address"], granted["network.peer.address"]) == ("127.0.0.1", "10.0.0.5")
    assert (refused["client.address"], refused["network.peer.address"]) == ("203.0.113.9", "10.0.0.5")


def test_captures_are_read_through_the_same_server(tmp_path: Path) -> None:
    async def get(settings: Settings, host: str) -> httpx.Response:
        transport = httpx.ASGITransport(Server(settings).app(), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.get("/tensorspan/captures")

    here = Settings(enabled=True, store=str(tmp_path))
    assert asyncio.run(get(here, "localhost")).json() == {"captures": []}
    assert asyncio.run(get(here, "evil.example")).status_code == 401
    assert asyncio.run(get(replace(here, view=False), "localhost")).status_code == 404


@pytest.mark.parametrize(("text", "every"), [("all", 1), ("every:16", 16), ("summary", 0)])
def test_how_fine_the_step_spans_are(text: str, every: int) -> None:
    server = Server()
    assert server.post(headers={"Trace-Steps": text}).status_code == 200
    assert server.inbound.step_spans == every
    assert "trace-steps" not in server.headers[-1]
    by_setting = Server(Settings(enabled=True, step_spans=text))
    by_setting.post()
    assert by_setting.inbound.step_spans == every
    by_setting.post(headers={"Trace-Steps": "every:3"})
    assert by_setting.inbound.step_spans == 3


def test_steps_that_cannot_be_understood() -> None:
    answer = Server().post(headers=[("Trace-Steps", "every:2"), ("Trace-Steps", "all")])  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["member"]) == (400, "Trace-Steps")
    assert "example: every:16" in answer.json()["detail"]


def test_sampling_rules_know_path_tenant_and_model() -> None:
    rules = "tenant=quiet 0; model=llama* 0; path=/v1/completions 0"
    settings = Settings(enabled=True, sampling=rules, tenant_header="X-Tenant")
    for headers, body, path, sampled in (
        ({}, {"model": "demo"}, CHAT, True),
        ({"X-Tenant": "quiet"}, {"model": "demo"}, CHAT, False),
        ({"X-Tenant": "loud"}, {"model": "llama-3"}, CHAT, False),
        ({}, {"model": 7}, CHAT, True),
        ({}, {"model": "demo"}, "/v1/completions", False),
        ({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}, {"model": "llama-3"}, CHAT, True),
    ):
        server = Server(settings)
        answer = server.post(path, headers, json=body)
        assert answer.headers["traceresponse"].endswith("-01" if sampled else "-00"), (headers, body, path)
        assert server.inbound.sampled is sampled


def test_the_conversation_comes_from_the_body_or_from_baggage() -> None:
    server = Server()
    server.post("/v1/responses", json={"conversation": {"id": "conv_1"}})
    server.post("/v1/responses", json={"conversation": "conv_2"})
    server.post(headers={"baggage": "a=b,gen_ai.conversation.id=talk%207"})
    server.post(headers={"baggage": ",".join(f"k{n}=v" for n in range(5000)) + ",gen_ai.conversation.id=x"})
    assert [inbound.conversation_id for inbound in server.active if inbound] == ["conv_1", "conv_2", "talk 7", ""]


def test_a_key_policy_without_a_key_does_not_start() -> None:
    with pytest.raises(SettingsError, match="TENSORSPAN_CAPTURE_KEY"):
        TracingMiddleware(ok, Settings(enabled=True, capture="key"), Outlet(), lambda: ())


def test_off_and_all() -> None:
    assert "TENSORSPAN_CAPTURE=off" in policy("off").post(headers=LOGITS).json()["detail"]
    server = policy("all")
    server.client = ("10.0.0.5", 1)
    assert server.post(headers=LOGITS).headers["trace-capture-status"] == "recording"


@pytest.mark.parametrize(
    "body", [b"", b"not json", b"[1]", b'{"a":' * 100_000, b'"trace_capture"', b"\xff", b"1" * 5000]
)
def test_odd_bodies_are_vllms_to_refuse(body: bytes) -> None:
    server = policy("off")
    assert server.post(content=body).status_code == 200
    server = Server()
    assert server.post(headers=LOGITS, content=b"trace_capture" + body).status_code == 200
    assert server.bodies == [b"trace_capture" + body]


# Bodies and streams, by hand


@dataclass
class Wire:
    """A hand-driven connection: what the server gives to the app, and what it got."""

    body: Sequence[bytes] = (b"{}",)
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    scope: dict[str, Any] = field(default_factory=dict)
    sent: list[dict[str, Any]] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    taken: int = 0

    async def receive(self) -> Any:
        if self.taken < len(self.body):
            self.taken += 1
            return {
                "type": "http.request",
                "body": self.body[self.taken - 1],
                "more_body": self.taken < len(self.body),
            }
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


async def drive(app: TracingMiddleware, wire: Wire) -> None:
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "headers": wire.headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        **wire.scope,
    }
    await app(scope, wire.receive, wire.send)


async def ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def traced(app: Any, outlet: Outlet) -> TracingMiddleware:
    return TracingMiddleware(app, Settings(enabled=True), outlet, lambda: [ENGINE])


def only(outlet: Outlet) -> RequestSpan:
    (record,) = outlet.records
    assert isinstance(record, RequestSpan)
    return record


@pytest.mark.parametrize("limit", [10, 1000])
def test_chunked_bodies_reach_the_app_unchanged(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(middleware, "MAX_BODY", limit)
    chunks = [b'{"prompt": "', b"", b"x" * 30, b'", "vllm_xargs": {"trace_capture"', b': "summary"}}']
    wire, seen = Wire(chunks), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            seen.append(message["body"])
            more = message["more_body"]
        assert (ACTIVE.get() or Inbound("")).capture == (CaptureSpec(summary=True) if limit == 1000 else None)
        await ok(scope, receive, send)

    asyncio.run(drive(traced(app, Outlet()), wire))
    assert seen == chunks
    assert wire.sent[-1]["body"] == b"ok"


def test_a_body_too_large_to_read_can_still_be_captured_by_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_BODY", 10)
    server = Server()
    answer = server.post(headers=LOGITS, json={"prompt": "x" * 100, "n": 2})
    assert len(answer.headers["trace-capture-ref"].split(", ")) == 1
    assert json.loads(server.bodies[0])["n"] == 2


def test_a_stream_passes_chunk_by_chunk_and_the_span_comes_after_its_last_byte() -> None:
    outlet, wire, spans = Outlet(), Wire(headers=[(b"trace-capture", b"logits")]), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for chunk in (b"data: 1\n\n", b"data: 2\n\n", b""):
            await send({"type": "http.response.body", "body": chunk, "more_body": chunk != b""})
            spans.append(len(outlet.records))
        wire.gone.set()
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"

    asyncio.run(drive(traced(app, outlet), wire))
    assert spans == [0, 0, 1]
    assert only(outlet).error == ""
    assert [message.get("body") for message in wire.sent] == [None, b"data: 1\n\n", b"data: 2\n\n", b""]
    headers = dict(wire.sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream"
    assert headers[b"trace-capture-status"] == b"recording"
    assert re.fullmatch(rb"[0-9a-f]{32}/[0-9a-f]{16}", headers[b"trace-capture-ref"])


def test_the_disconnect_that_follows_a_complete_response_is_not_an_error() -> None:
    """A server may announce it to a waiting task before the last `send` has returned."""
    outlet = Outlet()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        waiting = asyncio.create_task(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
        assert await waiting == {"type": "http.disconnect"}

    class Eager(Wire):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if message["type"] == "http.response.body":
                self.gone.set()
                await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))

    asyncio.run(drive(traced(app, outlet), Eager()))
    assert only(outlet).error == ""


def test_a_client_that_leaves_a_starlette_stream() -> None:
    outlet, wire = Outlet(), Wire()

    async def endpoint(request: Request) -> StreamingResponse:
        async def chunks() -> Any:
            yield b"first"
            wire.gone.set()
            await asyncio.Event().wait()

        return StreamingResponse(chunks())

    server = Server(outlet=outlet)
    app = server.app(endpoint)
    asyncio.run(drive(app, wire))  # type: ignore[arg-type]
    assert only(outlet).error == "client disconnected"
    assert only(outlet).status_code == 200


def test_a_client_that_leaves_before_its_body_is_complete() -> None:
    outlet, wire, seen = Outlet(), Wire(body=()), []
    wire.gone.set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())
        raise RuntimeError("ClientDisconnect")

    with pytest.raises(RuntimeError):
        asyncio.run(drive(traced(app, outlet), wire))
    assert seen == [{"type": "http.disconnect"}]
    assert only(outlet).error == "client disconnected"
    assert only(outlet).status_code == 0


def test_cancellation_is_a_disconnect() -> None:
    outlet = Outlet()

    async def call() -> None:
        running = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            running.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(drive(traced(app, outlet), Wire()))
        await running.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(call())
    assert only(outlet).error == "client disconnected"


@pytest.mark.parametrize("begun", [False, True])
def test_an_exception_is_recorded_and_raised_again(begun: bool) -> None:
    outlet = Outlet()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("engine died")

    with pytest.raises(ValueError, match="engine died"):
        asyncio.run(drive(traced(app, outlet), Wire()))
    assert only(outlet).error == "ValueError: engine died"
    assert only(outlet).status_code == (200 if begun else 500)


def test_an_exception_after_the_last_byte_changes_nothing() -> None:
    outlet = Outlet()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await ok(scope, receive, send)
        raise ValueError("background task")

    with pytest.raises(ValueError, match="background task"):
        asyncio.run(drive(traced(app, outlet), Wire()))
    assert only(outlet).error == ""


def test_a_response_without_an_end() -> None:
    outlet = Outlet()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    asyncio.run(drive(traced(app, outlet), Wire()))
    assert only(outlet).error == "response incomplete"


def test_root_path_is_not_part_of_the_route() -> None:
    outlet = Outlet()
    wire = Wire(scope={"path": "/serving" + CHAT, "root_path": "/serving"})
    asyncio.run(drive(traced(ok, outlet), wire))
    assert only(outlet).route == CHAT
    assert only(outlet).attributes["url.path"] == "/serving" + CHAT


@pytest.mark.parametrize(
    "scope", [{"type": "lifespan"}, {"method": "GET"}, {"type": "websocket", "path": "/v1/realtime"}]
)
def test_other_kinds_of_scope_pass(scope: dict[str, Any]) -> None:
    outlet, wire = Outlet(), Wire(scope=scope)
    asyncio.run(drive(traced(ok, outlet), wire))
    assert wire.sent[0] == {"type": "http.response.start", "status": 200, "headers": []}
    assert outlet.records == []


def test_our_own_mistake_does_not_fail_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Sequence[EngineInfo]:
        raise OSError("facts unreadable")

    monkeypatch.setattr(Guard, "strict", False)
    outlet, wire = Outlet(), Wire(headers=[(b"trace-capture", b"logits")])
    asyncio.run(drive(TracingMiddleware(ok, Settings(enabled=True), outlet, broken), wire))
    assert wire.sent[0]["status"] == 200
    assert dict(wire.sent[0]["headers"])[b"trace-capture-status"] == b"off"


def test_fifty_interleaved_requests_keep_their_own_ids() -> None:
    outlet, count = Outlet(), 50
    arrived: list[int] = []

    async def call() -> list[Wire]:
        everybody = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            number = int(json.loads((await receive())["body"])["prompt"])
            before = ACTIVE.get()
            assert before is not None
            arrived.append(number)
            if len(arrived) == count:
                everybody.set()
            await everybody.wait()
            ids = [asyncio.create_task(generation(before)) for _ in range(2)]
            name = ",".join([f"{before.trace_id}/{await task}" for task in ids])
            assert ACTIVE.get() is before
            assert before.trace_id == f"{number + 1:032x}"
            await send({"type": "http.response.start", "status": 200, "headers": [(b"number", b"%d" % number)]})
            await send({"type": "http.response.body", "body": name.encode()})

        async def generation(mine: Inbound) -> str:
            inbound = ACTIVE.get()
            assert inbound is mine
            return inbound.issue()[1]

        wires = [request(number) for number in range(count)]
        served = traced(app, outlet)
        await asyncio.gather(*(drive(served, wire) for wire in wires))
        return wires

    def request(number: int) -> Wire:
        parent = f"00-{number + 1:032x}-{number + 1:016x}-01".encode()
        body = b'{"prompt": "%d", "n": 2}' % number
        return Wire([body], [(b"traceparent", parent), (b"trace-capture", b"logits")])

    wires = asyncio.run(call())
    spans = {record.trace_id: record for record in outlet.records if isinstance(record, RequestSpan)}
    assert len(spans) == len(outlet.records) == count
    for number, wire in enumerate(wires):
        headers = dict(wire.sent[0]["headers"])
        span = spans[f"{number + 1:032x}"]
        assert headers[b"number"] == b"%d" % number
        assert headers[b"traceresponse"].decode() == f"00-{span.trace_id}-{span.span_id}-01"
        assert span.parent_span_id == f"{number + 1:016x}"
        assert headers[b"trace-capture-ref"].replace(b" ", b"") == wire.sent[1]["body"]


def test_compressed_request_bodies_are_passed_on_unread() -> None:
    server = Server()
    body = gzip.compress(b'{"vllm_xargs": {"trace_capture": "logits"}}')
    assert server.post(content=body, headers={"content-encoding": "gzip"}).status_code == 200
    assert server.bodies == [body]


def test_the_routes_are_those_of_vllm() -> None:
    """Every route here is declared in vLLM's source, if vLLM is installed."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return
    sources = "".join(path.read_text() for path in (Path(spec.origin).parent / "entrypoints").rglob("api_router.py"))
    assert [path for path in ROUTES if f'"{path}"' not in sources] == []
