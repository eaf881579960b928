"""Remove old captures from a store: whole ones, oldest first, never one that is being written.

A capture goes in one step: its directory is renamed into `<root>/.trash`, where no reader looks, and only then deleted.
So a reader finds all of it or none of it, and whatever an interrupted prune leaves is trash that the next one removes.
Nothing is ever removed through a symbolic link.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tracer.schema import group_metadata
from tracer.span_index import PATIENT_SECONDS, Known, SpanIndex, indexed_captures, known_captures
from tracer.store_files import (
    GROUP,
    CaptureName,
    group_attributes,
    stored_captures,
    stored_traces,
    tree_bytes,
    tree_changed_ns,
)

__all__ = ["TRASH", "Plan", "Stored", "plan", "prune"]

TRASH: Final = ".trash"
SECOND_NS: Final = 1_000_000_000
OPEN_SECONDS: Final = 86_400
"""An open capture (one that is not closed) of which no file has changed for so long has no writer any more."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One capture, or one file of spans, as pruning sees it."""

    path: Path
    start_ns: int
    """Start of the generation; for a file of spans, its last change."""
    bytes: int
    name: CaptureName | None = None
    """None for a file of spans."""
    live: bool = False
    """It may still be written to: it stays."""


@dataclass(slots=True)
class Plan:
    """What is to go, and what stays."""

    remove: list[Stored] = field(default_factory=list)
    """Oldest first."""
    keep: list[Stored] = field(default_factory=list)

    @property
    def freed(self) -> int:
        """Bytes that go."""
        return sum(item.bytes for item in self.remove)

    @property
    def kept(self) -> int:
        """Bytes that stay."""
        return sum(item.bytes for item in self.keep)


def plan(root: Path, keep_s: float | None, max_bytes: int | None, now_ns: int | None = None) -> Plan:
    """What of a store is older than `keep_s` or, oldest first, in excess of `max_bytes`; None means no limit.

    Captures count by the start of their generation, files of spans (which only `keep_s` concerns) by their last change.
    A capture that is not closed stays for a day after its last change.
    """
    now = time.time_ns() if now_ns is None else now_ns
    oldest = 0 if keep_s is None else now - int(keep_s * SECOND_NS)
    items = sorted((*_captures(root, now), *_span_files(root)), key=lambda item: (item.start_ns, str(item.path)))
    out = Plan()
    excess = 0 if max_bytes is None else sum(item.bytes for item in items) - max_bytes
    for item in items:
        too_old = item.start_ns < oldest
        too_much = excess > 0 and item.name is not None
        if (too_old or too_much) and not item.live:
            out.remove.append(item)
            excess -= item.bytes
        else:
            out.keep.append(item)
    return out


def prune(root: Path, items: Iterable[Stored]) -> list[Stored]:
    """Remove them, and what earlier calls left; returns those that were there. Raises OSError as the file system does.

    The index forgets these captures, and those that are gone for other reasons.
    """
    indexed = indexed_captures(
        root
    )  # Before the look at the directories: what is made meanwhile is not taken for gone.
    _empty_trash(root)
    removed = []
    for item in items:
        if item.name is None:
            item.path.unlink(missing_ok=True)
            removed.append(item)
        elif _discard(root, item.path):
            removed.append(item)
    for trace in stored_traces(root):
        _tidy(trace)
    gone = indexed.difference(stored_captures(root))
    if gone:
        index = SpanIndex(root, PATIENT_SECONDS)
        index.remove(gone)
        index.stop()
    _empty_trash(root)
    return removed


def _captures(root: Path, now_ns: int) -> list[Stored]:
    """Of closed captures the index knows enough: they do not change any more."""
    known = known_captures(root)
    found = (_capture(root, name, known.get(name), now_ns) for name in stored_captures(root))
    return [item for item in found if item is not None]


def _capture(root: Path, name: CaptureName, known: Known | None, now_ns: int) -> Stored | None:
    """None for what is no capture in our format, or not any more."""
    path = name.below(root)
    if known is not None:
        return Stored(path, known.start_ns, known.bytes, name)
    attributes = group_attributes(path)
    if not attributes:
        return None
    closed, start_ns = attributes.get("closed") is True, attributes.get("start_ns")
    changed_ns = now_ns if closed else tree_changed_ns(path)
    live = not closed and now_ns - changed_ns < OPEN_SECONDS * SECOND_NS
    # Of a damaged one the files say when it was.
    began_ns = start_ns if type(start_ns) is int else tree_changed_ns(path)
    return Stored(path, began_ns, tree_bytes(path), name, live)


def _span_files(root: Path) -> list[Stored]:
    """Files of spans; the name ends in the process that writes it, which may be quiet for long."""
    out: list[Stored] = []
    if (root / "spans").is_symlink():  # What it leads to is not the store's.
        return out
    for path in (root / "spans").glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            writer = path.stem.rpartition("-")[2]
            live = writer.isdecimal() and Path("/proc", writer).exists()
            out.append(Stored(path, facts.st_mtime_ns, facts.st_size, live=live))
    return out


def _discard(root: Path, capture: Path) -> bool:
    """Take a capture out of readers' sight, then delete it; False if it was gone."""
    trash = root / TRASH
    place = trash / f"{capture.parent.name}-{capture.name}-{os.getpid()}-{time.monotonic_ns()}"
    while capture.exists():
        trash.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # Another prune may have emptied and removed the trash.
            capture.rename(place)
            shutil.rmtree(place, ignore_errors=True)
            return True
    return False


def _empty_trash(root: Path) -> None:
    """Another prune may be doing the same. A link goes, what it leads to stays."""
    with contextlib.suppress(OSError):
        if (root / TRASH).is_symlink():
            (root / TRASH).unlink()
    shutil.rmtree(root / TRASH, ignore_errors=True)


def _tidy(trace: Path) -> None:
    """Remove a trace's group if no capture is in it.

    A writer may be adding one at this moment: then the directory is not empty and cannot be removed, and the group's
    metadata come back. A writer that finds the directory gone makes it again.
    """
    with contextlib.suppress(FileNotFoundError):  # Another prune was faster.
        group = trace / GROUP
        if {entry.name for entry in os.scandir(trace)} <= {GROUP}:
            group.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # Not empty any more.
                trace.rmdir()
                return
        if not group.exists():
            part = trace / f"{GROUP}.{os.getpid()}.part"
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                json.dump(group_metadata("trace", {"trace_id": trace.name}), file)
            part.replace(group)
