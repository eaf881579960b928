"""Captures that a writer left open, closed by what their journals say.

A process that was killed takes nothing along but what it had not acknowledged: rows are written before the journal
names them, and the journal before the queue lets go of the step. So a journal that nobody holds is replayed into a
capture as if its writer were still there: whole chunks get their index and their name, the small arrays are written,
and the group says what is missing and why. Everything can be done again if this process is killed too.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from exporters import journal
from exporters.journal import Journal, PromptEntry, StepEntry
from exporters.shards import PART
from exporters.zarr_arrays import METADATA
from exporters.zarr_capture import OpenCapture
from tracer.config import Settings
from tracer.records import EngineInfo, GenerationEnd, GenerationStart
from tracer.schema import ATTENTION_PREFILL, ArrayLayout

__all__ = ["KILLED", "is_blank", "recover"]

KILLED: Final = "the exporter process was killed"
BROKEN: Final = (ValueError, TypeError, OverflowError, KeyError, IndexError, AssertionError)
"""What a journal raises whose facts no capture can hold."""


@dataclass(slots=True)
class _Facts:
    """What stands at the head of a journal, and the end if the generation came to one."""

    settings: dict[str, Any] | None = None
    start: GenerationStart | None = None
    engine: EngineInfo | None = None
    end: GenerationEnd | None = None


class _Replayed(OpenCapture):
    """A capture whose writer is gone, put together again from its journal."""

    def take(self, kind: int, content: Any) -> None:
        """One record of the journal, in order."""
        if kind == journal.ARRAY:
            name, *shapes = content
            shape, chunk, shard = map(tuple, shapes)
            layout = self._layout(name, shape)
            assert layout is not None
            self._add_rows(replace(layout, chunk=chunk, shard=shard))
        elif kind in (journal.STEP, journal.PARTS):
            self._take_step(content)
        elif kind == journal.PROMPT:
            self._take_prompt(content)

    def _take_step(self, entry: StepEntry) -> None:
        self._take_drops(entry.drops)
        names = list(self._rows)
        for row in entry.rows:
            self._rows[names[row.array]].restore(entry.step, row.part, row.placed, row.overflow)
            self._ledger.stored(names[row.array], entry.step, (row.part,))
        if entry.numbers is not None:
            self._number(entry.step, entry.numbers)
            self._reach(entry.step, 0)

    def _take_prompt(self, entry: PromptEntry) -> None:
        self._take_drops(entry.drops)
        self._prefill = self._prefill or self._prompt_array()
        if self._prefill is not None:
            for block in entry.blocks:
                self._prefill.restore(block)

    def _take_drops(self, drops: Iterable[journal.Drop]) -> None:
        for name, step, cause in drops:
            self._ledger.drop(name, step, cause)

    def recover(self, end: GenerationEnd | None, status: str, reason: str) -> None:
        """Finish the files of what was replayed, then the capture: by `end` if the journal has it."""
        self._small.prompt()
        steps = self._steps if end is None else end.output_tokens
        for name, rows in list(self._rows.items()):
            if not rows.restored:
                del self._rows[name]  # It was begun, and no row of it counts.
            for step in rows.recover(steps):
                self._ledger.gone(name, step, "its file is gone")
        if self._prefill is not None:
            self._prefill.recover()
        for layout in self._layouts():
            self._small.axes(layout)
        if end is not None:
            self._close(end, end.status)
            return
        seen = self._prompt_seen()
        if seen is not None and not seen.all():
            self._ledger.drop(ATTENTION_PREFILL, None, reason)
        self.interrupted(time.time_ns(), status, reason)

    def _layouts(self) -> list[ArrayLayout]:
        prefill = [] if self._prefill is None else [self._prefill.layout]
        return [rows.layout for rows in self._rows.values()] + prefill


def recover(taken: Journal, directory: Path, settings: Settings, reason: str | None = None) -> bool:
    """Close the capture of a journal that this process has locked; False if there never was one.

    directory: the capture's; reason: why its writer gave up, if it is known; otherwise it was killed, or the group
    says. The caller removes the journal; until then all of it can be done again. Raises OSError as the file system
    does.
    """
    facts, rest = _read(taken)
    if not directory.is_dir():  # It was pruned, or removed by hand.
        return False
    if facts.settings is None or facts.start is None:
        _never_begun(directory)
        return False
    if _closed_status(directory) in (None, "failed"):
        chosen = replace(settings, **facts.settings)
        _close(taken, directory, chosen, facts, rest, reason or _stated(directory))
    for path in directory.rglob(f"*{PART}"):
        path.unlink(missing_ok=True)
    return True


def is_blank(directory: Path) -> bool:
    """True for a capture that was closed before anything of its generation came."""
    attributes = _attributes(directory)
    return attributes.get("status") == "interrupted" and attributes.get("output_tokens") == 0


def _closed_status(directory: Path) -> str | None:
    attributes = _attributes(directory)
    return str(attributes.get("status")) if attributes.get("closed") else None


def _attributes(directory: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((directory / METADATA).read_bytes())["attributes"])
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _stated(directory: Path) -> str | None:
    """Why a writer gave up, by its own words in the group."""
    attributes = _attributes(directory)
    return attributes["missing"][0]["reason"] if attributes.get("status") == "failed" else None


def _read(taken: Journal) -> tuple[_Facts, list[tuple[int, Any]]]:
    facts = _Facts()
    rest: list[tuple[int, Any]] = []
    for kind, content in journal.entries(taken.read()):
        match content:
            case EngineInfo():
                facts.engine = content
            case GenerationStart():
                facts.start = content
            case GenerationEnd():
                facts.end = content
            case _ if kind == journal.SETTINGS:
                facts.settings = content
            case _:
                rest.append((kind, content))
    return facts, rest


def _close(
    taken: Journal,
    directory: Path,
    settings: Settings,
    facts: _Facts,
    rest: Iterable[tuple[int, Any]],
    stated: str | None,
) -> None:
    assert facts.start is not None
    status, reason = ("interrupted", KILLED) if stated is None else ("failed", stated)
    # Values that no array can hold are what a writer may have given up on: without the end, the rows can be kept.
    for end in (facts.end, None) if facts.end is not None else (None,):
        capture = _Replayed(directory, facts.start, facts.engine, settings, taken)
        try:
            for kind, content in rest:
                capture.take(kind, content)
            capture.recover(end, status, reason)
        except BROKEN as error:
            capture.fail(f"{reason}; {error}")
        else:
            _keep_only(directory, capture.arrays())
            return


def _keep_only(directory: Path, names: Iterable[str]) -> None:
    """Remove arrays that were begun and hold nothing."""
    kept = set(names)
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name not in kept:
            shutil.rmtree(path)


def _never_begun(directory: Path) -> None:
    """Remove the empty directories of a capture whose first facts were never written."""
    with contextlib.suppress(OSError):
        directory.rmdir()
    if not (directory.parent / METADATA).exists():
        with contextlib.suppress(OSError):
            directory.parent.rmdir()
