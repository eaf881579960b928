"""The store's index: from a span ID alone to the capture that holds it, in `<root>/index.sqlite`.

It is a cache of what the captures say, never more: every answer is checked against the capture itself, and a store
whose index is missing, locked, damaged or of another version is searched instead. Nothing here may fail a capture.

Generations are rows of a table. Step span IDs are random, and 128 of them per capture would touch 128 pages of one
large B-tree; so they lie in *runs* that are only ever written whole: each closed capture adds a run, and 16 runs of
one level are merged into one run of the next. A run is cut into blocks by the upper bits of the hashed ID, so that a
look-up reads one block of each run: about 70 of them among 100,000 captures.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from tracer.span_runs import add_run, captures_of_step, drop_dead_runs
from tracer.store_files import CaptureName, group_attributes, step_spans, stored_captures, tree_bytes

__all__ = [
    "INDEX",
    "Counts",
    "Known",
    "SpanIndex",
    "find_span",
    "indexed_captures",
    "known_captures",
    "rebuild",
    "stored_bytes",
]

LOG: Final = logging.getLogger("tensorspan.index")
INDEX: Final = "index.sqlite"
VERSION: Final = 1
APPLICATION: Final = 0x7473_7069
"""SQLite's `application_id` of our file: `tspi`."""
BUSY_SECONDS: Final = 0.2
"""How long the exporter waits for another writer; it tries again with the next capture."""
STOP_SECONDS: Final = 1.0
"""How long it waits at its end, when there will be no next capture."""
PATIENT_SECONDS: Final = 60.0
"""How long a command waits."""
RETRY_SECONDS: Final = 5.0
"""How long the exporter leaves an index alone that it could not write."""
MAX_WAITING: Final = 10_000
"""Captures that the exporter keeps in mind while the index cannot be written."""
FAILURES: Final = (sqlite3.Error, OSError)
TABLES: Final = """
CREATE TABLE capture (
    id INTEGER PRIMARY KEY, span BLOB NOT NULL, trace BLOB NOT NULL,
    start_ns INTEGER NOT NULL, bytes INTEGER, steps INTEGER, UNIQUE (span, trace)
);
CREATE TABLE run (
    id INTEGER PRIMARY KEY, level INTEGER NOT NULL, bits INTEGER NOT NULL,
    entries INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL
);
CREATE TABLE block (id INTEGER PRIMARY KEY, data BLOB NOT NULL)
"""
"""`bytes` and `steps` are NULL while the capture is open; `tracer.span_runs` explains the other two."""

Answer = TypeVar("Answer")

_SAID: Final[set[str]] = set()
"""What this process has already said about indexes that it cannot use."""


class Counts(NamedTuple):
    """What an index holds."""

    captures: int
    open: int
    """Captures that are not closed: found by their generation span, not by steps."""
    steps: int
    bytes: int
    """Of closed captures."""


class Known(NamedTuple):
    """What the index says of one closed capture."""

    start_ns: int
    bytes: int


class _Entry(NamedTuple):
    name: CaptureName
    closed: bool
    start_ns: int | None = None
    """None: as the capture says."""


# -- writing -------------------------------------------------------------------------------------------------------


