"""Removing captures: which ones go, that nobody sees half of one, and that an interrupted prune can be finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exporters.synthetic import DECODE, NOTHING, Synthetic, attributes, engine, exporter
from tracer import prune as pruning
from tracer.cli import main
from tracer.errors import CaptureNotFoundError, SettingsError
from tracer.prune import TRASH, plan, prune
from tracer.quantities import parse_bytes, parse_seconds
from tracer.reader import find_captures, open_capture
from tracer.span_index import INDEX, known_captures
from tracer.store_files import stored_traces, tree_bytes

DAY_NS = 86_400 * 10**9
NOW = 20_000 * DAY_NS


def generation(number: int, trace: int | None = None) -> Synthetic:
    trace = number if trace is None else trace
    return Synthetic(3, 2, 8, 1, 1, DECODE, trace_id=f"{trace + 1:032x}", span_id=f"{number + 1:016x}")


def write(root: Path, made: Synthetic, days: float = 0) -> Path:
    """A closed capture that began `days` before NOW."""
    out = exporter(root)
    for record, payload in made.records():
        out.export(made.start(start_ns=NOW - int(days * DAY_NS)) if record == made.start() else record, payload)
    assert out.shutdown(1.0)
    return made.path(root)


def begin(root: Path, made: Synthetic) -> Any:
    """An exporter that has the capture open."""
    out = exporter(root)
    out.export(engine(1, 1), NOTHING)
    out.export(made.start(start_ns=NOW), NOTHING)
    out.export(*made.step(0))
    return out


def age(path: Path, days: float) -> None:
    """As if nothing below had changed since `days` before NOW."""
    moment = NOW - int(days * DAY_NS)
    for file in path.rglob("*"):
        os.utime(file, ns=(moment, moment))


def removed(root: Path, keep_days: float | None = None, max_bytes: int | None = None) -> list[str]:
    keep = None if keep_days is None else keep_days * 86_400
    return [item.path.name for item in prune(root, plan(root, keep, max_bytes, NOW).remove)]


def names(*numbers: int) -> list[str]:
    return [f"{number + 1:016x}" for number in numbers]


# -- which ones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False])
def test_what_is_older_goes_oldest_first(tmp_path: Path, indexed: bool) -> None:
    for number, days in enumerate((3, 9, 1, 8)):
        write(tmp_path, generation(number), days)
    if not indexed:
        (tmp_path / INDEX).unlink()
    assert removed(tmp_path, 7) == names(1, 3)
    assert {entry.span_id for entry in find_captures(tmp_path)} == set(names(0, 2))
    assert {name.span_id for name in known_captures(tmp_path)} == (set(names(0, 2)) if indexed else set())
    assert len(list(stored_traces(tmp_path))) == 2, "groups of empty traces go too"
    assert not (tmp_path / TRASH).exists()
    assert removed(tmp_path, 7) == []


def test_what_is_too_much_goes_oldest_first(tmp_path: Path) -> None:
    paths = [write(tmp_path, generation(number), days) for number, days in enumerate((3, 9, 1, 8))]
    sizes = [tree_bytes(path) for path in paths]
    assert removed(tmp_path, max_bytes=sum(sizes)) == []
    assert removed(tmp_path, max_bytes=sum(sizes) - 1) == names(1)
    assert removed(tmp_path, max_bytes=sizes[2]) == names(3, 0)
    assert removed(tmp_path, max_bytes=0) == names(2)
    assert {path.name for path in tmp_path.iterdir()} == {INDEX, "zarr.json"}


def test_both_limits_together(tmp_path: Path) -> None:
    paths = [write(tmp_path, generation(number), days) for number, days in enumerate((3, 9, 1, 8))]
    assert removed(tmp_path, 8.5, tree_bytes(paths[0]) + tree_bytes(paths[2])) == names(1, 3)


def test_a_capture_that_may_be_written_stays(tmp_path: Path) -> None:
    made = generation(0)
    out = begin(tmp_path, made)
    age(made.path(tmp_path), 0.9)
    chosen = plan(tmp_path, 0, 0, NOW)
    assert (chosen.remove, chosen.keep[0].live, chosen.kept > 0) == ([], True, True)
    out.export(*made.step(1))
    out.export(made.end(2), NOTHING)
    assert attributes(made.path(tmp_path))["complete"] is True
    assert removed(tmp_path, max_bytes=0) == names(0)
    assert out.shutdown(1.0)


def test_an_open_capture_without_a_writer_goes_after_a_day(tmp_path: Path) -> None:
    begin(tmp_path, generation(0))
    age(generation(0).path(tmp_path), 1.1)
    assert removed(tmp_path, max_bytes=0) == names(0)


def test_span_files_go_by_their_age_unless_somebody_writes_them(tmp_path: Path) -> None:
    folder = tmp_path / "spans"
    folder.mkdir()
    nobody = 2**22 + 1  # Above the kernel's highest process number.
    for name, days in ((f"old-{nobody}.jsonl", 9), (f"new-{nobody}.jsonl", 1), (f"mine-{os.getpid()}.jsonl", 9)):
        (folder / name).write_text("{}\n")
        age(folder, 0)
        os.utime(folder / name, ns=(NOW - days * DAY_NS,) * 2)
    os.utime(folder / f"old-{nobody}.jsonl", ns=(NOW - 9 * DAY_NS,) * 2)
    os.utime(folder / f"mine-{os.getpid()}.jsonl", ns=(NOW - 9 * DAY_NS,) * 2)
    assert removed(tmp_path, max_bytes=0) == []
    assert removed(tmp_path, 7) == [f"old-{nobody}.jsonl"]


def test_what_is_no_capture_stays(tmp_path: Path) -> None:
    write(tmp_path, generation(0), 9)
    foreign = tmp_path / ("f" * 32) / ("f" * 16)
    foreign.mkdir(parents=True)
    (foreign / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {"kind": "capture"}}')
    (tmp_path / "notes").mkdir()
    assert removed(tmp_path, max_bytes=0) == names(0)
    assert foreign.exists()
    assert (tmp_path / "notes").exists()


# -- readers and writers meanwhile ---------------------------------------------------------------------------------


def test_a_reader_that_has_it_open_gets_an_error_not_fill_values(tmp_path: Path) -> None:
    write(tmp_path, generation(0))
    opened, untouched = open_capture(tmp_path, names(0)[0]), open_capture(tmp_path, names(0)[0])
    logits, data = opened.logits, opened.to_xarray()
    assert removed(tmp_path, max_bytes=0) == names(0)
    for read in (
        logits.to_numpy,
        data["attention"].compute,
        lambda: opened.row(step=0, layer=0, head=0),
        lambda: opened.tokens,
        lambda: untouched.tokens,
        lambda: untouched.logits,
    ):
        with pytest.raises(CaptureNotFoundError, match="removed or moved after it had been opened"):
            read()
    with pytest.raises(CaptureNotFoundError, match="it holds none"):
        open_capture(tmp_path, names(0)[0])


def test_readers_see_all_or_nothing(tmp_path: Path) -> None:
    made = [generation(number) for number in range(12)]
    for one in made:
        write(tmp_path, one, 9)
    outcomes: list[str] = []

    def read() -> None:
        for one in made:
            try:
                row = open_capture(tmp_path, one.span_id).logits.to_numpy()
            except CaptureNotFoundError:
                outcomes.append("gone")
            else:
                outcomes.append("whole" if np.array_equal(row, one.logits) else "damaged")

    reader = threading.Thread(target=read)
    reader.start()
    removed(tmp_path, 7)
    reader.join()
    assert len(outcomes) == 12
    assert set(outcomes) <= {"gone", "whole"}


def test_a_writer_that_adds_to_a_trace_while_it_is_emptied(tmp_path: Path) -> None:
    """Each time one process makes the group of a trace and a capture in it, the other removes groups that are empty."""
    stop = threading.Event()
    done: list[int] = []

    def sweep() -> None:
        while not stop.is_set():
            done.append(len(prune(tmp_path, plan(tmp_path, 7, None, NOW).remove)))

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for number in range(60):
            made = generation(number, trace=0)
            write(tmp_path, made, 9 if number % 2 else 0)  # `shutdown` says that the capture was opened and closed.
    finally:
        stop.set()
        sweeper.join()
    prune(tmp_path, plan(tmp_path, 7, None, NOW).remove)
    assert {entry.span_id for entry in find_captures(tmp_path)} == set(names(*range(0, 60, 2)))
    assert attributes(tmp_path / f"{1:032x}")["kind"] == "trace"


def test_a_kill_leaves_trash_that_the_next_prune_removes(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, generation(number), 9)
    code = (
        "import os, shutil, sys; from pathlib import Path; from tracer import prune\n"
        "shutil.rmtree = lambda path, **_: os.kill(os.getpid(), 9) if path.name != '.trash' else None\n"
        "prune.prune(Path(sys.argv[1]), prune.plan(Path(sys.argv[1]), 0, None).remove)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(list((tmp_path / TRASH).iterdir())) == 1
    assert len(find_captures(tmp_path)) == 2
    assert len(known_captures(tmp_path)) == 3
    assert removed(tmp_path, 100) == []
    assert not (tmp_path / TRASH).exists()
    assert len(known_captures(tmp_path)) == 2
    assert len(list(stored_traces(tmp_path))) == 2


def test_two_prunes_at_once(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path, generation(number), 9)
    chosen = plan(tmp_path, 7, None, NOW).remove
    counts: list[int] = []
    threads = [threading.Thread(target=lambda: counts.append(len(prune(tmp_path, chosen)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 10
    assert {path.name for path in tmp_path.iterdir()} == {INDEX, "zarr.json"}


def test_a_trace_that_lost_its_group_gets_it_back(tmp_path: Path) -> None:
    path = write(tmp_path, generation(0))
    (path.parent / "zarr.json").unlink()
    removed(tmp_path, 7)
    assert attributes(path.parent) == {
        "format": "tensorspan-capture", "version": 1, "kind": "trace", "trace_id": path.parent.name,
    }  # fmt: skip
    assert (path.parent / "zarr.json").stat().st_mode & 0o777 == 0o600


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2_700), ("12h", 43_200), ("7d", 604_800), ("2w", 1_209_600)]
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("5k", 5_000), ("5K", 5_000), ("500M", 500_000_000), ("1.5GB", 1500_000_000)]
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "7", "d", "7 days", "-1d", "7y", "1e3s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(SettingsError, match="is not a duration: a number with s, m, h, d or w, such as 7d"):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["", "G", "50GiB", "-1", "1e3", "5m"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SettingsError, match="is not a size: a number with k, M, G or T"):
        parse_bytes(text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, generation(0), 9)
    size = tree_bytes(path)
    assert main(["prune", str(tmp_path), "--keep", "7d", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}  {size} bytes\n1 would be removed, ")
    assert path.exists()
    assert main(["prune", str(tmp_path), "--max-bytes", "1k", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "store": str(tmp_path), "dry_run": False, "bytes_freed": size, "bytes_kept": 0,
        "removed": [{"path": str(path), "bytes": size}],
    }  # fmt: skip
    for arguments, code, text in (
        ([tmp_path], 2, "prune what?"),
        ([tmp_path, "--keep", "7"], 2, "'7' is not a duration"),
        ([tmp_path, "--max-bytes", "much"], 2, "'much' is not a size"),
        (["s3://bucket/store", "--keep", "7d"], 1, "s3://bucket/store is a URL"),
        ([tmp_path / "nowhere", "--keep", "7d"], 1, "no store at"),
    ):
        assert main(["prune", *map(str, arguments)]) == code
        assert text in capsys.readouterr().err


def test_the_command_needs_no_zarr() -> None:
    code = "import sys, tracer.prune, tracer.span_index; print(*(n for n in ('numpy', 'zarr') if n in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_now_is_now(tmp_path: Path) -> None:
    made, out = generation(0), exporter(tmp_path)
    for record, payload in made.records():
        out.export(made.start(start_ns=time.time_ns()) if record == made.start() else record, payload)
    assert out.shutdown(1.0)
    assert plan(tmp_path, pruning.OPEN_SECONDS, None).remove == []
