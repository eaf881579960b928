"""Generations that nobody traces are told of once, at their end; the engine is an output processor that remembers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers.models import WordLevel

from tracer.config import Settings
from tracer.context import ACTIVE, EXTRA_ARGS_KEY, Inbound
from tracer.records import EngineInfo, GenerationEnd, GenerationStart, PlainGeneration, Record
from tracer.worker import compat, frontend
from tracer.worker.frontend import Frontend
from tracer.worker.reasoning import Thinking

ENGINE = EngineInfo("demo", "0.32.0", "V1", "cpu", "float32", 100, 256)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UNSAMPLED = Inbound(TRACE, PARENT, sampled=False, operation="chat")


class Processor:
    """Where vLLM keeps what it runs."""

    tokenizer = None

    def __init__(self) -> None:
        self.request_states: dict[str, object] = {}


class Run:
    """A frontend and what it sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Record] = []
        self.room = True
        self.processor = Processor()
        self.frontend = Frontend(Settings(trace=False))
        monkeypatch.setattr(self.frontend, "_channel", lambda: SimpleNamespace(send=self._send))
        monkeypatch.setattr(frontend, "engine_infos", lambda settings: (ENGINE,))

    def _send(self, record: Record) -> bool:
        if self.room:
            self.sent.append(record)
        return self.room

    def begin(self, name: str = "a", inbound: Inbound | None = UNSAMPLED, adapter: str | None = None) -> Any:
        params = SimpleNamespace(extra_args={EXTRA_ARGS_KEY: "forged"}, n=1, stop=[], max_tokens=9)
        lora = SimpleNamespace(lora_name=adapter) if adapter else None
        request = SimpleNamespace(
            request_id=name, sampling_params=params, prompt_token_ids=[1, 2, 3], prompt_embeds=None, lora_request=lora
        )
        token = ACTIVE.set(inbound)
        self.frontend.begin(self.processor, request, 0, served=True)
        ACTIVE.reset(token)
        self.processor.request_states[name] = request
        return request

    def output(self, *tokens: int, name: str = "a", reason: str | None = None) -> None:
        if reason is not None:
            del self.processor.request_states[name]
        item = SimpleNamespace(request_id=name, new_token_ids=list(tokens), prefill_stats=None, finish_reason=reason)
        self.frontend.outputs(self.processor, [item])

    @property
    def only(self) -> PlainGeneration:
        (record,) = self.sent
        assert isinstance(record, PlainGeneration)
        return record


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(monkeypatch)


def test_an_unsampled_generation_is_counted_at_its_end(running: Run) -> None:
    request = running.begin()
    assert EXTRA_ARGS_KEY not in request.sampling_params.extra_args
    running.output(7)
    running.output(8, 9)
    assert running.sent == []
    running.output(4, reason="length")
    found = running.only
    assert (found.model, found.operation, found.parent_span_id) == ("demo", "chat", PARENT)
    assert (found.status, found.prompt_tokens, found.output_tokens) == ("ok", 3, 4)
    assert found.start_ns <= (found.first_token_ns or 0) <= found.end_ns
    assert running.frontend.idle


def test_one_that_was_aborted_or_failed_says_so(running: Run) -> None:
    running.begin("a", None, adapter="poet")
    running.begin("b")
    del running.processor.request_states["a"]
    running.frontend.vanished(running.processor, "aborted")
    assert (running.only.status, running.only.model, running.only.parent_span_id) == ("aborted", "poet", None)
    running.frontend.vanished(running.processor, "error", "EngineDeadError: gone")
    last = running.sent[-1]
    assert isinstance(last, PlainGeneration)
    assert (last.status, last.error) == ("error", "EngineDeadError: gone")


def test_a_traced_one_is_not_counted_twice(running: Run) -> None:
    running.begin("a", Inbound(TRACE, PARENT))
    running.output(7, reason="stop")
    assert [type(record) for record in running.sent] == [GenerationStart, GenerationEnd]


def test_a_full_queue_delays_the_count(running: Run) -> None:
    running.begin()
    running.room = False
    running.output(7, reason="stop")
    assert running.sent == []
    running.room = True
    running.begin("b")
    running.output(8, name="b")
    assert running.only.output_tokens == 1


def test_nothing_is_counted_where_opentelemetry_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    off = Run(monkeypatch)
    off.begin()
    assert off.frontend.idle


def thinking_tokenizer() -> Any:
    """A tokenizer of three words."""
    words = {"word": 1, "<think>": 90, "</think>": 91}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(WordLevel(words, "word")))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([90, 1, 1, 1, 91, 1, 1], 3),
        ([1, 1, 91, 1], 2),  # The template has opened it.
        ([90, 1, 1], 2),
    ],
)
def test_tokens_of_thinking(output: list[int], expected: int) -> None:
    """By the real parser of vLLM."""
    engine = SimpleNamespace(tokenizer=thinking_tokenizer())
    assert Thinking().tokens(engine, "qwen3", output) == expected
    assert Thinking().tokens(engine, "", output) is None
    assert Thinking().tokens(SimpleNamespace(tokenizer=None), "qwen3", output) is None


def test_a_parser_that_does_not_count_is_not_believed() -> None:
    from vllm.reasoning import ReasoningParser, ReasoningParserManager

    names = ReasoningParserManager.list_registered()
    kinds = {name: ReasoningParserManager.get_reasoning_parser(name) for name in names}
    silent = [
        name for name, kind in kinds.items() if kind.count_reasoning_tokens is ReasoningParser.count_reasoning_tokens
    ]
    assert silent, "every parser counts: drop the rule"
    assert compat.reasoning_counter(silent[0], thinking_tokenizer()) is None
