"""A small agent with tools, through the official client with OpenTelemetry's own instrumentation, is one trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from opentelemetry import trace
from opentelemetry.baggage import set_baggage
from opentelemetry.context import attach, detach
from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor
from opentelemetry.propagate import inject
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.integration.receiver import Receiver, attributes, spans_of
from tests.integration.server import Server, await_true

pytestmark = pytest.mark.engine

CITIES = ("Paris", "Oslo")
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": list(CITIES)}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def instrumented() -> Iterator[InMemorySpanExporter]:
    """The client side as OpenTelemetry's packages set it up; spans end up here."""
    memory, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    OpenAIInstrumentor().instrument(tracer_provider=provider)
    yield memory
    OpenAIInstrumentor().uninstrument()


def weather(city: str) -> str:
    return f"It rains in {city}."


def run_agent(client: openai.OpenAI, tracer: trace.Tracer) -> list[str]:
    """Two turns that must call the tool, whose arguments the model writes, and one that must answer."""
    messages: list[Any] = [{"role": "user", "content": f"How is the weather in {' and '.join(CITIES)}?"}]
    asked = []
    for turn in range(3):
        choice: Any = {"type": "function", "function": {"name": "weather"}} if turn < 2 else "none"
        answer = client.chat.completions.create(
            model="demo", messages=messages, tools=[TOOL], tool_choice=choice, max_tokens=100, temperature=0
        )
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or ():
            assert call.type == "function"
            asked.append(json.loads(call.function.arguments)["city"])
            with tracer.start_as_current_span("execute_tool weather"):
                content = weather(asked[-1])
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return asked


def test_an_agent_with_tools_is_one_trace(
    server: Server, receiver: Receiver, instrumented: InMemorySpanExporter
) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(instrumented))
    token = attach(set_baggage("gen_ai.conversation.id", "talk-7"))
    try:
        tracer = provider.get_tracer("agent")
        # The client speaks through httpx2, for which OpenTelemetry has no package: its own hook carries the context on.
        hooks = {"request": [lambda request: inject(request.headers)]}
        transport = openai.DefaultHttpxClient(event_hooks=hooks)
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key="none", http_client=transport) as client,
            tracer.start_as_current_span("invoke_agent") as root,
        ):
            asked = run_agent(client, tracer)
    finally:
        detach(token)
    assert len(asked) == 2
    assert set(asked) <= set(CITIES)
    theirs = list(instrumented.get_finished_spans())
    trace_id = f"{root.get_span_context().trace_id:032x}"
    assert {f"{context_of(span).trace_id:032x}" for span in theirs} == {trace_id}

    def ours() -> list[Span]:
        return [span for span in spans_of(receiver.requests) if span.trace_id.hex() == trace_id]

    await_true(lambda: sum(span.kind == Span.SPAN_KIND_SERVER for span in ours()) == 3)
    check_tree(ours(), theirs, f"{root.get_span_context().span_id:016x}")


def context_of(span: ReadableSpan) -> trace.SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def check_tree(ours: list[Span], theirs: list[ReadableSpan], root: str) -> None:
    """Agent, client call, SERVER span, generation, steps: each under the one before; all ends meet."""
    parents = {f"{context_of(s).span_id:016x}": f"{s.parent.span_id:016x}" if s.parent else "" for s in theirs}
    parents |= {span.span_id.hex(): span.parent_span_id.hex() for span in ours}
    assert len(parents) == len(ours) + len(theirs), "span IDs are unique over both sides"
    for span in ours:
        place, seen = span.span_id.hex(), set()
        while place != root:
            assert place not in seen
            seen.add(place)
            place = parents[place]
    generations = [span for span in ours if span.name == "chat demo" and span.kind == Span.SPAN_KIND_INTERNAL]
    assert len(generations) == 3
    servers = {span.span_id.hex() for span in ours if span.kind == Span.SPAN_KIND_SERVER}
    assert {span.parent_span_id.hex() for span in generations} == servers
    facts = [attributes(span) for span in ours]
    assert sum("gen_ai.usage.output_tokens" in fact for fact in facts) == 3, "one span of a request carries usage"
    assert {attributes(span)["gen_ai.conversation.id"] for span in generations} == {"talk-7"}
    steps = [fact for fact in facts if "tensorspan.step.phase" in fact]
    assert sum("tensorspan.step.index" in fact for fact in steps) == sum(
        attributes(span)["gen_ai.usage.output_tokens"] for span in generations
    )
    assert not any(name.startswith("gen_ai.") for fact in steps for name in fact)
    assert all(attributes(span)["tensorspan.queue.duration"] >= 0 for span in generations)
