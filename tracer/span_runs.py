"""Step span IDs in the index: runs of blocks, merged by 16, one block read per run. See `tracer.span_index`."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.uint64]
    Captures = NDArray[np.uint32]

__all__ = ["add_run", "captures_of_step", "drop_dead_runs"]

FAN: Final = 16
"""Runs of one level that are merged into one of the next."""
TOP: Final = 3
"""Runs of this level stay: a merge stops the exporter for as long as it takes (0.1 s for half a million steps)."""
MERGE_ENTRIES: Final = 1 << 20
"""A merge that would become larger than this is left out."""
BLOCK_ENTRIES: Final = 256
"""Entries of a block on average: 3 kB, so that almost every block fits into one page of SQLite."""
BLOCK_BITS: Final = 24
"""`block.id` is the run's number, shifted by this, plus the block's number in the run."""
MIX: Final = 0x9E37_79B9_7F4A_7C15
"""Odd: multiplying by it modulo 2^64 spreads IDs that are not random over the blocks."""
MASK: Final = 2**64 - 1


def add_run(db: sqlite3.Connection, capture: int, spans: bytes) -> None:
    """Index one capture's step span IDs (8 bytes each, little-endian; 0 is none), inside the caller's transaction."""
    import numpy as np

    steps = np.frombuffer(spans, "<u8", len(spans) // 8)
    steps = steps[steps != 0]
    if len(steps):
        _write_run(db, 0, steps, np.full(len(steps), capture, "<u4"))
        for level in range(TOP):
            if not _merge(db, level):
                break


def captures_of_step(db: sqlite3.Connection, step: int) -> list[int]:
    """`capture.id` of captures that hold this step span ID."""
    mixed = step * MIX & MASK
    blocks = [
        run << BLOCK_BITS | (mixed >> (64 - bits) if bits else 0)
        for run, bits in db.execute("SELECT id, bits FROM run")
    ]
    found: set[int] = set()
    key = step.to_bytes(8, "little")
    for start in range(0, len(blocks), 500):
        part = blocks[start : start + 500]
        query = f"SELECT data FROM block WHERE id IN ({','.join('?' * len(part))})"  # noqa: S608 - question marks only
        for (data,) in db.execute(query, part):
            found.update(_matches(data, key))
    return sorted(found)


def drop_dead_runs(db: sqlite3.Connection) -> None:
    """Remove runs of which no capture is left; others lose their dead entries when they are merged."""
    query = "SELECT id FROM run WHERE NOT EXISTS (SELECT 1 FROM capture WHERE id BETWEEN first AND last)"
    _delete_runs(db, [number for (number,) in db.execute(query)])


def _matches(data: bytes, key: bytes) -> list[int]:
    """Captures at the places of `key`: a block is all IDs, 8 bytes each, then as many captures, 4 bytes each."""
    count = len(data) // 12
    found = []
    at = data.find(key, 0, 8 * count)
    while at >= 0:
        if at % 8 == 0:
            place = 8 * count + at // 2
            found.append(int.from_bytes(data[place : place + 4], "little"))
        at = data.find(key, at + 1, 8 * count)
    return found


def _merge(db: sqlite3.Connection, level: int) -> bool:
    """Make one run of the next level out of 16 of this one; False if there are not so many."""
    import numpy as np

    runs = db.execute("SELECT id, entries, first, last FROM run WHERE level = ? ORDER BY id", (level,)).fetchall()
    numbers = [run[0] for run in runs]
    if len(runs) < FAN:
        return False
    if sum(run[1] for run in runs) > MERGE_ENTRIES:
        db.executemany("UPDATE run SET level = ? WHERE id = ?", [(TOP, number) for number in numbers])
        return False
    blocks = [data for number in numbers for data in _blocks(db, number)]
    counts = [len(data) // 12 for data in blocks]
    steps = np.concatenate([np.frombuffer(b, "<u8", n) for b, n in zip(blocks, counts, strict=True)])
    captures = np.concatenate([np.frombuffer(b, "<u4", n, 8 * n) for b, n in zip(blocks, counts, strict=True)])
    first, last = min(run[2] for run in runs), max(run[3] for run in runs)
    alive = [row[0] for row in db.execute("SELECT id FROM capture WHERE id BETWEEN ? AND ?", (first, last))]
    keep = np.isin(captures, np.array(alive, "<u4"))
    _delete_runs(db, numbers)
    if keep.any():
        _write_run(db, level + 1, steps[keep], captures[keep])
    return True


def _write_run(db: sqlite3.Connection, level: int, steps: Numbers, captures: Captures) -> None:
    import numpy as np

    count = len(steps)
    bits = max(count - 1, 0).bit_length() - BLOCK_ENTRIES.bit_length() + 1
    bits = min(max(bits, 0), BLOCK_BITS)
    row = (level, bits, count, int(captures.min()), int(captures.max()))
    insert = "INSERT INTO run (level, bits, entries, first, last) VALUES (?, ?, ?, ?, ?)"
    number = db.execute(insert, row).lastrowid
    assert number is not None
    rows: list[tuple[int, bytes]] = []
    if bits == 0:
        rows.append((number << BLOCK_BITS, steps.tobytes() + captures.tobytes()))
    else:
        home = (steps * np.uint64(MIX)) >> np.uint64(64 - bits)
        order = np.argsort(home, kind="stable")
        steps, captures, home = steps[order], captures[order], home[order]
        edges = [0, *(np.flatnonzero(np.diff(home)) + 1).tolist(), count]
        for low, high in pairwise(edges):
            place = number << BLOCK_BITS | int(home[low])
            rows.append((place, steps[low:high].tobytes() + captures[low:high].tobytes()))
    db.executemany("INSERT INTO block VALUES (?, ?)", rows)


def _blocks(db: sqlite3.Connection, run: int) -> list[bytes]:
    bounds = run << BLOCK_BITS, (run + 1) << BLOCK_BITS
    return [data for (data,) in db.execute("SELECT data FROM block WHERE id >= ? AND id < ?", bounds)]


def _delete_runs(db: sqlite3.Connection, runs: Sequence[int]) -> None:
    for run in runs:
        bounds: tuple[Any, ...] = (run << BLOCK_BITS, (run + 1) << BLOCK_BITS)
        db.execute("DELETE FROM block WHERE id >= ? AND id < ?", bounds)
        db.execute("DELETE FROM run WHERE id = ?", (run,))
