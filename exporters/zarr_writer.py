"""Captures into a directory of Zarr v3 groups: the way out for arrays.

A store that cannot be written costs captures and never a request: the failure is counted in `lost` and described in
`problem`, and the next capture tries again. What a killed or failed writer left is closed at the first record, and
again whenever a capture begins. Where the store is a bucket, captures are written to its spool in the same way, and
`exporters.remote_store` takes them on from there once they are closed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import struct
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporters.journal import FOLDER, Journal, leftovers
from exporters.recovery import is_blank, recover
from exporters.shards import make_directory, write_json
from exporters.store_front import StoreFront
from exporters.zarr_capture import OpenCapture
from tracer import schema
from tracer.config import Settings
from tracer.errors import StoreError
from tracer.figures import Figure
from tracer.ranks import whole_engines
from tracer.records import ArrayRecord, EngineInfo, GenerationEnd, GenerationStart, Record, StepRecord

if TYPE_CHECKING:
    from exporters.remote_store import RemoteStore

__all__ = ["ZarrExporter"]

LOG: Final = logging.getLogger("tensorspan.zarr")
FAILURES: Final = (OSError, ValueError, TypeError, OverflowError, struct.error)
"""The file system's, and those of values that nothing of ours can hold: each ends one capture and nothing else."""
RETRIES: Final = 4
"""`tensorspan prune` may remove a trace that is empty between our making it and our first capture in it."""