class SpanIndex:
    """Writes the index of one store; several processes may. Methods never raise: what fails is tried again later."""

    def __init__(self, root: Path, patience_s: float = BUSY_SECONDS) -> None:
        self._root = root
        self._patience_s = patience_s
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._waiting: dict[CaptureName, _Entry] = {}
        self._retry_at = 0.0

    def begin(self, trace_id: str, span_id: str, start_ns: int) -> None:
        """A capture has been made: its generation span leads to it from now on."""
        self._write(_Entry(CaptureName(trace_id, span_id), closed=False, start_ns=start_ns))

    def close(self, trace_id: str, span_id: str) -> None:
        """A capture is finished: read its step span IDs and its size, and index them."""
        self._write(_Entry(CaptureName(trace_id, span_id), closed=True))

    def remove(self, names: Iterable[CaptureName]) -> bool:
        """Forget captures that are gone; False if the index could not be written."""
        try:
            with _transaction(self._connection()) as db:
                for name in names:
                    db.execute("DELETE FROM capture WHERE span = ? AND trace = ?", _key(name))
                drop_dead_runs(db)
        except FAILURES as error:
            self._give_up(error)
            return False
        return True

    def stop(self) -> None:
        """Write what waits, if that is possible now, and close the file."""
        if self._waiting:
            self._disconnect()
            self._patience_s, self._retry_at = STOP_SECONDS, 0.0
            self._write()
        self._disconnect()

    def __del__(self) -> None:
        """Close the file of an exporter that nobody shut down."""
        self._disconnect()

    def _write(self, *entries: _Entry) -> None:
        self._waiting.update((entry.name, entry) for entry in entries)
        if time.monotonic() < self._retry_at:
            return
        try:
            with _transaction(self._connection()) as db:
                for entry in self._waiting.values():
                    _put(db, self._root, entry)
        except FAILURES as error:
            self._give_up(error)
        else:
            self._waiting.clear()

    def _connection(self) -> sqlite3.Connection:
        """The open database; opened again if somebody put another file in its place."""
        path = self._root / INDEX
        if self._db is not None and (not path.exists() or path.stat().st_ino != self._inode):
            self._disconnect()
        if self._db is None:
            self._db = _open_to_write(path, self._patience_s)
            self._inode = path.stat().st_ino
        return self._db

    def _give_up(self, error: Exception) -> None:
        """For now: the captures wait. An index that lacks some is complemented by a search."""
        self._disconnect()
        self._retry_at = time.monotonic() + RETRY_SECONDS
        for name in list(self._waiting)[:-MAX_WAITING]:
            del self._waiting[name]
        _say(self._root / INDEX, f"cannot be written: {error}")

    def _disconnect(self) -> None:
        if self._db is not None:
            with contextlib.suppress(*FAILURES):
                self._db.close()
            self._db = None


def rebuild(root: Path) -> Counts:
    """Make the index anew from the captures alone, in one transaction: readers see the old one or the new one.

    Not a new file put in the old one's place: processes that have the old file open would go on with its journal
    under the new file's name. A file that is damaged or none of ours is removed first, because it cannot be opened.
    Raises OSError or sqlite3.Error if the store cannot be written.
    """
    path = root / INDEX
    try:
        db = _open_to_write(path, PATIENT_SECONDS, anew=True)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # Locked or not writable: not damaged.
            raise
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        db = _open_to_write(path, PATIENT_SECONDS, anew=True)
    with contextlib.closing(db):
        with _transaction(db):
            for table in ("block", "run", "capture"):
                db.execute(f"DROP TABLE IF EXISTS {table}")
            _create(db)
            for name in stored_captures(root):
                attributes = group_attributes(name.below(root))
                if attributes:
                    _put(db, root, _Entry(name, bool(attributes["closed"]), int(attributes["start_ns"])))
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return _counts(db)


def _open_to_write(path: Path, patience_s: float, *, anew: bool = False) -> sqlite3.Connection:
    """The database, made if it is not there. sqlite3.DatabaseError if it is damaged or, unless `anew`, not ours."""
    # Made here because SQLite would use the umask; its journal takes the mode of the file.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(path, timeout=patience_s, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        # As with captures: nothing is synced on purpose. What a power loss damages is rebuilt.
        db.execute("PRAGMA synchronous = OFF")
        if not anew and not _is_ours(db):
            with _transaction(db):
                if not _is_ours(db):  # Another process may have been faster.
                    _refuse_foreign(db)
                    _create(db)
    except BaseException:
        db.close()
        raise
    return db


def _create(db: sqlite3.Connection) -> None:
    for statement in TABLES.split(";"):  # Not `executescript`: that would end the caller's transaction.
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION}")
    db.execute(f"PRAGMA user_version = {VERSION}")


def _is_ours(db: sqlite3.Connection) -> bool:
    return (_pragma(db, "application_id"), _pragma(db, "user_version")) == (APPLICATION, VERSION)


