from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from exporters.shards import EMPTY, ChunkCodec, ShardFile, write_json
from tracer.schema import ArrayLayout

LAYOUT = ArrayLayout("a", ("step", "vocab"), "float16", (1, 8), (4, 8), float("nan"))
VALUES = np.arange(32, dtype=np.float16).reshape(4, 8)


def fill(shard: ShardFile, codec: str, rows: Sequence[int]) -> None:
    coder = ChunkCodec(LAYOUT, codec)
    for row in rows:
        shard.append(row, coder.encode(VALUES[row, None]))


def read(directory: Path, codec: str = "none") -> Any:
    write_json(directory / "zarr.json", LAYOUT.metadata((4, 8), codec))
    array = zarr.open_array(directory, mode="r")
    return array[:]


@pytest.mark.parametrize("codec", ["blosc", "zstd", "none"])
@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (3, 0, 2, 1), (1, 3)])
def test_zarr_reads_what_was_appended(tmp_path: Path, codec: str, rows: Sequence[int]) -> None:
    shard = ShardFile(tmp_path / "c.0.0", LAYOUT.chunks)
    fill(shard, codec, rows)
    assert not (tmp_path / "c.0.0").exists()
    assert shard.finish()
    expected = np.full_like(VALUES, np.nan)
    expected[list(rows)] = VALUES[list(rows)]
    np.testing.assert_array_equal(read(tmp_path, codec), expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.0.0", "zarr.json"]


def test_the_index_is_at_the_end_with_its_checksum(tmp_path: Path) -> None:
    shard = ShardFile(tmp_path / "c.0.0", 4)
    fill(shard, "none", (2,))
    shard.finish()
    data = (tmp_path / "c.0.0").read_bytes()
    index = np.frombuffer(data[-4 - 64 : -4], "<u8").reshape(4, 2)
    assert index.tolist() == [[EMPTY, EMPTY], [EMPTY, EMPTY], [0, 20], [EMPTY, EMPTY]]
    assert int.from_bytes(data[-4:], "little") == google_crc32c.value(data[-68:-4])
    assert data[:16] == VALUES[2].tobytes()


def test_a_newer_chunk_wins_and_a_cleared_one_is_gone(tmp_path: Path) -> None:
    shard = ShardFile(tmp_path / "c.0.0", 4)
    fill(shard, "none", (0, 1, 2, 3))
    coder = ChunkCodec(LAYOUT, "none")
    shard.append(1, coder.encode(-VALUES[1, None]))
    shard.clear(3)
    shard.finish()
    out = read(tmp_path)
    np.testing.assert_array_equal(out[:3], [VALUES[0], -VALUES[1], VALUES[2]])
    assert np.isnan(out[3]).all()


def test_a_finished_shard_can_be_reopened_and_stays_readable_meanwhile(tmp_path: Path) -> None:
    first = ShardFile(tmp_path / "c.0.0", 4)
    fill(first, "blosc", (0, 1))
    first.finish()
    again = ShardFile.open(tmp_path / "c.0.0", 4)
    fill(again, "blosc", (2,))
    assert np.isnan(read(tmp_path, "blosc")[2]).all()
    again.finish()
    np.testing.assert_array_equal(read(tmp_path, "blosc")[:3], VALUES[:3])


def test_chunks_can_be_read_back_before_the_end(tmp_path: Path) -> None:
    coder = ChunkCodec(LAYOUT, "blosc")
    shard = ShardFile(tmp_path / "c.0.0", 4)
    assert shard.read(0) is None
    fill(shard, "blosc", (0,))
    shard.release()
    data = shard.read(0)
    assert data is not None
    np.testing.assert_array_equal(coder.decode(data), VALUES[0])
    shard.release()


def test_an_empty_shard_leaves_no_file(tmp_path: Path) -> None:
    shard = ShardFile(tmp_path / "c.0.0", 4)
    fill(shard, "none", (0,))
    shard.clear(0)
    assert not shard.finish()
    assert list(tmp_path.iterdir()) == []


def test_files_are_private(tmp_path: Path) -> None:
    shard = ShardFile(tmp_path / "c.0.0", 4)
    fill(shard, "none", (0,))
    shard.finish()
    read(tmp_path)
    for name in ("c.0.0", "zarr.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.shards.os.writev", lambda fd, parts: os.write(fd, b"".join(parts)[:5]))
    shard = ShardFile(tmp_path / "c.0.0", 4)
    fill(shard, "none", (0, 1, 2, 3))
    shard.finish()
    np.testing.assert_array_equal(read(tmp_path), VALUES)


def test_a_full_disk_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, parts: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exporters.shards.os.writev", full)
    shard = ShardFile(tmp_path / "c.0.0", 4)
    with pytest.raises(OSError, match="No space"):
        fill(shard, "none", (0,))
    shard.release()
