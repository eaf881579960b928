"""The journal of a capture that is being written: what a new process needs to close it after `kill -9`.

One file per open capture, `<store>/.journal/<trace_id>-<span_id>`: a magic number, then records that are only ever
appended. The facts of the generation come first; then one record per step, written in one system call after the step's
rows, so that a record that is whole stands for rows that are whole. The writer holds a lock on the file for as long as
it lives: a journal that can be locked is a dead writer's. `docs/store-format.md` has the layout.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from exporters.shards import FILE_MODE, Placed, checksum
from exporters.zarr_facts import Numbers
from tracer import wire
from tracer.records import EngineInfo, GenerationEnd, GenerationStart
from tracer.schema import ArrayLayout

__all__ = [
    "ARRAY",
    "FOLDER",
    "PARTS",
    "PROMPT",
    "SETTINGS",
    "STEP",
    "Journal",
    "PromptBlock",
    "PromptEntry",
    "RowEntry",
    "StepEntry",
    "entries",
    "leftovers",
]

FOLDER: Final = ".journal"
MAGIC: Final = b"tsjrnl1\n"
FRAME: Final = struct.Struct("<I4sB")
"""Bytes of the content, crc32c of kind and content, kind."""
SETTINGS: Final = 1
ARRAY: Final = 2
STEP: Final = 3
PROMPT: Final = 4
PARTS: Final = 5
"""A step's record whose rows are parts of rows: what STEP has, with each row's part."""
RECORD: Final = 32
"""Plus the kind in `tracer.wire`: a record as it came."""
NUMBERS: Final = struct.Struct("<Q5q4dq")
"""The values of `STEP_NUMBERS`, in its order."""
STEP_HEAD: Final = struct.Struct("<qBB")
"""Step (-1: none), 1 if numbers follow, number of rows."""
MAX_ROWS: Final = 255
ROW: Final = struct.Struct("<BIQH")
"""Array, infinite values, offset, chunks; then their sizes."""
PART: Final = struct.Struct("<H")
"""Before a row of PARTS: which of the row's parts."""
BLOCK: Final = struct.Struct("<HIQQH")
"""Strip (layer slot, or a part of one), first query row, mask of rows, offset, chunks; then their sizes."""
COUNT: Final = struct.Struct("<I")
NAME: Final = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})")

Drop = tuple[str, int | None, str]


class RowEntry(NamedTuple):
    """One row of one array: which (by order of its ARRAY entry), how many infinite values, and where it lies."""

    array: int
    overflow: int
    placed: Placed
    part: int = 0
    """Which part of the row, where several ranks bring them."""


class StepEntry(NamedTuple):
    """What one step brought."""

    step: int
    numbers: Numbers | None
    rows: Sequence[RowEntry]
    drops: Sequence[Drop] = ()

    @property
    def kind(self) -> int:
        """STEP, or PARTS if it takes that to say where the rows belong."""
        return PARTS if any(row.part for row in self.rows) else STEP

    def pack(self) -> bytes:
        """Content of a record of that kind."""
        in_parts = self.kind == PARTS
        parts = [STEP_HEAD.pack(self.step, self.numbers is not None, len(self.rows))]
        if self.numbers is not None:
            parts.append(NUMBERS.pack(*self.numbers))
        for array, overflow, (offset, sizes), part in self.rows:
            if in_parts:
                parts.append(PART.pack(part))
            parts.append(struct.pack(f"<BIQH{len(sizes)}I", array, overflow, offset, len(sizes), *sizes))
        if self.drops:
            parts.append(json.dumps(self.drops).encode())
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes, kind: int = STEP) -> StepEntry:
        """The entry of a record of that kind."""
        step, has_numbers, count = STEP_HEAD.unpack_from(data)
        at, numbers, rows = STEP_HEAD.size, None, []
        if has_numbers:
            numbers = NUMBERS.unpack_from(data, at)
            at += NUMBERS.size
        for _ in range(count):
            part = 0
            if kind == PARTS:
                [part] = PART.unpack_from(data, at)
                at += PART.size
            array, overflow, offset, chunks = ROW.unpack_from(data, at)
            sizes = struct.unpack_from(f"<{chunks}I", data, at + ROW.size)
            at += ROW.size + 4 * chunks
            rows.append(RowEntry(array, overflow, Placed(offset, sizes), part))
        return cls(step, numbers, rows, _drops(data[at:]))


class PromptBlock(NamedTuple):
    """Rows of one strip's block of 64 query rows, in the chunks of its causal key blocks."""

    slot: int
    start: int
    mask: int
    """Bit *i*: row `start + i` is there."""
    placed: Placed


class PromptEntry(NamedTuple):
    """What one record brought of the prompt's own map."""

    blocks: Sequence[PromptBlock]
    drops: Sequence[Drop] = ()

    def pack(self) -> bytes:
        """Content of a PROMPT record."""
        parts = [COUNT.pack(len(self.blocks))]
        for slot, start, mask, (offset, sizes) in self.blocks:
            parts.append(struct.pack(f"<HIQQH{len(sizes)}I", slot, start, mask, offset, len(sizes), *sizes))
        if self.drops:
            parts.append(json.dumps(self.drops).encode())
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes) -> PromptEntry:
        """The entry of a PROMPT record."""
        (count,) = COUNT.unpack_from(data)
        at, blocks = COUNT.size, []
        for _ in range(count):
            slot, start, mask, offset, chunks = BLOCK.unpack_from(data, at)
            sizes = struct.unpack_from(f"<{chunks}I", data, at + BLOCK.size)
            at += BLOCK.size + 4 * chunks
            blocks.append(PromptBlock(slot, start, mask, Placed(offset, sizes)))
        return cls(blocks, _drops(data[at:]))


