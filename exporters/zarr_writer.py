"""Captures into a directory of Zarr v3 groups: the way out for arrays.

A store that cannot be written costs captures and never a request: the failure is counted in `lost` and described in
`problem`, and the next capture tries again. Where the store is a bucket, captures are written to its spool in the same
way, and `exporters.remote_store` takes them on from there once they are closed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from exporters.retention import Retention
from exporters.shards import make_directory, write_json
from exporters.store_budget import StoreBudget
from exporters.zarr_capture import OpenCapture
from tracer import config, schema
from tracer.config import Settings
from tracer.errors import StoreError
from tracer.records import ArrayRecord, EngineInfo, GenerationEnd, GenerationStart, Record, StepRecord
from tracer.span_index import SpanIndex

if TYPE_CHECKING:
    from exporters.remote_store import RemoteStore

__all__ = ["ZarrExporter"]

LOG: Final = logging.getLogger("tensorspan.zarr")
FAILURES: Final = (OSError, ValueError, TypeError, OverflowError)
"""The file system's, and those of values that no array or JSON can hold: each ends one capture and nothing else."""
SPOOL_FULL: Final = "SpoolFullError"
OVER_BUDGET: Final = "EDQUOT"
"""Key in `lost` of captures that the store's budget ended, as of those that a quota of the file system ends."""
RETRIES: Final = 4
"""`tensorspan prune` may remove a trace that is empty between our making it and our first capture in it."""
Arrays = TypeVar("Arrays", bound=StepRecord | ArrayRecord)


