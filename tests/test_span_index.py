"""The index of span IDs: what it finds, who may write it, and what happens when it is not what it should be."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exporters.synthetic import DECODE, NOTHING, Synthetic, engine, exporter, write
from tracer import span_index, span_runs
from tracer.cli import main
from tracer.errors import CaptureNotFoundError
from tracer.reader import open_capture
from tracer.span_index import INDEX, SpanIndex, find_span, known_captures, rebuild, stored_bytes
from tracer.store_files import CaptureName, tree_bytes

SPEC = DECODE
WRITER = """
import sys
from pathlib import Path
from tests.test_span_index import Distinct
from tests.exporters.synthetic import write
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    write(Path(sys.argv[1]), Distinct.numbered(number))
"""


class Distinct(Synthetic):
    """Captures whose step span IDs differ."""

    number = 0

    @classmethod
    def numbered(cls, number: int, steps: int = 3) -> Distinct:
        made = cls(steps, 2, 8, 1, 1, SPEC, trace_id=f"{number // 2 + 1:032x}", span_id=f"{0xA000 + number:016x}")
        made.number = number
        return made

    def step_span(self, step: int) -> str:
        return f"{(self.number + 1) << 32 | step + 1:016x}"


@pytest.fixture(autouse=True)
def _silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test hears what is said once per process."""
    monkeypatch.setattr(span_index, "_SAID", set())


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.reader._search", lambda *_, **__: pytest.fail("the index did not know it"))


def fill(root: Path, count: int) -> list[Distinct]:
    generations = [Distinct.numbered(number) for number in range(count)]
    for generation in generations:
        write(root, generation)
    return generations


def content(root: Path) -> tuple[Any, Any]:
    """(captures, step → captures) of an index, without its internal numbers."""
    with sqlite3.connect(root / INDEX) as db:
        rows = db.execute("SELECT id, span, trace, start_ns, bytes, steps FROM capture").fetchall()
        names = {row[0]: row[1:3] for row in rows}
        steps = set()
        for (data,) in db.execute("SELECT data FROM block"):
            count = len(data) // 12
            pairs = zip(np.frombuffer(data, "<u8", count), np.frombuffer(data, "<u4", count, 8 * count), strict=True)
            steps |= {(int(step), names[int(capture)]) for step, capture in pairs}
    db.close()
    return sorted(row[1:] for row in rows), steps


# -- finding -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_search")
def test_generations_and_steps_are_found_without_a_search(tmp_path: Path) -> None:
    for generation in fill(tmp_path, 40):  # Past the first merges.
        name = CaptureName(generation.trace_id, generation.span_id)
        assert find_span(tmp_path, generation.span_id) == [name]
        assert open_capture(tmp_path, generation.span_id).span_id == generation.span_id
        for step in range(3):
            assert find_span(tmp_path, generation.step_span(step)) == [name]
            opened = open_capture(tmp_path, generation.step_span(step))
            assert (opened.span_id, opened.step_index) == (generation.span_id, step)
    assert (tmp_path / INDEX).stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("no_search")
def test_a_capture_that_is_being_written_is_found_by_its_generation(tmp_path: Path) -> None:
    generation, out = Distinct.numbered(0), exporter(tmp_path)
    out.export(engine(1, 1), NOTHING)
    out.export(generation.start(), NOTHING)
    assert not open_capture(tmp_path, generation.span_id).closed
    assert known_captures(tmp_path) == {}
    out.export(*generation.step(0))
    assert out.shutdown(1.0)
    assert open_capture(tmp_path, generation.step_span(0)).attrs["status"] == "interrupted"


def test_surplus_and_lost_steps_are_not_indexed(tmp_path: Path) -> None:
    generation, out = Distinct.numbered(0, steps=5), exporter(tmp_path)
    for record, payload in generation.records():
        if getattr(record, "step", None) != 1:
            out.export(generation.end(3) if record == generation.end() else record, payload)
    found = [bool(find_span(tmp_path, generation.step_span(step))) for step in range(5)]
    assert found == [True, False, True, False, False]
    assert find_span(tmp_path, "0" * 16) == []


def test_a_failed_capture_is_found_by_its_generation(tmp_path: Path) -> None:
    generation, out = Distinct.numbered(0), exporter(tmp_path)
    for record, payload in generation.records():
        out.export(generation.end(output_token_ids=(2**40,)) if record == generation.end() else record, payload)
    assert out.lost == {"OverflowError": 1}
    assert open_capture(tmp_path, generation.span_id).attrs["status"] == "failed"
    assert out.shutdown(1.0), "what has come is closed at the next occasion"
    assert len(known_captures(tmp_path)) == 1


