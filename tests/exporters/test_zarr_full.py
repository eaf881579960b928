"""Disks that are full, gone or read-only: counted, said, and over as soon as there is room again."""

from __future__ import annotations

import errno
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.journal import FOLDER
from tests.exporters.synthetic import DECODE, NOTHING, Synthetic, attributes, engine, exporter, opened

NEXT = "00000000000000bb"


def run(out: Any, generation: Synthetic) -> None:
    for record, payload in generation.records():
        out.export(record, payload)


def check_recovered(root: Path, out: Any, first: Synthetic, cause: str, at_least: int) -> None:
    """The first capture was lost at some step and kept up to it; the next is complete, in the same process."""
    assert out.lost == {cause: 1}
    assert out.problem is not None
    assert "the next capture tries again" in out.problem
    second = Synthetic(steps=3, spec=DECODE, span_id=NEXT)
    run(out, second)
    assert out.problem is None
    assert out.lost == {cause: 1}
    assert attributes(second.path(root))["complete"] is True
    group = opened(first.path(root))
    steps = group.attrs["output_tokens"]
    assert at_least <= steps < first.steps
    assert (group.attrs["complete"], group.attrs["closed"], group.attrs["status"]) == (False, True, "failed")
    assert group.attrs["missing"][0]["what"] == f"all from step {steps} on"
    assert "the store could not be written" in group.attrs["missing"][0]["reason"]
    np.testing.assert_array_equal(group["logits"][:], first.logits[:steps])
    for step in range(steps):
        np.testing.assert_array_equal(group["attention"][step, ..., : first.prompt + step], first.rows[step])
    assert group["token_id"][:].tolist() == list(range(steps))
    assert not (root / FOLDER).exists()
    assert not list(root.rglob("*.part"))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes; a write past it fails with EFBIG, perhaps half done."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=70, vocab=3000, spec=DECODE), exporter(tmp_path, codec="none")
    with file_size_limit(100_000):
        run(out, generation)
    check_recovered(tmp_path, out, generation, "EFBIG", 16)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_writes(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generation, out = Synthetic(steps=90, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    for step in range(80):
        out.export(*generation.step(step))

    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(code, "no")

    with monkeypatch.context() as patch:
        for name in ("writev", "write", "mkdir", "open"):
            patch.setattr(f"os.{name}", refuse)
        for step in range(80, 90):
            out.export(*generation.step(step))
        out.export(generation.end(), NOTHING)
        assert attributes(generation.path(tmp_path))["closed"] is False, (
            "nothing can be said while nothing can be written"
        )
        other = Synthetic(spec=DECODE, span_id="00000000000000cc")
        run(out, other)
    assert out.lost == {errno.errorcode[code]: 2}
    assert not other.path(tmp_path).exists()
    out.lost[errno.errorcode[code]] = 1
    check_recovered(tmp_path, out, generation, errno.errorcode[code], 80)


def test_an_end_that_could_not_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generation, out = Synthetic(steps=3, spec=DECODE), exporter(tmp_path)
    records = list(generation.records())
    for record, payload in records[:-1]:
        out.export(record, payload)
    with monkeypatch.context() as patch:
        patch.setattr("exporters.shards.os.writev", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        out.export(*records[-1])
    assert out.lost == {"ENOSPC": 1}
    assert out.shutdown(1.0)
    found = attributes(generation.path(tmp_path))
    assert (found["complete"], found["status"], found["missing"]) == (True, "ok", [])


def test_a_recovery_that_finds_no_room_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generation, first = Synthetic(steps=3, spec=DECODE), exporter(tmp_path)
    for record, payload in list(generation.records())[:-1]:
        first.export(record, payload)
    for capture in first._open.values():
        capture.release()
    out = exporter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("exporters.shards.os.writev", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        assert out.recover() == []
        assert out.recover() == []
    assert out.lost == {"ENOSPC": 1}
    second = Synthetic(steps=1, spec=DECODE, span_id=NEXT)
    run(out, second)
    found = attributes(generation.path(tmp_path))
    assert (found["status"], found["output_tokens"]) == ("interrupted", 3)
    assert out.problem is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tensorspan-test", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"this user may not mount a small disk: {done.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    generation, out = Synthetic(steps=70, vocab=3000, spec=DECODE), exporter(small_disk / "store", codec="none")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(600_000))
    run(out, generation)
    ballast.unlink()
    check_recovered(small_disk / "store", out, generation, "ENOSPC", 10)


def test_a_disk_that_becomes_read_only(small_disk: Path) -> None:
    generation, out = Synthetic(steps=70, spec=DECODE), exporter(small_disk / "store")
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    for step in range(10):
        out.export(*generation.step(step))
    for capture in out._open.values():  # A file open for writing keeps its disk from becoming read-only.
        capture.release()
    assert out._store._index is not None
    out._store._index.stop()
    exporter(small_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = Synthetic(spec=DECODE, span_id="00000000000000cc")
    other = exporter(small_disk / "store")
    run(other, refused)
    assert set(other.lost) == {"EROFS"}
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    again = Synthetic(spec=DECODE, span_id=NEXT)
    run(other, again)
    assert attributes(again.path(small_disk / "store"))["complete"] is True
    assert attributes(generation.path(small_disk / "store"))["output_tokens"] == 10
    assert other.problem is None