def _refuse_foreign(db: sqlite3.Connection) -> None:
    if _pragma(db, "schema_version"):
        raise sqlite3.DatabaseError(f"it has version {_pragma(db, 'user_version')}, this release has {VERSION}")


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing, holding the only write lock from the start: two writers never wait for each other inside."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _put(db: sqlite3.Connection, root: Path, entry: _Entry) -> None:
    """One capture as it is on disk now; a capture that is already in as closed stays as it is."""
    key = _key(entry.name)
    select = "SELECT id, steps FROM capture WHERE span = ? AND trace = ?"
    row = db.execute(select, key).fetchone()
    directory = entry.name.below(root)
    if row is None:
        start_ns = group_attributes(directory).get("start_ns") if entry.start_ns is None else entry.start_ns
        if start_ns is None:
            return  # Removed before it could be indexed.
        db.execute("INSERT INTO capture (span, trace, start_ns) VALUES (?, ?, ?)", (*key, start_ns))
        row = db.execute(select, key).fetchone()
    number, steps = row
    if entry.closed and steps is None:
        spans = step_spans(directory)
        values = (tree_bytes(directory), len(spans) // 8, number)
        db.execute("UPDATE capture SET bytes = ?, steps = ? WHERE id = ?", values)
        add_run(db, number, spans)


# -- reading -------------------------------------------------------------------------------------------------------


def find_span(root: str | os.PathLike[str], span_id: str) -> list[CaptureName]:
    """Captures of this generation, else captures with this step span; check them, for some may be gone.

    Empty if there are none or if there is no index that can be used.
    """

    def query(db: sqlite3.Connection) -> list[CaptureName]:
        generations = db.execute("SELECT span, trace FROM capture WHERE span = ?", (bytes.fromhex(span_id),)).fetchall()
        if generations:
            return sorted(map(_name, generations))
        numbers = captures_of_step(db, int(span_id, 16))
        marks = ",".join("?" * len(numbers))
        steps = db.execute(f"SELECT span, trace FROM capture WHERE id IN ({marks})", numbers).fetchall()  # noqa: S608
        return sorted(map(_name, steps))

    return _ask(Path(root), query) or []


def known_captures(root: str | os.PathLike[str]) -> dict[CaptureName, Known]:
    """The closed captures of the index; empty if there is none that can be used."""

    def query(db: sqlite3.Connection) -> dict[CaptureName, Known]:
        rows = db.execute("SELECT span, trace, start_ns, bytes FROM capture WHERE steps IS NOT NULL")
        return {_name((span, trace)): Known(start_ns, size) for span, trace, start_ns, size in rows}

    return _ask(Path(root), query) or {}


def indexed_captures(root: str | os.PathLike[str]) -> set[CaptureName]:
    """Every capture of the index, open ones too; empty if there is none that can be used."""

    def query(db: sqlite3.Connection) -> set[CaptureName]:
        return set(map(_name, db.execute("SELECT span, trace FROM capture")))

    return _ask(Path(root), query) or set()


def stored_bytes(root: str | os.PathLike[str]) -> int | None:
    """Bytes of all closed captures according to the index; None if there is none that can be used."""
    return _ask(Path(root), lambda db: _counts(db).bytes)


def _counts(db: sqlite3.Connection) -> Counts:
    query = "SELECT count(*), count(*) - count(steps), total(steps), total(bytes) FROM capture"
    return Counts(*map(int, db.execute(query).fetchone()))


def _ask(root: Path, query: Callable[[sqlite3.Connection], Answer]) -> Answer | None:
    """The answer of the index; None, and a word about it, if it cannot be used."""
    path = root / INDEX
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(_read_uri(path), timeout=BUSY_SECONDS, uri=True)) as db:
            if not _is_ours(db):
                _refuse_foreign(db)
                return None  # Empty: its first writer is just making it.
            return query(db)
    except FAILURES as error:
        _say(path, f"cannot be read: {error}")
        return None


def _read_uri(path: Path) -> str:
    """Open without a trace: if no journal is there, nobody writes, and SQLite must not make one to read."""
    journal = path.with_name(f"{path.name}-wal").exists()
    return f"{path.resolve().as_uri()}?mode=ro{'' if journal else '&immutable=1'}"


def _say(path: Path, what: str) -> None:
    if str(path) not in _SAID:
        _SAID.add(str(path))
        LOG.warning(
            "tensorspan: the index %s %s; captures are found by search, which is slower; `tensorspan index %s` "
            "makes it anew",
            path,
            what,
            path.parent,
        )


def _key(name: CaptureName) -> tuple[bytes, bytes]:
    return bytes.fromhex(name.span_id), bytes.fromhex(name.trace_id)


def _name(row: Sequence[bytes]) -> CaptureName:
    span, trace = row[:2]
    return CaptureName(trace.hex(), span.hex())