def test_the_same_step_span_in_two_captures_opens_the_first(tmp_path: Path) -> None:
    for span in ("b" * 16, "a" * 16):
        write(tmp_path, Synthetic(span_id=span, spec=SPEC))
    assert open_capture(tmp_path, "f000000000000002").span_id == "a" * 16


@pytest.mark.usefixtures("no_search")
def test_a_long_capture_fills_many_blocks(tmp_path: Path) -> None:
    directory = tmp_path / ("1" * 32) / ("2" * 16)
    (directory / "span_id").mkdir(parents=True)
    spans = np.random.default_rng(3).integers(1, 2**64 - 1, 5_000, np.uint64)
    spans[100:4_000] = np.arange(1, 3_901)  # IDs that are not random are spread too.
    (directory / "span_id" / "c.0").write_bytes(spans.tobytes())
    index = SpanIndex(tmp_path)
    index.begin(directory.parent.name, directory.name, 5)
    index.close(directory.parent.name, directory.name)
    index.stop()
    for step in (0, 100, 2_000, 4_999):
        assert find_span(tmp_path, f"{int(spans[step]):016x}") == [CaptureName("1" * 32, "2" * 16)]
    with sqlite3.connect(tmp_path / INDEX) as db:
        sizes = [len(data) // 12 for (data,) in db.execute("SELECT data FROM block")]
    db.close()
    assert len(sizes) == 32
    assert max(sizes) < 2 * span_runs.BLOCK_ENTRIES


def test_runs_that_would_be_too_large_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_runs, "MERGE_ENTRIES", 40)
    for generation in fill(tmp_path, 40):
        assert find_span(tmp_path, generation.step_span(2))
    with sqlite3.connect(tmp_path / INDEX) as db:
        levels = [level for (level,) in db.execute("SELECT level FROM run")]
    db.close()
    assert (levels.count(0), levels.count(span_runs.TOP)) == (8, 32)


# -- an index that is not what it should be ------------------------------------------------------------------------


def damage(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


def cut(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    os.truncate(path, 5000)


def other_version(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [damage, cut, other_version, directory, Path.unlink])
def test_without_a_usable_index_the_store_is_searched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any
) -> None:
    generations = fill(tmp_path, 3)
    spoil(tmp_path / INDEX)
    with caplog.at_level(logging.WARNING):
        for generation in generations:
            assert open_capture(tmp_path, generation.span_id).span_id == generation.span_id
            assert open_capture(tmp_path, generation.step_span(1)).step_index == 1
    assert len(caplog.records) == (spoil is not Path.unlink), "said once"
    assert stored_bytes(tmp_path) is None
    later = Distinct.numbered(9)
    assert write(tmp_path, later).exists(), "a capture does not mind"
    assert open_capture(tmp_path, later.step_span(0)).span_id == later.span_id
    if spoil is not directory:
        assert rebuild(tmp_path).captures == 4
        assert find_span(tmp_path, later.step_span(0))


def test_a_store_that_cannot_be_written_is_read_without_a_trace(tmp_path: Path) -> None:
    generation = fill(tmp_path, 1)[0]
    before = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / INDEX).chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        assert open_capture(tmp_path, generation.step_span(2)).step_index == 2
        assert find_span(tmp_path, generation.step_span(2))
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    finally:
        tmp_path.chmod(0o700)


def test_entries_of_captures_that_are_gone_or_moved_do_no_harm(tmp_path: Path) -> None:
    first, second, third = fill(tmp_path, 3)
    shutil.rmtree(first.path(tmp_path))
    moved = tmp_path / ("c" * 32) / second.span_id
    moved.parent.mkdir()
    second.path(tmp_path).rename(moved)
    with pytest.raises(CaptureNotFoundError, match="it holds 2"):
        open_capture(tmp_path, first.step_span(0))
    with pytest.raises(CaptureNotFoundError, match="it holds 2"):
        open_capture(tmp_path, first.span_id)
    assert open_capture(tmp_path, second.span_id).location == str(moved)
    assert open_capture(tmp_path, second.step_span(1)).location == str(moved)
    assert open_capture(tmp_path, third.step_span(1)).span_id == third.span_id


