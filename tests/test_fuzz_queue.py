"""Damaged queues, hellos and journals: the exporter process reads on, counts what it lost and says so."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporters import journal
from tests.exporters.synthetic import NOTHING, Synthetic, engine, exporter
from tracer import metric_names, wire
from tracer._guard import Guard
from tracer.config import Settings
from tracer.configure import ExporterProcess
from tracer.export import Channel
from tracer.reader import open_capture
from tracer.records import LogLine, Record
from tracer.ring import FRAME, HEADER_BYTES, Ring

FIXTURES = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 8192), st.integers(2**64 - 8192, 2**64 - 1))
RECORDS = [(record, bytes(payload)) for record, payload in Synthetic(steps=3).records()]


@given(
    st.integers(0, 12), st.one_of(st.binary(max_size=300), st.sampled_from(RECORDS).map(lambda r: wire.encode(r[0])[1]))
)
def test_any_bytes_are_a_record_or_unreadable(kind: int, data: bytes) -> None:
    with contextlib.suppress(*wire.UNREADABLE):
        wire.decode(kind, data)


@given(st.sampled_from(RECORDS), st.integers(0), st.binary(min_size=1, max_size=9))
def test_a_record_with_other_bytes_in_it_is_a_record_or_unreadable(record: Any, at: int, new: bytes) -> None:
    kind, data = wire.encode(record[0])
    where = at % len(data)
    for bad in (data[:where] + new + data[where + len(new) :], data[:where], data + new):
        with contextlib.suppress(*wire.UNREADABLE):
            wire.decode(kind, bad)


@settings(FIXTURES, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 511), WORDS), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=24)), max_size=6),
)
def test_a_ring_with_anything_in_it_is_read_to_its_end_and_goes_on(
    words: list[tuple[int, int]], spots: list[tuple[int, bytes]]
) -> None:
    ring = Ring.create(4096)
    for number in range(9):
        assert ring.write(1, bytes([number]) * 40, [memoryview(bytes(300))])
    for index, value in words:
        struct.pack_into("=Q", ring._map, index * 8 if index > 24 else (index % 4) * 64, value)
    for at, data in spots:
        ring._map[HEADER_BYTES + at : HEADER_BYTES + at + len(data)] = data
    seen = 0
    while ring.read() is not None:
        seen += 1
        ring.release()
    assert seen <= 4096 // FRAME.size, "no frame is shorter than its head"
    assert ring.used == 0
    ring.close()


@settings(max_examples=50)
@given(WORDS, WORDS)
def test_a_ring_whose_ends_were_overwritten_takes_frames_again(head: int, tail: int) -> None:
    ring = Ring.create(4096)
    struct.pack_into("=QQ", ring._map, 0, head // 64 * 64, 0)
    struct.pack_into("=Q", ring._map, 64, tail)
    while ring.read() is not None:
        ring.release()
    if ring.head < 2**64 - 8192:
        assert ring.write(1, b"later")
        frame = ring.read()
        assert frame is not None
        assert bytes(frame.meta) == b"later"


class Kept:
    """What an exporter gets."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def export(self, record: Record, payload: memoryview) -> None:
        self.records.append(record)

    def figures(self) -> Iterator[Any]:
        return iter(())

    def force_flush(self, timeout_s: float) -> bool:
        return True

    def pending(self) -> tuple[str, ...]:
        return ()

    def shutdown(self, timeout_s: float) -> bool:
        return True


