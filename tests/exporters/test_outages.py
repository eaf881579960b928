"""Collectors that are away, slow, refuse, flap or return: what waits, what is counted, and that nobody else waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan

from exporters import otlp_sender
from exporters.otlp_sender import AWAY as CAUSE_AWAY
from exporters.otlp_sender import BATCH, FULL, SHUTDOWN, Sender
from exporters.otlp_sender import REFUSED as CAUSE_REFUSED
from exporters.span_transport import open_transport
from tests.exporters.collectors import free_port
from tests.exporters.faulty import AWAY, LATER, REFUSED, TOO_LARGE, Answer, FaultyGrpc, FaultyHttp, partly
from tests.exporters.test_otlp_sender import bare
from tracer.config import Settings

Collector = FaultyGrpc | FaultyHttp
Start = Callable[..., Collector]
BOTH = pytest.mark.parametrize("kind", [FaultyGrpc, FaultyHttp], ids=["grpc", "http"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """First and longest wait short, so that an outage of ten attempts fits into a test."""
    monkeypatch.setattr(otlp_sender, "FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(otlp_sender, "LONGEST_WAIT_SECONDS", 0.05)


@pytest.fixture
def collect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`collect(kind, *script)`: a running collector that `OTEL_*` points to."""
    running: list[Collector] = []

    def start(kind: type[Collector], *script: Answer, port: int = 0) -> Collector:
        collector = kind(*script, port=port)
        running.append(collector)
        configure(monkeypatch, kind, collector.port)
        return collector

    yield start
    for collector in running:
        collector.stop()


def configure(monkeypatch: pytest.MonkeyPatch, kind: type[Collector], port: int) -> None:
    path = "/v1/traces" if kind is FaultyHttp else ""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://127.0.0.1:{port}{path}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", kind.protocol)


class Losses:
    """What `on_loss` was told."""

    def __init__(self) -> None:
        self.causes: dict[str, int] = {}

    def __call__(self, count: int, cause: str, spans: Sequence[ReadableSpan]) -> None:
        self.causes[cause] = self.causes.get(cause, 0) + count


def sender_of(losses: Losses, **options: Any) -> Sender:
    return Sender(open_transport(Settings()), on_loss=losses, **options)


def settled(sender: Sender) -> None:
    """Return when nothing waits any more; a flush returns early when an attempt fails."""
    deadline = time.monotonic() + 20
    while sender.waiting and time.monotonic() < deadline:
        sender.flush(0.5)
    assert not sender.waiting


@BOTH
def test_spans_wait_for_a_collector_that_says_later(kind: type[Collector], collect: Start) -> None:
    collector = collect(kind, *[AWAY] * 10)
    losses = Losses()
    sender = sender_of(losses)
    assert all(sender.offer(bare(f"decode {i}", i + 1)) for i in range(2 * BATCH + 7))
    settled(sender)
    assert collector.names() == [f"decode {i}" for i in range(2 * BATCH + 7)], "whole, once and in order"
    assert collector.asked == 13
    assert sender.close(5)
    assert (sender.dropped, losses.causes) == (0, {})


