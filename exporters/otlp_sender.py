"""From finished spans to a collector or a file: a bounded queue, one thread, and waits that always end.

The SDK's BatchSpanProcessor is not used: with a dead collector its `force_flush(2 s)` took 20 s and returned True, and
it drops the oldest spans without a count (opentelemetry-python #4555, #4568; SDK 1.45.2). Here spans wait for an absent
collector for HOLD_SECONDS, within CAPACITY spans and CAPACITY_BYTES; what is refused for good is dropped at once, and
whatever does not arrive is counted, with its cause.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from exporters.span_transport import RejectedError, UnavailableError
from tracer._guard import Guard

__all__ = ["AWAY", "BATCH", "CAPACITY", "CAPACITY_BYTES", "CAUSES", "FULL", "REFUSED", "SHUTDOWN", "Sender"]

LOG: Final = logging.getLogger("tensorspan.otel")
CAPACITY: Final = 32768
"""Waiting spans: sixteen generations of 2,000 steps, 55 MB of memory (1.7 KB each, measured)."""
CAPACITY_BYTES: Final = 64_000_000
"""Their weight; a step's span weighs 1 to 2 KB, so that CAPACITY is what counts unless spans carry messages."""
RESERVE: Final = 2048
"""Room beyond CAPACITY for generation and request spans: a tree without its trunk cannot be read."""
RESERVE_BYTES: Final = 16_000_000
"""The same in bytes."""
BATCH: Final = 512
"""Spans per message: 0.6 MB as a rule ..."""
BATCH_BYTES: Final = 2_000_000
"""... and this much at most: half of what a Go gRPC server accepts by default."""
DELAY_SECONDS: Final = 1.0
"""How long a span waits for others before a message goes out."""
HOLD_SECONDS: Final = 300.0
"""How long a span waits for a collector that is away."""
FIRST_WAIT_SECONDS: Final = 1.0
LONGEST_WAIT_SECONDS: Final = 30.0
"""Between attempts: from the first to the longest, doubling, a fifth more or less."""
CLOSING_WAIT_SECONDS: Final = 0.2
"""Between attempts while closing."""

FULL: Final = "queue full"
AWAY: Final = "collector away"
REFUSED: Final = "collector refused"
SHUTDOWN: Final = "shutdown"
CAUSES: Final = (FULL, AWAY, REFUSED, SHUTDOWN)


@dataclass(frozen=True, slots=True)
class _Waiting:
    span: ReadableSpan
    weight: int
    since: float
    """Monotonic time at which it was queued."""


