"""From the spool to the bucket: closed captures go up in the background, metadata last, and then leave the spool.

A bucket that is away costs nothing but room: captures wait in the spool, one attempt at a time looks whether it is
back, and both the beginning and the end of the absence are one line in the log. The thread that writes captures never
waits for the network.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from exporters.spool import MB, Spool, files_of, is_closed
from tracer import config, remote
from tracer._guard import Guard
from tracer.config import Settings
from tracer.errors import SettingsError

__all__ = ["RemoteStore"]

LOG: Final = logging.getLogger("tensorspan.remote")
CAPTURES: Final = 8
"""Captures that go up together."""
FILES: Final = 8
"""Files of them in flight."""
PARTS: Final = 2
PART_BYTES: Final = 8 * 2**20
"""Larger files go up in parts of this size, PARTS at once: 128 MiB in memory at most."""
LOOK_SECONDS: Final = 30.0
"""How often the spool is searched for captures of exporters that are gone."""
MEASURE_SECONDS: Final = 1.0
RETRY_SECONDS: Final = (1.0, 30.0)
"""First and longest pause between attempts while the bucket is away."""
METADATA: Final = "zarr.json"


class RemoteStore:
    """The bucket behind a spool. No method but `flush` and `shutdown` waits."""

    def __init__(self, settings: Settings) -> None:
        self.url = settings.store.rstrip("/")
        self.spool = Spool(config.spool_directory(settings), settings.spool_mb)
        self.problem: str | None = None
        """Why captures wait, and the repair; None while the bucket takes them."""
        self.uploaded = 0
        """Captures that have reached the bucket."""
        self._waiting: dict[Path, None] = {}
        self._unreadable: set[Path] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._pause = RETRY_SECONDS[0]
        self._retry_at = 0.0
        self._look_at = 0.0
        self._away_since = 0.0
        self._guard = Guard()
        self._thread = threading.Thread(target=self._run, name="tensorspan-upload", daemon=True)
        self._thread.start()

    # -- called by the writer of captures ----------------------------------------------------------------------

    def closed(self, path: Path) -> None:
        """Nothing more is written to that capture: it may go."""
        with self._changed:
            self._waiting[path] = None
            self.spool.closed(path)
            self._changed.notify_all()

    def pending(self) -> frozenset[str]:
        """Span IDs of closed captures that are not in the bucket."""
        with self._changed:
            return frozenset(path.name for path in self._waiting)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything closed so far is in the bucket; False if it was not within `timeout_s`."""
        with self._changed:
            wanted = list(self._waiting)
            return self._changed.wait_for(lambda: not any(path in self._waiting for path in wanted), timeout_s)

    def shutdown(self, timeout_s: float) -> bool:
        """`flush`, then stop; what has not gone up stays in the spool for the next start, and the log says so."""
        done = self.flush(timeout_s)
        with self._changed:
            self._closing = True
            left = len(self._waiting)
            self._changed.notify_all()
        if left:
            LOG.warning(
                "tensorspan: %d captures are not in %s; they wait in %s (%d MB) for the next start with this store",
                left, self.url, self.spool.root, self.spool.used // MB,
            )  # fmt: skip
        return done

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            while not self._closing:
                failures = self._guard.failures.total()
                with self._guard("sending captures to the bucket"):
                    self._turn(runner)
                if self._guard.failures.total() > failures:
                    threading.Event().wait(MEASURE_SECONDS)

    def _turn(self, runner: asyncio.Runner) -> None:
        """Look around if it is time, then send something or sleep until there is something."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._enlist(self.spool.look())
        elif self.spool.is_open:
            self.spool.measure()
        with self._changed:
            batch = list(self._waiting)[: 1 if self.problem else CAPTURES] if now >= self._retry_at else []
            if not batch:
                self._changed.wait(MEASURE_SECONDS)
                return
        self._send_batch(batch, runner)

    def _enlist(self, found: Iterable[Path]) -> None:
        with self._changed:
            for path in found:
                if path not in self._unreadable:
                    self._waiting.setdefault(path)

    def _send_batch(self, batch: Sequence[Path], runner: asyncio.Runner) -> None:
        with ExitStack() as claims:
            ours = [path for path in batch if claims.enter_context(self.spool.claimed(path))]
            failures = runner.run(self._send_all(ours)) if ours else {}
            sent = [path for path in ours if path not in failures]
            for path in sent:
                self.spool.remove(path)
        self.uploaded += len(sent)
        elsewhere = [path for path in batch if path not in ours and is_closed(path)]
        away = self._set_aside(failures)
        self._settle(batch, [*elsewhere, *away])
        if away:
            self._note_absence(next(iter(away.values())))
        elif sent:
            self._note_return()
        elif elsewhere:  # Another exporter is sending all of these: look again when it may be done.
            threading.Event().wait(MEASURE_SECONDS / 10)

    def _set_aside(self, failures: Mapping[Path, BaseException]) -> dict[Path, BaseException]:
        """The failures that are the bucket's; captures that cannot be read are said and left where they are."""
        away = {}
        for path, error in failures.items():
            if isinstance(error, OSError) and error.errno:
                LOG.error("tensorspan: %s cannot be read and stays where it is: %s", path, error)
                self._unreadable.add(path)
            else:
                away[path] = error
        return away

    def _settle(self, batch: Iterable[Path], again: Iterable[Path]) -> None:
        """Strike off what has gone; what is to be tried again goes to the end, so that it blocks nothing."""
        with self._changed:
            for path in batch:
                self._waiting.pop(path, None)
            self._waiting |= dict.fromkeys(again)
            self._changed.notify_all()

    async def _send_all(self, paths: Sequence[Path]) -> dict[Path, BaseException]:
        """Send captures together; why those failed that did."""
        turn = asyncio.Semaphore(FILES)
        try:
            place = remote.locate(self.url, writing=True)
        except Exception as error:  # noqa: BLE001 - a missing library or a wrong URL keeps captures waiting like an outage
            return dict.fromkeys(paths, error)
        measuring = asyncio.create_task(self._measure())
        outcomes = await asyncio.gather(*(self._send(place, path, turn) for path in paths), return_exceptions=True)
        measuring.cancel()
        return {path: error for path, error in zip(paths, outcomes, strict=True) if isinstance(error, BaseException)}

    async def _measure(self) -> None:
        """What is being written meanwhile is booked uncompressed until it is measured."""
        while True:
            await asyncio.sleep(MEASURE_SECONDS)
            self.spool.measure()

    async def _send(self, place: remote.Place, path: Path, turn: asyncio.Semaphore) -> None:
        """One capture: groups above it and data, then the arrays' metadata and the index, at last its own group."""
        data, metadata = files_of(path)
        root, trace = self.spool.root, path.parent
        index = remote.index_key(path.name, trace.name)
        for file in (root / METADATA, trace / METADATA, *data, *metadata):
            file.open("rb").close()  # An error with an `errno` is ours, all others are the bucket's.

        async def put(*items: tuple[str, Any]) -> None:
            async def one(key: str, content: Any) -> None:
                async with turn:
                    await place.bucket.put_async(
                        place.join(key), content, chunk_size=PART_BYTES, max_concurrency=PARTS
                    )  # fmt: skip

            await asyncio.gather(*(one(key, content) for key, content in items))

        def named(paths: Iterable[Path]) -> list[tuple[str, Path]]:
            return [(file.relative_to(root).as_posix(), file) for file in paths]

        await put(*named([root / METADATA, trace / METADATA, *data]))
        await put(*named(metadata), (index, b""))
        await put(*named([path / METADATA]))

    def _note_absence(self, error: BaseException) -> None:
        """Say once that captures wait, and again if the reason becomes another."""
        with self._changed:
            waiting = len(self._waiting)
        reason = f"{self.url} does not take captures: {_reason(error)}"
        if reason != self.problem:
            LOG.warning(
                "tensorspan: %s; %d captures wait in %s, and nothing else changes; trying until it does",
                reason, waiting, self.spool.root,
            )  # fmt: skip
        if self.problem is None:
            self._away_since = time.monotonic()
            self._pause = RETRY_SECONDS[0]
        self.problem = reason
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, RETRY_SECONDS[1])

    def _note_return(self) -> None:
        if self.problem is None:
            return
        self.problem = None
        with self._changed:
            waiting = len(self._waiting)
        LOG.warning(
            "tensorspan: %s takes captures again after %.0f s; %d that waited follow",
            self.url, time.monotonic() - self._away_since, waiting,
        )  # fmt: skip


def _reason(error: BaseException) -> str:
    """An error of our own is a sentence already."""
    return str(error) if isinstance(error, SettingsError | ImportError) else remote.explain(error)
