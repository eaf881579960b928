"""Captures into a directory of Zarr v3 groups: the way out for arrays.

A store that cannot be written costs captures and never a request: the failure is counted in `lost` and described in
`problem`, and the next capture tries again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from pathlib import Path
from typing import Final

from exporters.retention import Retention
from exporters.shards import make_directory, write_json
from exporters.store_budget import StoreBudget
from exporters.zarr_capture import OpenCapture
from tracer import schema
from tracer.config import Settings
from tracer.errors import StoreError
from tracer.records import ArrayRecord, EngineInfo, GenerationEnd, GenerationStart, Record, StepRecord
from tracer.span_index import SpanIndex

__all__ = ["ZarrExporter"]

LOG: Final = logging.getLogger("tensorspan.zarr")
FAILURES: Final = (OSError, ValueError, TypeError, OverflowError)
"""The file system's, and those of values that no array or JSON can hold: each ends one capture and nothing else."""
OVER_BUDGET: Final = "EDQUOT"
"""Key in `lost` of captures that the store's budget ended, as of those that a quota of the file system ends."""
RETRIES: Final = 4
"""`tensorspan prune` may remove a trace that is empty between our making it and our first capture in it."""


class ZarrExporter:
    """Writes each captured generation to `<store>/<trace_id>/<span_id>`. One thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self.lost: dict[str, int] = {}
        """Captures that could not be written, or not to their end, by cause (`ENOSPC`, `EACCES`, ...)."""
        self.problem: str | None = None
        """What is wrong with the store now, and the repair; None if the last capture could be opened."""
        self._settings = settings
        self._root = Path(settings.store)
        self._engine: EngineInfo | None = None
        self._open: dict[str, OpenCapture] = {}
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
        """Rows are written as they come: nothing is held back but the parts of unfinished shards."""
        return True

    def shutdown(self, timeout_s: float) -> bool:
        """Close captures that are still open as interrupted; False if time ran out and some stayed as they are."""
        deadline = time.monotonic() + timeout_s
        for span_id, capture in list(self._open.items()):
            if time.monotonic() > deadline:
                return False
            try:
                capture.interrupted(time.time_ns())
            except FAILURES as error:
                self._fail(span_id, error)
            else:
                self._closed(span_id)
        self._index.stop()
        return True

    def _begin(self, start: GenerationStart) -> None:
        if start.capture is None:
            return
        if not (schema.is_trace_id(start.trace_id) and schema.is_span_id(start.span_id)):
            raise StoreError(errno.EINVAL, "IDs are not lowercase hexadecimal", f"{start.trace_id}/{start.span_id}")
        self._retention.look()
        refusal = self._budget.refusal()
        capture = self._open[start.span_id] = self._new_capture(start)
        self._index.begin(start.trace_id, start.span_id, start.start_ns)
        if refusal is None:
            self.problem = None
        else:  # Its group alone is kept, to say why there is nothing in it.
            capture.abandon(refusal)
            self._book_refusal(start.span_id, refusal)
            self._closed(start.span_id)

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
        return OpenCapture(trace / start.span_id, start, self._engine, self._settings, self._budget)

    def _pass_on(
        self, capture: OpenCapture, record: StepRecord | ArrayRecord | GenerationEnd, payload: memoryview
    ) -> None:
        if isinstance(record, StepRecord):
            capture.step(record, payload)
        elif isinstance(record, ArrayRecord):
            capture.prompt_rows(record, payload)
        else:
            capture.end(record, record.status)
            self._closed(record.span_id)

    def _closed(self, span_id: str) -> None:
        """The capture is as it will stay: its step spans lead to it from now on."""
        capture = self._open.pop(span_id)
        self._index.close(*capture.name)
        if capture.over_budget:
            self._book_refusal(span_id, "the store's budget was reached while it was written")

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
        cause = errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)
        self.lost[cause] = self.lost.get(cause, 0) + 1
        self.problem = (
            f"capture {span_id} cannot be written: {error}; make {os.fspath(self._root)} writable or free space; "
            "the next capture tries again"
        )
        LOG.error("tensorspan: %s", self.problem)
        capture = self._open.get(span_id)
        if capture is not None:
            with contextlib.suppress(*FAILURES):
                capture.abandon(f"the store could not be written: {error}")
            self._closed(span_id)


def _ensure_group(directory: Path, kind: str, attributes: dict[str, str]) -> None:
    """Make `directory` a Zarr group unless it is one."""
    path = directory / "zarr.json"
    if not path.exists():
        write_json(path, schema.group_metadata(kind, attributes))
