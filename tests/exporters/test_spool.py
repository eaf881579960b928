from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from exporters.spool import MB, Spool, SpoolFullError, files_of, is_closed
from tests.exporters.synthetic import DECODE, NOTHING, Synthetic, engine, exporter, write


def test_closed_captures_are_found_and_measured(tmp_path: Path) -> None:
    first, second = (write(tmp_path, Synthetic(span_id=f"{number:016x}")) for number in (1, 2))
    half, out = Synthetic(span_id="f" * 16, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(half.start(), NOTHING)
    spool = Spool(tmp_path, 100)
    assert set(spool.look()) == {first, second}
    assert not is_closed(half.path(tmp_path))
    captures = [path for path in tmp_path.glob("*/*/**/*") if path.is_file()]
    assert spool.used == sum(path.stat().st_size for path in captures), "not the groups, journals and the index"
    out.export(half.end(0), NOTHING)
    assert len(spool.look()) == 3


def test_room_is_booked_until_it_is_measured(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2)
    assert spool.has_room
    assert spool.admit(MB)
    assert not spool.has_room, "a megabyte is kept for what captures say about themselves"
    assert not spool.admit(MB)
    with pytest.raises(SpoolFullError, match=r"1 of 2 MB wait for the bucket.*TENSORSPAN_SPOOL_MB"):
        raise spool.full()
    spool.measure()
    assert spool.used == 0


def test_one_process_sends_a_capture(tmp_path: Path) -> None:
    path = write(tmp_path, Synthetic())
    one, other = Spool(tmp_path, 100), Spool(tmp_path, 100)
    with one.claimed(path) as ours:
        assert ours
        with other.claimed(path) as theirs:
            assert not theirs
        one.remove(path)
    with other.claimed(path) as gone:
        assert not gone
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "index.sqlite", "zarr.json"]


def test_a_trace_stays_while_it_holds_another_capture(tmp_path: Path) -> None:
    first, second = (write(tmp_path, Synthetic(span_id=f"{number:016x}")) for number in (1, 2))
    spool = Spool(tmp_path, 100)
    spool.remove(first)
    assert sorted(entry.name for entry in first.parent.iterdir()) == [second.name, "zarr.json"]


def test_what_a_killed_process_was_removing_is_removed(tmp_path: Path) -> None:
    path = write(tmp_path, Synthetic())
    path.rename(tmp_path / ".gone-1")
    assert Spool(tmp_path, 100).look() == []
    assert not (tmp_path / ".gone-1").exists()


def test_only_what_the_format_names_is_sent(tmp_path: Path) -> None:
    path = write(tmp_path, Synthetic(steps=70))
    data, metadata = files_of(path)
    assert {file.name for file in metadata} == {"zarr.json"}
    assert {*data, *metadata, path / "zarr.json"} == {file for file in path.rglob("*") if file.is_file()}
    for name in ("logits/c.9.0.part", "logits/c.9.0.part.idx", "journal", "logits/zarr.json.1.part"):
        (path / name).touch()
    (path / "empty").mkdir()
    assert files_of(path) == (data, metadata)


def test_a_spool_that_is_gone_is_empty(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", 100)
    assert spool.look() == []
    path = write(tmp_path / "spool", Synthetic())
    shutil.rmtree(path)
    with spool.claimed(path) as ours:
        assert not ours
