"""What stands around the captures of one store: room, their index, their age, and the bucket behind a spool."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from exporters.ledger import DROPS
from exporters.retention import Retention
from exporters.store_budget import StoreBudget
from tracer import config, metric_names, semconv
from tracer.config import Settings
from tracer.figures import Figure
from tracer.records import ArrayRecord, GenerationStart, StepRecord
from tracer.span_index import SpanIndex

if TYPE_CHECKING:
    from exporters.remote_store import RemoteStore

__all__ = ["StoreFront"]

LOG: Final = logging.getLogger("tensorspan.zarr")
SPOOL_FULL: Final = "SpoolFullError"
OVER_BUDGET: Final = "EDQUOT"
"""Key in `lost` of captures that the store's budget ended, as of those that a quota of the file system ends."""
Arrays = TypeVar("Arrays", bound=StepRecord | ArrayRecord)


class StoreFront:
    """One thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self.root = config.local_store(settings)
        """The store's directory, or the spool of a bucket."""
        self.lost: dict[str, int] = {}
        self.problem: str | None = None
        self.remote = _remote_store(settings)
        """What sends closed captures to the bucket; None if the store is a directory."""
        self.budget = StoreBudget(self.root, settings.store_mb)
        self._settings = settings
        # A spool is not searched, and what leads to a capture in a bucket lies in the bucket.
        self._index = SpanIndex(self.root) if self.remote is None else None
        self._retention = Retention(self.root, settings.keep)
        self._cut: set[str] = set()
        """Open captures that get no more arrays, because the spool has no room."""

    def admit(self) -> str | None:
        """Why a capture that begins now may hold no arrays; None if it may. Raises SpoolFullError if not even that."""
        if self.remote is not None and not self.remote.spool.has_room:
            raise self.remote.spool.full()
        self._retention.look()
        return self.budget.refusal()

    def locked(self) -> AbstractContextManager[None]:
        """While a capture's directory is made."""
        return contextlib.nullcontext() if self.remote is None else self.remote.spool.locked()

    def begun(self, start: GenerationStart, directory: Path) -> None:
        """A capture has been made there."""
        if self.remote is not None:
            self.remote.spool.opened(directory)
        if self._index is not None:
            self._index.begin(start.trace_id, start.span_id, start.start_ns)

    def fitting(self, record: Arrays, payload: memoryview) -> Arrays:
        """The record, without its arrays from the moment on that the spool has no room: no holes."""
        if self.remote is None or not record.arrays:
            return record
        if record.span_id not in self._cut:
            if self.remote.spool.admit(payload.nbytes):
                return record
            self._cut.add(record.span_id)
            self.count(f"capture {record.span_id} cannot be written", self.remote.spool.full())
        dropped = (f"{item.name}: the spool of {self.remote.url} is full" for item in record.arrays)
        return replace(record, arrays=(), dropped=(*record.dropped, *dropped))

    def closed(self, directory: Path) -> None:
        """The one place that every capture passes that will not change any more: ended, interrupted or recovered.

        A process that is killed here passes it again at the next start: the journal is still there.
        """
        self._cut.discard(directory.name)
        if self._index is not None:
            self._index.close(directory.parent.name, directory.name)
        if self.remote is not None:
            self.remote.closed(directory)

    def refused(self, span_id: str, reason: str) -> None:
        """The store's budget has cost that capture something."""
        self.lost[OVER_BUDGET] = self.lost.get(OVER_BUDGET, 0) + 1
        first = self.problem is None
        self.problem = (
            f"capture {span_id} is not stored in full: {reason}; TENSORSPAN_STORE_MB={self._settings.store_mb}, run "
            f"`tensorspan prune {os.fspath(self.root)}`; captures go on by themselves once there is room"
        )
        if first:
            LOG.error("tensorspan: %s", self.problem)

    def count(self, what: str, error: Exception) -> None:
        """A failure that has cost a capture."""
        cause = errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)
        self.lost[cause] = self.lost.get(cause, 0) + 1
        repair = "" if cause == SPOOL_FULL else f"; make {os.fspath(self.root)} writable or free space"
        self.problem = f"{what}: {error}{repair}; the next capture tries again"
        LOG.error("tensorspan: %s", self.problem)

    def figures(self) -> Iterable[Figure]:
        """Size, losses and drops."""
        if (size := self.budget.size()) is not None:
            yield Figure(metric_names.STORE_SIZE, size)
        for cause, count in self.lost.items():
            yield Figure(metric_names.CAPTURE_LOST, count, ((semconv.ERROR_TYPE, cause),))
        for (array, cause), count in DROPS.items():
            yield Figure(metric_names.ARRAYS_DROPPED, count, ((semconv.ARRAY_NAME, array), (semconv.DROP_CAUSE, cause)))

    def flush(self, timeout_s: float) -> bool:
        """Wait for the bucket, if the store is one."""
        return self.remote is None or self.remote.flush(timeout_s)

    def pending(self) -> Collection[str]:
        """Captures that are closed and not yet in the bucket."""
        return self.remote.pending() if self.remote is not None else ()

    def shutdown(self, timeout_s: float) -> bool:
        """False if something stays in the spool."""
        sent = self.remote is None or self.remote.shutdown(timeout_s)
        if self._index is not None:
            self._index.stop()
        return sent


def _remote_store(settings: Settings) -> RemoteStore | None:
    if not config.is_remote(settings.store):
        return None
    from exporters.remote_store import RemoteStore  # It brings asyncio along, which a directory does not need.

    return RemoteStore(settings)