class Sender:
    """Owns the queue and the thread that empties it. `open_exporter` is called on that thread at the first span.

    `on_loss(count, cause, spans)` is told of every span that will not arrive, under the queue's lock, on the thread
    that noticed: it must return at once. Where a collector refused some of a message, `spans` are all of it. Causes:
    FULL, AWAY, REFUSED, SHUTDOWN.
    """

    def __init__(
        self,
        open_exporter: Callable[[], SpanExporter],
        capacity: int = CAPACITY,
        hold_s: float = HOLD_SECONDS,
        on_loss: Callable[[int, str, Sequence[ReadableSpan]], None] | None = None,
    ) -> None:
        self._open = open_exporter
        self._capacity = capacity
        self._hold_s = hold_s
        self._on_loss = on_loss
        self._queue: deque[_Waiting] = deque()
        self._weight = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._exporter: SpanExporter | None = None
        self._guard = Guard()
        self._accepted = 0
        self._settled = 0
        """Accepted spans that were sent or given up."""
        self._attempts_failed = 0
        self._hurry = False
        self._close_by: float | None = None
        self._closed = False
        self._sending: list[_Waiting] = []
        self._warned: set[str] = set()
        self.dropped = 0
        """Spans that will never arrive."""

    @property
    def waiting(self) -> int:
        """Spans that were accepted and are neither sent nor given up."""
        return self._accepted - self._settled

    def offer(self, span: ReadableSpan, *, reserve: bool = False) -> bool:
        """Queue one span without waiting; False if there was no room. `reserve` gives access to RESERVE."""
        item = _Waiting(span, _weight(span, exact=reserve), time.monotonic())
        with self._changed:
            room, room_bytes = self._capacity, CAPACITY_BYTES
            if reserve:
                room, room_bytes = room + RESERVE, room_bytes + RESERVE_BYTES
            if len(self._queue) >= room or self._weight + item.weight > room_bytes:
                self._lose(1, FULL, "the collector is slow or gone", [span])
                return False
            if self._close_by is not None:
                self._lose(1, SHUTDOWN, "the exporter was already shut down", [span])
                return False
            self._queue.append(item)
            self._weight += item.weight
            self._accepted += 1
            if len(self._queue) in (1, BATCH):
                self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tensorspan-otlp", daemon=True)
                self._thread.start()
        return True

    def flush(self, timeout_s: float) -> bool:
        """Send everything accepted so far; False if that took longer than `timeout_s`, failed once, or lost some."""
        with self._changed:
            target, dropped, failed = self._accepted, self.dropped, self._attempts_failed
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._settled >= target or self._attempts_failed > failed, timeout_s)
            self._hurry = False
            return self._settled >= target and self.dropped == dropped

    def close(self, timeout_s: float) -> bool:
        """Send what waits, then end the thread; after `timeout_s` give up on the rest and return False."""
        with self._changed:
            self._close_by = time.monotonic() + timeout_s
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        with self._changed:
            unsent = self.waiting
            self._closed = True
            spans = [item.span for item in (*self._sending, *self._queue)]
            self._queue.clear()
            if unsent:
                self._lose(unsent, SHUTDOWN, "the collector did not take them in time", spans)
            if self.dropped:
                LOG.warning("tensorspan: %d spans were lost, %d of them unsent at shutdown", self.dropped, unsent)
            return not unsent

    def _run(self) -> None:
        while batch := self._next_batch():
            # What the guard swallows leaves these words.
            self._sending = batch
            lost, cause, problem = len(batch), REFUSED, "sending failed; the error is above"
            with self._guard("sending spans"):
                lost, cause, problem = self._deliver(batch)
            self._settle(batch, lost, cause, problem)
        if self._exporter is not None:
            self._exporter.shutdown()

    def _deliver(self, batch: list[_Waiting]) -> tuple[int, str, str]:
        """Send until the collector takes or refuses the batch, or time is over: (spans lost, cause, problem)."""
        spans = [item.span for item in batch]
        wait_s = FIRST_WAIT_SECONDS
        while True:
            try:
                return self._attempt(spans)
            except UnavailableError as error:
                if not self._wait_again(batch[0].since, error.wait_s or wait_s * random.uniform(0.8, 1.2)):  # noqa: S311
                    return len(batch), AWAY, str(error)
                self._say(AWAY, f"waiting for the collector, {self._hold_s:.0f} s at most: {error}")
                wait_s = min(wait_s * 2, LONGEST_WAIT_SECONDS)

    def _attempt(self, spans: list[ReadableSpan]) -> tuple[int, str, str]:
        """One message: (spans lost, cause, problem); UnavailableError passes."""
        try:
            self._exporter = self._exporter or self._open()
            result = self._exporter.export(spans)
        except RejectedError as error:
            return len(spans) if error.count is None else min(error.count, len(spans)), REFUSED, str(error)
        except OSError as error:
            return len(spans), REFUSED, str(error)
        if result is SpanExportResult.SUCCESS:
            return 0, "", ""
        return len(spans), REFUSED, "the exporter gave them up; its own message is above"

    def _wait_again(self, since: float, wait_s: float) -> bool:
        """Wait before the next attempt; False if there must be none. A flush or a shutdown cuts the wait short."""
        with self._changed:
            self._attempts_failed += 1
            self._changed.notify_all()
            if self._close_by is None:
                self._expire()
                self._changed.wait_for(lambda: self._hurry or self._close_by is not None, wait_s)
                return time.monotonic() - since < self._hold_s
            self._changed.wait_for(lambda: self._closed, CLOSING_WAIT_SECONDS)
            return not self._closed and time.monotonic() < self._close_by

    def _expire(self) -> None:
        """Give up what has waited too long behind the batch that cannot be sent."""
        oldest = time.monotonic() - self._hold_s
        spans = []
        while self._queue and self._queue[0].since < oldest:
            spans.append(self._queue[0].span)
            self._take_one()
        if spans:
            self._settled += len(spans)
            self._lose(len(spans), AWAY, f"the collector was away for more than {self._hold_s:.0f} s", spans)

    def _next_batch(self) -> list[_Waiting]:
        """Up to BATCH spans of BATCH_BYTES; empty only at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._close_by is not None)
            self._changed.wait_for(self._is_due, DELAY_SECONDS)
            batch: list[_Waiting] = []
            weight = 0
            while self._queue and len(batch) < BATCH:
                weight += self._queue[0].weight
                if batch and weight > BATCH_BYTES:
                    break
                batch.append(self._take_one())
            return batch

    def _take_one(self) -> _Waiting:
        item = self._queue.popleft()
        self._weight -= item.weight
        return item

    def _is_due(self) -> bool:
        return len(self._queue) >= BATCH or self._hurry or self._close_by is not None

    def _settle(self, batch: list[_Waiting], lost: int, cause: str, problem: str) -> None:
        with self._changed:
            if self._closed:  # Counted already.
                return
            self._settled += len(batch)
            self._sending = []
            if lost:
                self._lose(lost, cause, problem, [item.span for item in batch])
            self._changed.notify_all()

    def _lose(self, count: int, cause: str, problem: str, spans: Sequence[ReadableSpan]) -> None:
        """Count lost spans; each cause is said for the first ones, the total at shutdown."""
        self.dropped += count
        if self._on_loss is not None:
            self._on_loss(count, cause, spans)
        self._say(f"lost: {cause}", f"spans are being lost ({cause}): {problem}")

    def _say(self, key: str, text: str) -> None:
        """One line per kind of trouble."""
        if key in self._warned:
            return
        self._warned.add(key)
        LOG.warning(
            "tensorspan: %s. Serving and captures go on; check the collector at OTEL_EXPORTER_OTLP_ENDPOINT (without "
            "one, the store's disk)",
            text,
        )


def _weight(span: ReadableSpan, *, exact: bool) -> int:
    """About what the span weighs in a message, bytes: 300 of its own, 45 for each attribute; `exact`: and long values.

    Steps are kept below 4 KB and are many: looking at every value of them would double what queueing costs.
    """
    attributes = span.attributes or {}
    base = 300 + 45 * len(attributes)
    return base + sum(map(_length, attributes.values())) if exact else base


def _length(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(map(_length, value)) + 8 * len(value) if isinstance(value, tuple | list) else 0