def test_a_locked_index_costs_nothing_and_is_completed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_index, "BUSY_SECONDS", 0.01)
    index = SpanIndex(tmp_path, patience_s=0.01)
    index.begin("1" * 32, "2" * 16, 5)
    other = sqlite3.connect(tmp_path / INDEX, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    index.begin("1" * 32, "3" * 16, 6)
    index.begin("1" * 32, "4" * 16, 7)
    other.execute("ROLLBACK")
    other.close()
    assert find_span(tmp_path, "3" * 16) == []
    index.stop()
    assert [find_span(tmp_path, digit * 16) != [] for digit in "234"] == [True] * 3


def test_an_index_that_was_replaced_is_opened_again(tmp_path: Path) -> None:
    index = SpanIndex(tmp_path)
    index.begin("1" * 32, "2" * 16, 5)
    for file in tmp_path.glob(f"{INDEX}*"):
        file.unlink()
    index.begin("1" * 32, "3" * 16, 6)
    index.stop()
    assert find_span(tmp_path, "3" * 16)


# -- several processes, killed processes ---------------------------------------------------------------------------


def test_several_writers_at_once(tmp_path: Path) -> None:
    def start(first: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(first), str(first + 25)])

    writers = [start(first) for first in (0, 25, 50)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    for number in range(75):
        generation = Distinct.numbered(number)
        for span in (generation.span_id, generation.step_span(0), generation.step_span(2)):
            assert find_span(tmp_path, span) == [CaptureName(generation.trace_id, generation.span_id)]


def test_made_anew_it_is_the_same(tmp_path: Path) -> None:
    generations = fill(tmp_path, 40)
    out = exporter(tmp_path)
    out.export(Distinct.numbered(50).start(), NOTHING)
    before = content(tmp_path)
    counts = rebuild(tmp_path)
    assert content(tmp_path) == before
    size = sum(tree_bytes(generation.path(tmp_path)) for generation in generations)
    assert counts == (41, 1, 120, size)
    assert stored_bytes(tmp_path) == size
    # The writer that has the file open goes on in it.
    out.export(Distinct.numbered(51).start(), NOTHING)
    assert find_span(tmp_path, Distinct.numbered(51).span_id)


def test_kill_inside_a_transaction_leaves_the_index_as_it_was(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    before = content(tmp_path)
    code = (
        "import os, sys; from pathlib import Path; from tracer import span_index\n"
        "db = span_index._open_to_write(Path(sys.argv[1]), 1.0)\n"
        "db.execute('PRAGMA cache_size = 1')\n"  # Pages go into the journal before the commit.
        "db.execute('BEGIN IMMEDIATE')\n"
        "span_index.add_run(db, 1, os.urandom(80_000))\n"
        "db.execute('DELETE FROM capture')\n"
        "print(os.path.getsize(sys.argv[1] + '-wal'), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / INDEX)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert int(writer.stdout.readline()) > 50_000
        writer.send_signal(signal.SIGKILL)
    assert content(tmp_path) == before
    later = Distinct.numbered(9)
    write(tmp_path, later)
    assert find_span(tmp_path, later.step_span(0))


# -- removal, command ----------------------------------------------------------------------------------------------


def test_removed_captures_leave_with_their_runs(tmp_path: Path) -> None:
    generations = fill(tmp_path, 40)
    index = SpanIndex(tmp_path)
    assert index.remove(CaptureName(g.trace_id, g.span_id) for g in generations[:20])
    assert find_span(tmp_path, generations[0].step_span(0)) == []
    assert find_span(tmp_path, generations[20].step_span(0))
    with sqlite3.connect(tmp_path / INDEX) as db:
        [(runs, first)] = db.execute("SELECT count(*), min(first) FROM run").fetchall()
    db.close()
    assert (runs, first) == (9, 17), "the run of captures 1 to 16 is gone, that of 17 to 32 waits for a merge"
    index.stop()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, 2)
    assert main(["index", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/{INDEX}: 2 captures (0 open), 6 steps\n"
    assert main(["index", str(tmp_path), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["captures"], counts["open"], counts["steps"]) == (2, 0, 6)
    assert main(["index", "s3://bucket/store"]) == 1
    assert "s3://bucket/store is a URL" in capsys.readouterr().err
    assert main(["index", str(tmp_path / "nowhere")]) == 1
    assert "no store at" in capsys.readouterr().err
