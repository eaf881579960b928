"""The spool: a directory in the store's own layout where captures wait until they are in the bucket.

Several exporter processes may share one. A capture is sent and removed by whoever holds the lock on its directory;
directories come and go under the lock of the whole spool, which is held for microseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tracer import schema
from tracer.errors import StoreError

__all__ = ["MB", "Spool", "SpoolFullError", "files_of", "is_closed"]

MB: Final = 1_000_000
LOCK: Final = ".lock"
GONE: Final = ".gone-"
METADATA: Final = "zarr.json"
WALKS: Final = 5
SHARD: Final = re.compile(r"c(\.\d+)*")


class SpoolFullError(StoreError):
    """The captures that wait for the bucket have reached their limit."""


class Spool:
    """Sizes and locks of one spool. `admit`, `opened` and `closed` belong to the thread that writes captures."""

    def __init__(self, root: Path, limit_mb: int) -> None:
        self.root = root
        self.limit = limit_mb * MB
        self._sizes: dict[Path, int] = {}
        """Bytes of each capture that was there at the last look."""
        self._done: set[Path] = set()
        """Those of them that nobody writes any more: they do not grow."""
        self._known = 0
        self._open: set[Path] = set()
        self._unmeasured = 0
        """Bytes handed to the writer since it was last measured, before compression and padding."""

    @property
    def used(self) -> int:
        """Bytes that all captures take, at most."""
        return self._known + self._unmeasured

    @property
    def is_open(self) -> bool:
        """True while this process writes a capture."""
        return bool(self._open)

    def opened(self, path: Path) -> None:
        """That capture is being written by this process."""
        self._open.add(path)

    @property
    def has_room(self) -> bool:
        """True if a capture may begin: what every capture says about itself needs room too, beside its rows."""
        return self.used + MB < self.limit

    def admit(self, size: int) -> bool:
        """Book `size` bytes more, or say that they do not fit."""
        if self.used + size >= self.limit:
            return False
        self._unmeasured += size
        return True

    def full(self) -> SpoolFullError:
        """Why nothing more fits, and the repair."""
        return SpoolFullError(
            f"the spool {self.root} is full: {self.used // MB} of {self.limit // MB} MB wait for the bucket; "
            "make the bucket reachable or raise TENSORSPAN_SPOOL_MB"
        )

    def closed(self, path: Path) -> None:
        """Nothing more is written to that capture."""
        self._open.discard(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While directories are made or removed, by this process or another."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def look(self) -> list[Path]:
        """Measure everything and find the captures that nobody writes any more, oldest first."""
        for entry in _scan(self.root):
            if entry.name.startswith(GONE):  # Its process was killed while it removed that.
                shutil.rmtree(entry.path, ignore_errors=True)
        self._unmeasured = 0
        sizes: dict[Path, int] = {}
        done = set()
        for path in self._captures():
            finished = path in self._done or (path not in self._open and is_closed(path))
            sizes[path] = self._sizes[path] if path in self._done else _size(path)
            if finished:
                done.add(path)
        self._sizes, self._done, self._known = sizes, done, sum(sizes.values())
        return sorted(done, key=_modified)

    def measure(self) -> None:
        """Measure again what this process is writing."""
        self._unmeasured = 0
        for path in list(self._open):
            self._sizes[path] = _size(path)
        self._known = sum(self._sizes.values())

    @contextlib.contextmanager
    def claimed(self, path: Path) -> Iterator[bool]:
        """True if that capture is there, closed, and ours to send until the block is left."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            yield False
            return
        try:
            yield _lock(fd) and _is(fd, path) and is_closed(path)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """Take a claimed capture away, and its trace's directory if it was the last one there."""
        gone, trace = self.root / f"{GONE}{path.name}", path.parent
        with self.locked():
            path.rename(gone)
            with contextlib.suppress(OSError):
                if [entry.name for entry in os.scandir(trace)] == [METADATA]:
                    (trace / METADATA).unlink()
                    trace.rmdir()
        shutil.rmtree(gone, ignore_errors=True)  # Large files take a while: not under the lock.
        self._known -= self._sizes.pop(path, 0)
        self._done.discard(path)

    def _captures(self) -> list[Path]:
        """Every capture's directory, closed or not."""
        traces = [entry for entry in _scan(self.root) if schema.is_trace_id(entry.name)]
        return [Path(item.path) for trace in traces for item in _scan(trace.path) if schema.is_span_id(item.name)]


def is_closed(path: Path) -> bool:
    """True if the writer of that capture has finished with it."""
    try:
        content = json.loads((path / METADATA).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("attributes", {}).get("closed") is True


def files_of(path: Path) -> tuple[list[Path], list[Path]]:
    """(shards and flat arrays, the arrays' metadata) of a capture: what the format names, and no parts or journals."""
    arrays = sorted(Path(entry.path) for entry in _scan(path) if entry.is_dir())
    data = [Path(entry.path) for array in arrays for entry in _scan(array) if SHARD.fullmatch(entry.name)]
    return sorted(data), [array / METADATA for array in arrays if (array / METADATA).exists()]


def _scan(path: str | Path) -> list[os.DirEntry[str]]:
    """Entries of a directory; none if it has gone."""
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(path: Path) -> int:
    """Bytes of every file below; walked again if one was renamed meanwhile, as a shard is when it is full."""
    for _ in range(WALKS):
        total, whole = 0, True
        for folder, _, names in os.walk(path):
            for name in names:
                try:
                    total += os.lstat(f"{folder}/{name}").st_size
                except OSError:
                    whole = False
        if whole:
            break
    return total


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is(fd: int, path: Path) -> bool:
    """True if `path` still names the directory that was opened."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False
