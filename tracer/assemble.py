"""Puts records of several processes in order: the start first, one end when both sides have finished.

The API process knows how a generation ended and how many tokens the client got; the worker knows when it will send
nothing more. An end is passed on when both have spoken, or when the silent side is gone or late.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from tracer.records import (
    ArrayRecord,
    EngineInfo,
    GenerationEnd,
    GenerationStart,
    LogLine,
    PlainGeneration,
    Record,
    RequestSpan,
    StepRecord,
    WorkerEnd,
)

__all__ = ["Assembler"]

NOTHING: Final = memoryview(b"")
LATE_SECONDS: Final = 10.0
"""A worker that was busy with the generation gets this long to say that it has finished."""
UNSEEN_SECONDS: Final = 1.0
"""The same for a generation of which no worker has sent anything (aborted while it waited)."""


@dataclass(slots=True)
class _Open:
    """A generation that has not been passed on as ended."""

    start: GenerationStart
    source: int
    workers: dict[int, int] = field(default_factory=dict)
    """Connections that have sent something and no end yet, each with its newest step (-1 before the first)."""
    ranks: int = 1
    """Workers that have to send something."""
    heard: set[int] = field(default_factory=set)
    """Connections that have sent something, or are gone."""
    last_step: int = -1
    end: GenerationEnd | None = None
    end_at: float = 0.0

    @property
    def seen(self) -> bool:
        """True if any worker has sent something."""
        return bool(self.heard)

    @property
    def settled(self) -> bool:
        """True if the end is known and no worker owes anything.

        A worker that has sent the last step the client got owes nothing, even if it has not said so yet: an idle
        engine tells its workers of a finished request only with the next step. A surplus step may still follow.
        """
        if self.end is None or len(self.heard) < self.ranks:
            return False
        needed = self.end.output_tokens - 1 if self.end.status == "ok" else sys.maxsize
        return all(newest >= needed for newest in self.workers.values())


class Assembler:
    """`emit` gets each record exactly once, in the order that `tracer.export.Exporter` promises."""

    def __init__(self, emit: Callable[[Record, memoryview], None], clock: Callable[[], float]) -> None:
        self._emit = emit
        self._clock = clock
        self._open: dict[str, _Open] = {}
        self._ranks = 1
        """Tensor parallel ranks of each engine."""
        self.orphans = 0
        """Records of generations that were never announced or had already ended."""

    def take(self, source: int, record: Record, payload: memoryview = NOTHING) -> None:
        """One record from connection `source`."""
        match record:
            case GenerationStart():
                # Where layers are looked at, every rank sends its heads; else rank 0 speaks for all.
                several = record.capture is not None and record.capture.wants_layers
                self._open[record.span_id] = _Open(record, source, ranks=self._ranks if several else 1)
                self._emit(record, payload)
            case StepRecord() | ArrayRecord():
                self._from_worker(source, record, payload)
            case WorkerEnd():
                self._worker_end(source, record)
            case GenerationEnd():
                self._generation_end(record)
            case EngineInfo():
                self._ranks = record.world_size if record.rank == 0 else self._ranks
                self._emit(record, payload)
            case RequestSpan() | PlainGeneration() | LogLine():
                self._emit(record, payload)
            case _:
                self.orphans += 1

    def is_open(self, span_id: str) -> bool:
        """True until the end of that generation has been passed on."""
        return span_id in self._open

    def lost_source(self, source: int) -> None:
        """Connection `source` is gone: it will neither end its generations nor finish its steps."""
        for span_id, item in list(self._open.items()):
            if item.source == source and item.end is None:
                item.end, item.end_at = _interrupted(item), self._clock()
            item.workers.pop(source, None)
            self._settle(span_id)

    def expire(self) -> None:
        """Pass on the ends that have waited long enough for a silent worker."""
        now = self._clock()
        for span_id, item in list(self._open.items()):
            patience = LATE_SECONDS if item.seen else UNSEEN_SECONDS
            if item.end is not None and now - item.end_at > patience:
                self._close(span_id)

    def close(self) -> None:
        """The process ends: pass on everything that is still open as interrupted."""
        for span_id, item in list(self._open.items()):
            item.end = item.end or _interrupted(item)
            self._close(span_id)

    def _from_worker(self, source: int, record: StepRecord | ArrayRecord, payload: memoryview) -> None:
        item = self._open.get(record.span_id)
        if item is None:
            self.orphans += 1
            return
        item.heard.add(source)
        newest = record.step if isinstance(record, StepRecord) and record.step is not None else -1
        item.workers[source] = max(item.workers.get(source, -1), newest)
        item.last_step = max(item.last_step, newest)
        self._emit(record, payload)
        self._settle(record.span_id)

    def _worker_end(self, source: int, record: WorkerEnd) -> None:
        item = self._open.get(record.span_id)
        if item is None:
            return
        self._emit(record, NOTHING)
        item.heard.add(source)
        item.workers.pop(source, None)
        self._settle(record.span_id)

    def _generation_end(self, record: GenerationEnd) -> None:
        item = self._open.get(record.span_id)
        if item is None:
            self.orphans += 1
            return
        item.end, item.end_at = record, self._clock()
        self._settle(record.span_id)

    def _settle(self, span_id: str) -> None:
        if self._open[span_id].settled:
            self._close(span_id)

    def _close(self, span_id: str) -> None:
        item = self._open.pop(span_id)
        assert item.end is not None
        self._emit(item.end, NOTHING)


def _interrupted(item: _Open) -> GenerationEnd:
    """The end of a generation whose API process is gone: what the worker sent is all there is."""
    end = GenerationEnd(item.start.trace_id, item.start.span_id, time.time_ns(), "error", "error", item.last_step + 1)
    return replace(end, error="the process that called the engine ended before the generation did")