class ZarrExporter:
    """Writes each captured generation to `<store>/<trace_id>/<span_id>`. One thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self.lost: dict[str, int] = {}
        """Captures not written, or not to their end, by cause (`ENOSPC`, `EACCES`, `SpoolFullError`, ...)."""
        self.problem: str | None = None
        """What is wrong with the store now, and the repair; None if the last capture could be opened."""
        self._settings = settings
        self._root = config.local_store(settings)
        self._engine: EngineInfo | None = None
        self._open: dict[str, OpenCapture] = {}
        self._cut: set[str] = set()
        """Open captures that get no more arrays, because the spool has no room."""
        self.remote = _remote_store(settings)
        """What sends closed captures to the bucket; None if the store is a directory."""
        self._index = SpanIndex(self._root)
        self._budget = StoreBudget(self._root, settings.store_mb)
        self._retention = Retention(self._root, settings.keep)

    def export(self, record: Record, payload: memoryview) -> None:
        """Take one record; `payload` is valid only during the call. A store that fails is counted, not raised."""
        if isinstance(record, EngineInfo):
            if record.rank == 0 or self._engine is None:
                self._engine = record
            return
        if not isinstance(record, StepRecord | ArrayRecord | GenerationStart | GenerationEnd):
            return
        try:
            if isinstance(record, GenerationStart):
                self._begin(record)
            elif (capture := self._open.get(record.span_id)) is not None:
                self._pass_on(capture, record, payload)
        except FAILURES as error:
            self._fail(record.span_id, error)

    def force_flush(self, timeout_s: float) -> bool:
        """Wait for the bucket, if the store is one; else nothing is held back but the parts of unfinished shards."""
        return self.remote is None or self.remote.flush(timeout_s)

    def pending(self) -> Collection[str]:
        """Captures that are closed and not yet in the bucket."""
        return self.remote.pending() if self.remote is not None else ()

    def shutdown(self, timeout_s: float) -> bool:
        """Close captures that are still open as interrupted; False if time ran out and some stayed as they are.

        What has not reached the bucket by then stays in its spool.
        """
        deadline, in_time = time.monotonic() + timeout_s, True
        for span_id, capture in list(self._open.items()):
            in_time = time.monotonic() <= deadline
            if not in_time:
                break
            try:
                capture.interrupted(time.time_ns())
            except FAILURES as error:
                self._fail(span_id, error)
            if self._open.get(span_id) is not None:
                self._closed(capture)
        sent = self.remote is None or self.remote.shutdown(max(deadline - time.monotonic(), 0.0))
        self._index.stop()
        return in_time and sent

    def _begin(self, start: GenerationStart) -> None:
        if start.capture is None:
            return
        if not (schema.is_trace_id(start.trace_id) and schema.is_span_id(start.span_id)):
            raise StoreError(errno.EINVAL, "IDs are not lowercase hexadecimal", f"{start.trace_id}/{start.span_id}")
        if self.remote is not None and not self.remote.spool.has_room:
            raise self.remote.spool.full()
        self._retention.look()
        refusal = self._budget.refusal()
        with self.remote.spool.locked() if self.remote is not None else contextlib.nullcontext():
            capture = self._open[start.span_id] = self._new_capture(start)
        self._index.begin(start.trace_id, start.span_id, start.start_ns)
        if refusal is None:
            self.problem = None
        else:  # Its group alone is kept, to say why there is nothing in it.
            capture.abandon(refusal)
            self._book_refusal(start.span_id, refusal)
            self._closed(capture)

    def _new_capture(self, start: GenerationStart) -> OpenCapture:
        for _ in range(RETRIES):
            with contextlib.suppress(FileNotFoundError):
                return self._try_capture(start)
        return self._try_capture(start)

    def _try_capture(self, start: GenerationStart) -> OpenCapture:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        trace = self._root / start.trace_id
        _ensure_group(self._root, "store", {})
        with contextlib.suppress(FileExistsError):
            make_directory(trace)
        _ensure_group(trace, "trace", {"trace_id": start.trace_id})
        directory = trace / start.span_id
        capture = OpenCapture(directory, start, self._engine, self._settings, self._budget)
        if self.remote is not None:
            self.remote.spool.opened(directory)
        return capture

    def _pass_on(
        self, capture: OpenCapture, record: StepRecord | ArrayRecord | GenerationEnd, payload: memoryview
    ) -> None:
        if isinstance(record, StepRecord):
            capture.step(self._fitting(record, payload), payload)
        elif isinstance(record, ArrayRecord):
            capture.prompt_rows(self._fitting(record, payload), payload)
        else:
            capture.end(record, record.status)
            self._closed(capture)

    def _fitting(self, record: Arrays, payload: memoryview) -> Arrays:
        """The record, without its arrays from the moment on that the spool has no room: no holes."""
        if self.remote is None or not record.arrays:
            return record
        if record.span_id not in self._cut:
            if self.remote.spool.admit(payload.nbytes):
                return record
            self._cut.add(record.span_id)
            self._count(record.span_id, self.remote.spool.full())
        dropped = (f"{item.name}: the spool of {self.remote.url} is full" for item in record.arrays)
        return replace(record, arrays=(), dropped=(*record.dropped, *dropped))

    def _closed(self, capture: OpenCapture) -> None:
        """The capture is as it will stay: its step spans lead to it from now on."""
        span_id = capture.directory.name
        self._open.pop(span_id, None)
        self._cut.discard(span_id)
        self._index.close(*capture.name)
        if capture.over_budget:
            self._book_refusal(span_id, "the store's budget was reached while it was written")
        if self.remote is not None:
            self.remote.closed(capture.directory)

    def _book_refusal(self, span_id: str, reason: str) -> None:
        self.lost[OVER_BUDGET] = self.lost.get(OVER_BUDGET, 0) + 1
        first = self.problem is None
        self.problem = (
            f"capture {span_id} is not stored in full: {reason}; TENSORSPAN_STORE_MB={self._settings.store_mb}, run "
            f"`tensorspan prune {os.fspath(self._root)}`; captures go on by themselves once there is room"
        )
        if first:
            LOG.error("tensorspan: %s", self.problem)

    def _fail(self, span_id: str, error: Exception) -> None:
        """The capture is lost from here on; serving and other captures go on."""
        self._count(span_id, error)
        capture = self._open.get(span_id)
        if capture is not None:
            with contextlib.suppress(*FAILURES):
                capture.abandon(f"the store could not be written: {error}")
            self._closed(capture)

    def _count(self, span_id: str, error: Exception) -> None:
        cause = errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)
        self.lost[cause] = self.lost.get(cause, 0) + 1
        repair = "" if cause == SPOOL_FULL else f"; make {os.fspath(self._root)} writable or free space"
        self.problem = f"capture {span_id} cannot be written: {error}{repair}; the next capture tries again"
        LOG.error("tensorspan: %s", self.problem)


def _remote_store(settings: Settings) -> RemoteStore | None:
    if not config.is_remote(settings.store):
        return None
    from exporters.remote_store import RemoteStore  # It brings asyncio along, which a directory does not need.

    return RemoteStore(settings)


def _ensure_group(directory: Path, kind: str, attributes: dict[str, str]) -> None:
    """Make `directory` a Zarr group unless it is one."""
    path = directory / "zarr.json"
    if not path.exists():
        write_json(path, schema.group_metadata(kind, attributes))