class Journal:
    """The journal file while this process holds its lock. Methods raise OSError as the file system does."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def create(cls, path: Path) -> Journal:
        """A new journal, locked; raises FileExistsError if there is one, of a living writer or a dead one."""
        while True:
            with contextlib.suppress(FileExistsError):
                path.parent.mkdir(0o700)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
            except FileNotFoundError:  # Another process removed the empty directory just now.
                continue
            if _locked(path, fd, without_locks=True):
                return cls(path, fd)

    @classmethod
    def take(cls, path: Path) -> Journal | None:
        """A dead writer's journal; None if the writer lives, or somebody else takes care of it."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        return cls(path, fd) if _locked(path, fd, without_locks=False) else None

    def begin(self, start: GenerationStart, engine: EngineInfo | None, settings: dict[str, Any]) -> None:
        """Write the facts of the generation."""
        first = [_frame(SETTINGS, json.dumps(settings).encode())]
        first += [_record(record) for record in (engine, start) if record is not None]
        self._write(b"".join([MAGIC, *first]))

    def array(self, name: str, shape: Sequence[int], layout: ArrayLayout) -> None:
        """An array begins with a row of that shape, in chunks and shards of those shapes."""
        self._write(_frame(ARRAY, json.dumps([name, shape, layout.chunk, layout.shard]).encode()))

    def step(self, entry: StepEntry) -> None:
        """The rows of a step are written: after this it counts."""
        rows = entry.rows
        more = [StepEntry(entry.step, None, rows[at : at + MAX_ROWS]) for at in range(MAX_ROWS, len(rows), MAX_ROWS)]
        self.steps([entry._replace(rows=rows[:MAX_ROWS]) if more else entry, *more])

    def steps(self, entries: Sequence[StepEntry]) -> None:
        """Like `step`, for several at once."""
        self._write(b"".join([_frame(entry.kind, entry.pack()) for entry in entries]))

    def prompt(self, entry: PromptEntry) -> None:
        """Blocks of the prompt's map are written."""
        self._write(_frame(PROMPT, entry.pack()))

    def end(self, end: GenerationEnd) -> None:
        """The generation has ended: what follows can be done again from here."""
        self._write(_record(end))

    def read(self) -> bytes:
        """The whole file."""
        return self.path.read_bytes()

    def release(self) -> None:
        """Leave the journal to whoever closes the capture later."""
        os.close(self._fd)
        self._fd = -1

    def remove(self) -> None:
        """The capture is closed, or was never begun: nobody needs the journal any more."""
        try:
            self.temporary.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        finally:
            self.release()
        with contextlib.suppress(OSError):  # Other captures are open.
            self.path.parent.rmdir()

    @property
    def temporary(self) -> Path:
        """A file name for metadata that several processes may write at once."""
        return self.path.with_name(f"{self.path.name}.tmp")

    def _write(self, data: bytes) -> None:
        written = os.write(self._fd, data)
        if written < len(data):  # The disk is full: what stands there now is no record.
            raise OSError(errno.ENOSPC, "only a part of a journal record could be written", str(self.path))


def _locked(path: Path, fd: int, *, without_locks: bool) -> bool:
    """Lock the file; False, with the descriptor closed, if another holds it or it is no longer the file at `path`.

    without_locks: the answer on a file system that knows no locks, where nobody can tell a dead writer's journal.
    """
    held = True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held = False
    except OSError:
        held = without_locks
    with contextlib.suppress(FileNotFoundError):
        if held and path.stat().st_ino == os.fstat(fd).st_ino:
            return True
    os.close(fd)
    return False


def _frame(kind: int, content: bytes) -> bytes:
    body = bytes([kind]) + content
    return FRAME.pack(len(content), checksum(body), kind) + content


def _record(record: EngineInfo | GenerationStart | GenerationEnd) -> bytes:
    kind, data = wire.encode(record)
    return _frame(RECORD + kind, data)


def entries(data: bytes) -> Iterator[tuple[int, Any]]:
    """(kind, content) of each whole record, up to the first that is torn.

    Content: of RECORD + kind the record, of STEP and PROMPT an entry, of the others what their JSON says.
    """
    at = len(MAGIC) if data.startswith(MAGIC) else len(data)
    while at + FRAME.size <= len(data):
        size, crc, kind = FRAME.unpack_from(data, at)
        body = data[at + FRAME.size - 1 : at + FRAME.size + size]
        if len(body) != size + 1 or checksum(body) != crc:
            return
        at += FRAME.size + size
        yield kind, _content(kind, body[1:])


def _content(kind: int, data: bytes) -> Any:
    if kind > RECORD:
        return wire.decode(kind - RECORD, data)
    if kind in (STEP, PARTS):
        return StepEntry.unpack(data, kind)
    return PromptEntry.unpack(data) if kind == PROMPT else json.loads(data)


def _drops(data: bytes) -> list[Drop]:
    return [(name, step, cause) for name, step, cause in json.loads(data)] if data else []


def leftovers(root: Path) -> list[tuple[Path, str, str]]:
    """(journal, trace ID, span ID) of each capture of a store that is open, by a living writer or a dead one."""
    try:
        paths = sorted((root / FOLDER).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    named = ((path, NAME.fullmatch(path.name)) for path in paths)
    return [(path, match[1], match[2]) for path, match in named if match is not None]