@BOTH
def test_spans_wait_for_a_collector_that_is_not_there(
    kind: type[Collector], collect: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    configure(monkeypatch, kind, port)
    losses = Losses()
    sender = sender_of(losses)
    assert sender.offer(bare("early"))
    began = time.monotonic()
    assert not sender.flush(10)
    assert time.monotonic() - began < 5, "a flush ends with the first attempt that fails"
    collector = collect(kind, port=port)
    settled(sender)
    assert collector.names() == ["early"]
    collector.stop()
    assert sender.offer(bare("between"))
    assert not sender.flush(10)
    again = collect(kind, port=port)
    settled(sender)
    assert again.names() == ["between"]
    assert sender.close(5)
    assert losses.causes == {}


@BOTH
@pytest.mark.parametrize("answer", [REFUSED, TOO_LARGE], ids=["401", "too large"])
def test_what_is_refused_for_good_is_counted_and_not_repeated(
    kind: type[Collector], answer: Answer, collect: Start, caplog: pytest.LogCaptureFixture
) -> None:
    collector = collect(kind, answer)
    losses = Losses()
    sender = sender_of(losses)
    sender.offer(bare("refused"))
    assert not sender.flush(10)
    sender.offer(bare("taken"))
    assert sender.flush(10)
    assert sender.close(5)
    assert (collector.names(), collector.asked) == (["taken"], 2)
    assert losses.causes == {CAUSE_REFUSED: 1}
    assert "spans are being lost (collector refused)" in caplog.text


@BOTH
def test_partial_success_is_counted(kind: type[Collector], collect: Start) -> None:
    collector = collect(kind, partly(3))
    losses = Losses()
    sender = sender_of(losses)
    assert all(sender.offer(bare("decode", i + 1)) for i in range(10))
    assert not sender.flush(10), "three of them did not arrive"
    assert sender.close(5)
    assert (collector.asked, sender.dropped, losses.causes) == (1, 3, {CAUSE_REFUSED: 3})


@BOTH
def test_the_collector_says_when_to_come_back(kind: type[Collector], collect: Start) -> None:
    collector = collect(kind, LATER)
    sender = sender_of(Losses())
    began = time.monotonic()
    sender.offer(bare("decode"))
    while not collector.names():
        threading.Event().wait(0.02)
        assert time.monotonic() - began < 20
    assert time.monotonic() - began >= 1.0
    assert sender.close(5)


@BOTH
def test_a_slow_collector_delays_nobody(kind: type[Collector], collect: Start) -> None:
    collector = collect(kind)
    collector.gate.clear()
    losses = Losses()
    sender = sender_of(losses, capacity=2000)
    longest = 0.0
    for i in range(4000):
        began = time.perf_counter()
        sender.offer(bare("decode", i + 1))
        longest = max(longest, time.perf_counter() - began)
    assert longest < 0.25, "an offer never waits; what it met is another process on this core"
    began = time.monotonic()
    assert not sender.close(0.5)
    assert time.monotonic() - began < 1.5
    assert set(losses.causes) == {FULL, SHUTDOWN}
    assert sender.dropped == sum(losses.causes.values()) == 4000


@BOTH
def test_spans_are_given_up_after_their_time(
    kind: type[Collector], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    configure(monkeypatch, kind, free_port())
    losses = Losses()
    sender = sender_of(losses, hold_s=0.3)
    assert all(sender.offer(bare("decode", i + 1)) for i in range(BATCH + 100))
    deadline = time.monotonic() + 20
    while sender.waiting and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert losses.causes == {CAUSE_AWAY: BATCH + 100}
    assert sender.close(1)
    assert "spans are being lost (collector away)" in caplog.text


@BOTH
def test_a_flapping_collector_gets_everything_at_shutdown(kind: type[Collector], collect: Start) -> None:
    collector = collect(kind, AWAY, LATER, AWAY)
    losses = Losses()
    sender = sender_of(losses)
    sender.offer(bare("last words"))
    assert sender.close(10)
    assert collector.names() == ["last words"]
    assert losses.causes == {}


def test_heavy_spans_make_smaller_messages_and_a_full_queue(collect: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = collect(FaultyGrpc)
    monkeypatch.setattr(otlp_sender, "BATCH_BYTES", 4_000)
    monkeypatch.setattr(otlp_sender, "CAPACITY_BYTES", 20_000)
    losses = Losses()
    collector.gate.clear()
    sender = sender_of(losses)
    accepted = sum(sender.offer(bare("decode", i + 1)) for i in range(100))
    assert accepted < 100
    assert losses.causes == {FULL: 100 - accepted}
    assert sender.offer(bare("trunk"), reserve=True)
    huge = ReadableSpan("huge", attributes={"text": "x" * (otlp_sender.RESERVE_BYTES + 1)})
    assert not sender.offer(huge, reserve=True), "a span with more text than there is room for"
    losses.causes[FULL] -= 1
    collector.gate.set()
    settled(sender)
    assert len(collector.names()) == accepted + 1
    assert max(request.ByteSize() for request in collector.taken) <= 4_000
    assert sender.close(5)