class ZarrExporter:
    """Writes each captured generation to `<store>/<trace_id>/<span_id>`. One thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store = StoreFront(settings)
        self._root = self._store.root
        self._engine: EngineInfo | None = None
        """What the engines can do, of any replica: they serve one model."""
        self._workers: dict[tuple[int, int], EngineInfo] = {}
        """What each rank of each replica has said last."""
        self._open: dict[str, OpenCapture] = {}
        self._unfinished: dict[str, str | None] = {}
        """Captures that could not be closed, by their journals: why their writer gave them up, if that is known."""
        self._looked = False

    @property
    def lost(self) -> dict[str, int]:
        """Captures that could not be written, or not to their end, by cause (`ENOSPC`, `EACCES`, ...)."""
        return self._store.lost

    @property
    def problem(self) -> str | None:
        """What is wrong with the store now, and the repair; None if the last capture could be opened."""
        return self._store.problem

    @property
    def remote(self) -> RemoteStore | None:
        """What sends closed captures to the bucket; None if the store is a directory."""
        return self._store.remote

    def export(self, record: Record, payload: memoryview) -> None:
        """Take one record; `payload` is valid only during the call. A store that fails is counted, not raised."""
        if not self._looked:
            self.recover()
        if isinstance(record, EngineInfo):
            self._workers[record.replica, record.rank] = record
            self._engine = whole_engines(self._workers.values())[0]
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
        if not self._looked:
            self.recover()
        return self._store.flush(timeout_s)

    def pending(self) -> Collection[str]:
        """Captures that are closed and not yet in the bucket."""
        return self._store.pending()

    def figures(self) -> Iterable[Figure]:
        """Size, losses and drops."""
        return self._store.figures()

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
                self._done(capture)
            except FAILURES as error:
                self._fail(span_id, error)
        if in_time and (self._unfinished or not self._looked):
            self.recover()
        return self._store.shutdown(max(deadline - time.monotonic(), 0.0)) and in_time

    def recover(self) -> list[Path]:
        """Close what killed and failed writers left in this store; returns the captures that are closed now.

        Captures of living writers, in this process or another, are left alone: they hold their journals' locks.
        """
        self._looked = True
        try:
            left = leftovers(self._root)
        except OSError as error:
            self._store.count(f"{self._root / FOLDER} cannot be read", error)
            return []
        found = [done for path, trace, span in left if (done := self._recover(path, self._root / trace / span))]
        with contextlib.suppress(OSError):  # It is not empty, or not there.
            (self._root / FOLDER).rmdir()
        if found:
            LOG.info("closed %d captures that an earlier writer had left open", len(found))
        return found

    def _recover(self, path: Path, directory: Path) -> Path | None:
        """Close one capture unless its writer lives; a failure is counted once and tried again later."""
        taken: Journal | None = None
        try:
            taken = Journal.take(path)
            if taken is None:
                return None
            known = recover(taken, directory, self._settings, self._unfinished.get(path.name))
            self._unfinished.pop(path.name, None)
            if known:
                self._store.closed(directory)
            taken.remove()
        except OSError as error:
            if taken is not None:
                taken.release()
            if path.name not in self._unfinished:
                self._store.count(f"what was left of capture {directory.name} cannot be closed", error)
                self._unfinished[path.name] = None
            return None
        except Exception:
            if taken is not None:
                taken.release()
            LOG.exception("tensorspan: %s cannot be read; the capture stays as it is", path)
            return None
        return directory if known else None

    def _begin(self, start: GenerationStart) -> None:
        if start.capture is None:
            return
        if not (schema.is_trace_id(start.trace_id) and schema.is_span_id(start.span_id)):
            raise StoreError(errno.EINVAL, "IDs are not lowercase hexadecimal", f"{start.trace_id}/{start.span_id}")
        if self._unfinished:
            self.recover()
        refusal = self._store.admit()
        with self._store.locked():
            capture = self._new_capture(start)
        self._open[start.span_id] = capture
        self._store.begun(start, capture.directory)
        if refusal is None:
            self._store.problem = None
        else:  # Its group alone is kept, to say why there is nothing in it.
            capture.fail(refusal)
            self._store.refused(start.span_id, refusal)
            self._done(capture)

    def _new_capture(self, start: GenerationStart) -> OpenCapture:
        for _ in range(RETRIES):
            with contextlib.suppress(FileNotFoundError):
                return self._try_capture(start)
        return self._try_capture(start)

    def _try_capture(self, start: GenerationStart) -> OpenCapture:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        journal = Journal.create(self._root / FOLDER / f"{start.trace_id}-{start.span_id}")
        made: Path | None = None
        try:
            made = self._make_directory(start, journal)
            capture = OpenCapture(made, start, self._engine, self._settings, journal, self._store.budget)
            capture.begin()
        except BaseException:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            with contextlib.suppress(OSError):
                journal.remove()
            raise
        return capture

    def _make_directory(self, start: GenerationStart, journal: Journal) -> Path:
        """The capture's own directory, below groups for store and trace."""
        trace = self._root / start.trace_id
        directory = trace / start.span_id
        _ensure_group(self._root, "store", {}, journal.temporary)
        with contextlib.suppress(FileExistsError):
            make_directory(trace)
        _ensure_group(trace, "trace", {"trace_id": start.trace_id}, journal.temporary)
        if is_blank(directory):
            # Killed between the start and its acknowledgement: the queue hands the start over once more.
            shutil.rmtree(directory)
        make_directory(directory)
        return directory

    def _pass_on(
        self, capture: OpenCapture, record: StepRecord | ArrayRecord | GenerationEnd, payload: memoryview
    ) -> None:
        if isinstance(record, StepRecord):
            capture.step(self._store.fitting(record, payload), payload)
        elif isinstance(record, ArrayRecord):
            capture.prompt_rows(self._store.fitting(record, payload), payload)
        else:
            capture.end(record)
            self._done(capture)

    def _fail(self, span_id: str, error: Exception) -> None:
        """The capture is lost from here on; serving and other captures go on."""
        self._store.count(f"capture {span_id} cannot be written", error)
        capture = self._open.pop(span_id, None)
        if capture is not None:
            reason = f"the store could not be written: {error}"
            self._unfinished[capture.journal.path.name] = reason
            with contextlib.suppress(*FAILURES):
                capture.abandon(reason)

    def _done(self, capture: OpenCapture) -> None:
        """The capture is closed; its journal goes last."""
        del self._open[capture.span_id]
        self._store.closed(capture.directory)
        if capture.over_budget:
            self._store.refused(capture.span_id, "the store's budget was reached while it was written")
        with contextlib.suppress(OSError):  # Then it goes at the next start.
            capture.journal.remove()


def _ensure_group(directory: Path, kind: str, attributes: dict[str, str], temporary: Path) -> None:
    """Make `directory` a Zarr group unless it is one."""
    path = directory / "zarr.json"
    if not path.exists():
        write_json(path, schema.group_metadata(kind, attributes), temporary)