@pytest.fixture
def lax(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in production: failures are counted, not raised."""
    monkeypatch.setattr(Guard, "strict", False)


def lost(process: ExporterProcess) -> float:
    return sum(figure.value for figure in process.figures() if figure.name == metric_names.RECORDS_LOST)


def line(text: str) -> LogLine:
    return LogLine(1, 20, "tensorspan", text, "", "", "", sampled=False)


def connected(tmp_path: Path) -> tuple[ExporterProcess, Channel, Kept]:
    kept = Kept()
    options = Settings(socket=str(tmp_path / "x.sock"))
    process = ExporterProcess(Path(options.socket), [kept])
    api = Channel(options, "api", 1 << 20)
    assert api.connect()
    process._meet()
    return process, api, kept


def finish(process: ExporterProcess, api: Channel) -> None:
    api.close()
    for client in list(process._clients):
        process._leave(client)
    process._finish()


def test_frames_that_are_no_records_are_counted_said_once_and_passed_over(
    tmp_path: Path, lax: None, caplog: pytest.LogCaptureFixture
) -> None:
    process, api, kept = connected(tmp_path)
    ring = next(iter(process._clients.values())).ring
    assert ring is not None
    for kind, data in ((99, b""), (2, b"\xc1"), (10, b"\x91" * 5000), (5, b"\x80")):
        assert ring.write(kind, data)
    assert api.send(line("after"))
    process._drain()
    assert [record.text for record in kept.records if isinstance(record, LogLine)] == ["after"]
    assert lost(process) == 4
    assert caplog.text.count("cannot be read and is lost") == 1
    finish(process, api)
    assert lost(process) == 4


def test_a_damaged_ring_is_emptied_counted_and_used_again(
    tmp_path: Path, lax: None, caplog: pytest.LogCaptureFixture
) -> None:
    process, api, kept = connected(tmp_path)
    ring = next(iter(process._clients.values())).ring
    assert ring is not None
    assert api.send(line("overwritten"))
    FRAME.pack_into(ring._data, 0, 10, 1 << 31, 1 << 40)
    process._drain()
    assert (kept.records, ring.used, lost(process)) == ([], 0, 1)
    assert "the queue of a api process was damaged: what was in it is lost" in caplog.text
    assert api.send(line("after"))
    process._drain()
    assert [record.text for record in kept.records if isinstance(record, LogLine)] == ["after"]
    finish(process, api)


@pytest.mark.parametrize(
    ("hello", "size"),
    [
        (b"{", 1 << 16),
        (b"[]\n", 1 << 16),
        (b"{}\n", 1 << 16),
        (b"[" * 5000 + b"\n", 1 << 16),
        (b'{"role": "worker", "cpus": 7}\n', 1 << 16),
        (b'{"role": "worker"}\n', 0),
        (b'{"role": "worker"}\n', 100),
    ],
)
def test_a_hello_that_means_nothing_costs_its_sender_alone(
    tmp_path: Path, hello: bytes, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    process, api, kept = connected(tmp_path)
    memory = os.memfd_create("x")
    os.ftruncate(memory, size)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(str(tmp_path / "x.sock"))
        socket.send_fds(stranger, [hello], [memory])
        process._meet()
        assert len(process._clients) == 1
    os.close(memory)
    assert "said hello in words that mean nothing" in caplog.text
    assert api.send(line("after"))
    process._drain()
    assert len(kept.records) == 1
    finish(process, api)


@settings(FIXTURES, max_examples=40, derandomize=True)
@given(st.sampled_from(RECORDS[1:]), st.integers(0), st.binary(min_size=1, max_size=9))
def test_a_damaged_record_never_ends_the_exporters(
    tmp_path_factory: pytest.TempPathFactory, lax: None, record: Any, at: int, new: bytes
) -> None:
    """Right types and wrong values get as far as the writer of captures."""
    out, guard = exporter(tmp_path_factory.mktemp("store")), Guard()
    kind, data = wire.encode(record[0])
    where = at % len(data)
    for each, payload in RECORDS:
        chosen: Record = each
        if each == record[0]:
            try:
                chosen = wire.decode(kind, data[:where] + new + data[where + len(new) :])
            except wire.UNREADABLE:
                continue
        with guard("writing"):
            out.export(chosen, memoryview(payload))
    with guard("closing"):
        out.shutdown(5.0)


# -- journals ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(store, journal) as a writer leaves them that is killed after two steps."""
    root = tmp_path_factory.mktemp("left")
    made, out = Synthetic(steps=3), exporter(root)
    out.export(engine(), NOTHING)
    out.export(made.start(), NOTHING)
    for step in range(2):
        out.export(*made.step(step))
    [(path, _, _)] = journal.leftovers(root)
    return root, path


@settings(FIXTURES, max_examples=100)
@given(st.integers(0), st.binary(max_size=9))
def test_a_damaged_journal_is_read_up_to_the_damage(left: tuple[Path, Path], at: int, new: bytes) -> None:
    data = left[1].read_bytes()
    where = at % len(data)
    whole = list(journal.entries(data))
    for bad in (data[:where], data[:where] + new + data[where + len(new) :], data[:where] + new + data[where:]):
        read = list(journal.entries(bad))
        assert read == whole[: len(read)] or bad[:where] != data[:where]


@settings(FIXTURES, max_examples=15, derandomize=True)
@given(st.integers(0), st.sampled_from(["cut", "flip", "remove"]), st.sampled_from(["journal", "part", "zarr.json"]))
def test_whatever_is_damaged_recovery_ends_and_what_it_closes_opens(
    tmp_path_factory: pytest.TempPathFactory, left: tuple[Path, Path], at: int, how: str, which: str
) -> None:
    import shutil

    root = tmp_path_factory.mktemp("copy") / "store"
    shutil.copytree(left[0], root, ignore=shutil.ignore_patterns("index.sqlite*"))
    path = root / journal.FOLDER / left[1].name
    files = [path] if which == "journal" else sorted(root.rglob(f"*{which}"))
    file = files[at % len(files)]
    data = file.read_bytes()
    where = at % max(len(data), 1)
    if how == "remove":
        file.unlink()
    else:
        rest = bytes([data[where] ^ 1]) + data[where + 1 :] if how == "flip" and data else b""
        file.write_bytes(data[:where] + rest)
    closed = exporter(root).recover()
    for directory in closed:
        content = json.loads((directory / "zarr.json").read_bytes())
        if content["attributes"]["closed"]:
            assert open_capture(directory).complete is False
