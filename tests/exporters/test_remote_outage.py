"""A bucket that is away, slow, full or refuses: what is kept, counted and said, against a real S3 server."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporters import remote_store
from exporters.zarr_writer import ZarrExporter
from tests.exporters.buckets import SECONDS, Export, export
from tests.exporters.seaweed import Seaweed
from tests.exporters.synthetic import DECODE, Synthetic
from tests.exporters.test_zarr_writer import check
from tracer import find_captures, open_capture
from tracer.config import Settings, spool_directory
from tracer.errors import CaptureNotFoundError, StoreError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look and try again ten times as often."""
    monkeypatch.setattr(remote_store, "RETRY_SECONDS", (0.1, 0.5))
    monkeypatch.setattr(remote_store, "MEASURE_SECONDS", 0.1)
    monkeypatch.setattr(remote_store, "LOOK_SECONDS", 0.5)


def until(what: Callable[[], Any], seconds: float = SECONDS) -> None:
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        pause.wait(0.02)


def many(count: int, **kinds: Any) -> list[Synthetic]:
    return [Synthetic(span_id=f"{number + 1:016x}", seed=number, **kinds) for number in range(count)]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tensorspan.remote"]


def test_a_bucket_that_goes_away_and_comes_back_loses_nothing(
    exporter: Export, seaweed: Seaweed, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before, *during = many(5, steps=3)
    out = exporter()
    export(out, before)
    assert out.force_flush(SECONDS)
    seaweed.kill()
    try:
        for generation in during:
            began = time.perf_counter()
            export(out, generation)
            assert time.perf_counter() - began < 1, "writing waited for the bucket"
        assert not out.force_flush(0.2)
        until(lambda: out.remote and out.remote.problem)
        assert out.pending() == {generation.span_id for generation in during}
        with pytest.raises(StoreError, match="AWS_ENDPOINT_URL"):
            open_capture(bucket, before.span_id)
    finally:
        seaweed.start()
    assert out.force_flush(SECONDS)
    assert (out.lost, out.problem, out.pending()) == ({}, None, frozenset())
    for generation in (before, *during):
        data = open_capture(bucket, generation.span_id).to_xarray()
        check(generation, lambda name, data=data: data[name].to_numpy())
    away, back = said(caplog)
    assert f"{bucket} does not take captures" in away
    assert "captures wait in" in away
    assert f"{bucket} takes captures again" in back


def test_a_full_spool_refuses_says_so_and_recovers(
    exporter: Export, seaweed: Seaweed, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third, fourth = many(4, steps=40, vocab=20_000, spec=DECODE)  # 1.6 MB of logits each
    out = exporter(spool_mb=3, codec="none")
    seaweed.kill()
    try:
        for generation in (first, second, third):
            export(out, generation)
        assert out.lost == {"SpoolFullError": 2}, "the second was cut, the third refused"
        assert out.problem is not None
        for text in ("is full", "of 3 MB wait for the bucket", "TENSORSPAN_SPOOL_MB", third.span_id):
            assert text in out.problem
        spool = spool_directory(out._settings)
        assert sum(path.stat().st_size for path in spool.rglob("*") if path.is_file()) < 4_000_000
        assert out.remote is not None
        until(lambda: out.remote and out.remote.problem)
    finally:
        seaweed.start()
    assert out.force_flush(SECONDS)
    export(out, fourth)
    assert out.force_flush(SECONDS)
    assert out.problem is None
    assert open_capture(bucket, first.span_id).complete
    assert open_capture(bucket, fourth.span_id).complete
    cut = open_capture(bucket, second.span_id)
    assert not cut.complete
    assert {entry["array"] for entry in cut.missing} >= {"logits", "attention"}
    assert {entry["reason"] for entry in cut.missing} == {f"the spool of {bucket} is full"}
    assert "span_id" in cut.arrays, "numbers need no room"
    assert cut.num_steps == 40
    with pytest.raises(CaptureNotFoundError):
        open_capture(bucket, third.span_id)


def test_wrong_credentials_are_said_and_cost_only_room(
    exporter: Export, seaweed: Seaweed, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    generation, out = Synthetic(), exporter()
    export(out, generation)
    until(lambda: said(caplog))
    assert out.lost == {}
    (line,) = said(caplog)
    assert "SignatureDoesNotMatch" in line
    assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in line
    assert "1 captures wait in" in line
    with pytest.raises(StoreError, match=r"SignatureDoesNotMatch.*AWS_SECRET_ACCESS_KEY"):
        find_captures(bucket)
    assert not out.shutdown(0.1)
    assert "1 captures are not in" in said(caplog)[-1]
    monkeypatch.undo()
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    again = ZarrExporter(out._settings)
    until(lambda: again.remote and again.remote.uploaded)
    assert open_capture(bucket, generation.span_id).complete
    assert again.shutdown(1.0)


KILLED = """
import os, signal, sys
from exporters.zarr_writer import ZarrExporter
from tests.exporters.synthetic import DECODE, NOTHING, Synthetic, engine
from tracer.config import Settings

out = ZarrExporter(Settings(store=sys.argv[1], spool=sys.argv[2]))
for number in range(3):
    for record, payload in Synthetic(span_id=f"{number + 1:016x}", seed=number).records():
        out.export(record, payload)
half = Synthetic(span_id="f" * 16, spec=DECODE)
out.export(half.start(), NOTHING)
out.export(*half.step(0))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_exporter_left_goes_up_at_the_next_start(
    exporter: Export, seaweed: Seaweed, bucket: str, tmp_path: Path
) -> None:
    seaweed.kill()
    try:
        run = subprocess.run(
            [sys.executable, "-c", KILLED, bucket, str(tmp_path / "spool")], cwd=Path.cwd(), check=False
        )
        assert run.returncode == -signal.SIGKILL
    finally:
        seaweed.start()
    settings = Settings(store=bucket, spool=str(tmp_path / "spool"))
    two = [exporter(), exporter()]
    assert [out.force_flush(SECONDS) for out in two] == [True, True]
    until(lambda: sum(out.remote.uploaded for out in two if out.remote) == 4)
    for generation in many(3):
        found = open_capture(bucket, generation.span_id)
        assert found.complete
        check(generation, lambda name, found=found: found.to_xarray()[name].to_numpy())
    left = [path.name for path in spool_directory(settings).glob("*/*") if path.is_dir()]
    assert left == []
    cut = open_capture(bucket, "f" * 16)
    assert (cut.attrs["status"], cut.complete, cut.num_steps) == ("interrupted", False, 1)
    assert len(find_captures(bucket)) == 4


def test_a_reader_never_sees_half_a_capture(exporter: Export, bucket: str) -> None:
    generations = many(12, steps=70, prompt=300)
    out = exporter()
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set() or len(seen) < len(generations):
            for entry in find_captures(bucket):
                if entry.span_id not in seen:
                    generation = generations[int(entry.span_id, 16) - 1]
                    data = open_capture(bucket, entry.span_id).to_xarray()
                    check(generation, lambda name, data=data: data[name].to_numpy())
                    seen.add(entry.span_id)

    watcher = threading.Thread(target=watch)
    watcher.start()
    export(out, *generations)
    assert out.force_flush(SECONDS)
    done.set()
    watcher.join(SECONDS)
    assert len(seen) == 12


def test_captures_of_one_trace_may_come_and_go_while_others_begin(exporter: Export, bucket: str) -> None:
    """The trace's directory is removed with its last capture and made again for the next."""
    generations = many(40, steps=1)
    writers = [exporter(), exporter()]
    for number, generation in enumerate(generations):
        export(writers[number % 2], generation)
    assert all(out.force_flush(SECONDS) for out in writers)
    assert [out.lost for out in writers] == [{}, {}]
    assert len(find_captures(bucket)) == 40


def test_a_capture_whose_files_are_gone_does_not_stop_the_others(
    exporter: Export, seaweed: Seaweed, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = many(2)
    seaweed.kill()
    out = exporter()
    try:
        export(out, broken, whole)
        (broken.path(spool_directory(out._settings)).parent / "zarr.json").rename(
            spool_directory(out._settings) / "elsewhere"
        )
    finally:
        seaweed.start()
    until(lambda: "cannot be read and stays where it is" in caplog.text)
    other = replace(whole, trace_id="d" * 32, span_id="d" * 16)
    export(out, other)
    assert out.force_flush(SECONDS)
    assert open_capture(bucket, other.span_id).complete
