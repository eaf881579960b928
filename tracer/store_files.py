"""A store as files: which directories are captures, what their groups say, how large they are.

Only the standard library and only directories: the commands that walk a whole store start fast, and the exporter and
the reader agree on what a capture is. Symbolic links below the root are not followed: what they lead to is not the
store's. `docs/store-format.md` has the layout.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from tracer import schema
from tracer.errors import CaptureNotFoundError

__all__ = [
    "GROUP",
    "SPANS_LOST",
    "CaptureName",
    "directory_of",
    "group_attributes",
    "is_plain",
    "read_metadata",
    "spans_lost",
    "step_spans",
    "stored_captures",
    "stored_traces",
    "tree_bytes",
    "tree_changed_ns",
]

GROUP: Final = "zarr.json"
SPANS_LOST: Final = "spans_lost.json"
"""Beside a capture's group if its generation span never reached the collector: why."""
MAX_METADATA_BYTES: Final = 1 << 28
"""A capture's `zarr.json` is some 20 kB; one of a million prompt tokens in messages of ten is 5 MB."""


class CaptureName(NamedTuple):
    """What names a capture in its store: the directories that lead to it."""

    trace_id: str
    span_id: str
    """The generation span."""

    def below(self, root: Path) -> Path:
        """The capture's directory in the store `root`."""
        return root / self.trace_id / self.span_id


def spans_lost(path: Path) -> str:
    """Why the generation span of the capture at `path` did not arrive; empty if nothing says so."""
    try:
        content = json.loads((path / SPANS_LOST).read_bytes())
    except (OSError, ValueError):
        return ""
    return str(content.get("cause", "")) if isinstance(content, dict) else ""


def directory_of(store: str | os.PathLike[str]) -> Path:
    """The store as a path; CaptureNotFoundError if it is a URL or not there."""
    text = os.fspath(store)
    if "://" in text:
        raise CaptureNotFoundError(f"{text} is a URL; this works on a directory: run it where the store's files are")
    if not Path(text).is_dir():
        raise CaptureNotFoundError(f"no store at {text}; name the server's, or run where it runs")
    return Path(text)


def stored_traces(root: Path) -> Iterator[Path]:
    """The directories of a store that are named like traces; none if there is no store."""
    yield from (root / name for name in _directories(root) if schema.is_trace_id(name))


def stored_captures(root: Path) -> Iterator[CaptureName]:
    """Every directory of a store that is named like a capture, in the order of the IDs."""
    for trace in stored_traces(root):
        yield from (CaptureName(trace.name, name) for name in _directories(trace) if schema.is_span_id(name))


def group_attributes(directory: Path) -> dict[str, Any]:
    """Attributes of a capture in our format; empty if that is none, e.g. because it was removed meanwhile."""
    try:
        content = json.loads(read_metadata(directory / GROUP))
        attributes = content["attributes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    ours = isinstance(attributes, dict) and attributes.get("format") == schema.FORMAT
    return attributes if ours and attributes.get("kind") == "capture" else {}


def read_metadata(path: Path) -> bytes:
    """A `zarr.json`; OSError if it is not there, is no plain file of this place, or is larger than any of ours."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_METADATA_BYTES:
            raise OSError(errno.EINVAL, "not the metadata of a capture", str(path))
        return file.read()


def step_spans(directory: Path) -> bytes:
    """Step span IDs of a capture as they are stored: 8 bytes each, little-endian, 0 where a record was lost.

    Empty for a capture that is not closed: the array is written at the end.
    """
    path = directory / "span_id" / "c.0"
    try:
        return path.read_bytes() if is_plain(path) and is_plain(path.parent) else b""
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return b""


def is_plain(path: Path) -> bool:
    """True for a file or directory that is there itself: no symbolic link, pipe or device, which may have no end."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory; files that go away meanwhile count nothing."""
    return sum(entry.st_size for entry in _files(directory))


def tree_changed_ns(directory: Path) -> int:
    """When a file below the directory last changed (ns since the epoch); 0 if there is none."""
    return max((entry.st_mtime_ns for entry in _files(directory)), default=0)


def _files(directory: Path) -> Iterator[os.stat_result]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(Path(entry.path))
                else:
                    yield entry.stat(follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return


def _directories(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
