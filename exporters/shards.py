"""Append-only Zarr v3 shards: chunks as they come, then the index, then the rename.

A shard grows as `<name>.part`, which no reader looks at; with the index and its checksum at the end it takes its real
name, and every Zarr v3 library reads it. Libraries pay 3 to 60 times more CPU for small appends.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
from numcodecs import Blosc, Zstd, blosc
from numpy.typing import NDArray

from tracer.schema import ArrayLayout

__all__ = ["ChunkCodec", "ShardFile", "make_directory", "write_json", "write_new"]

EMPTY: Final = 2**64 - 1
"""Offset and length of a chunk that is not in the shard."""
CRC_BYTES: Final = 4
FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700

Array = NDArray[Any]

# One thread per process writes; blosc's own threads cost more CPU than they save on 100 kB chunks.
blosc.set_nthreads(1)


class ChunkCodec:
    """The inner codec chain of an array: values to the bytes of one chunk, and back."""

    def __init__(self, layout: ArrayLayout, codec: str) -> None:
        shuffle = Blosc.BITSHUFFLE if layout.bitshuffle else Blosc.SHUFFLE
        makers: dict[str, Any] = {"blosc": Blosc("lz4", 5, shuffle), "zstd": Zstd(1), "none": None}
        self._compressor = makers[codec]
        self._dtype = np.dtype(layout.dtype)
        self._shape = layout.chunk[1:]

    def encode(self, values: Array) -> tuple[Any, bytes]:
        """(data, checksum) of C-contiguous values; data may be a view of `values`."""
        data = values.reshape(-1).view(np.uint8) if self._compressor is None else self._compressor.encode(values)
        return data, _checksum(data)

    def decode(self, data: bytes) -> Array:
        """Values of the layout's chunk without its first axis."""
        body = data[:-CRC_BYTES]
        raw = body if self._compressor is None else self._compressor.decode(body)
        return np.frombuffer(raw, self._dtype).reshape(self._shape)


class ShardFile:
    """One shard of `chunks` inner chunks. Methods raise OSError as the file system does."""

    def __init__(self, path: Path, chunks: int) -> None:
        self.path = path
        self.index = np.full((chunks, 2), EMPTY, dtype="<u8")
        """Offset and length of each chunk, in C order of the shard's grid."""
        self.size = 0
        self._part = path.with_name(f"{path.name}.part")
        self._fd = -1

    @classmethod
    def reopen(cls, path: Path, chunks: int) -> ShardFile:
        """A finished shard to append to: works on a copy, so that readers keep the finished one meanwhile."""
        shard = cls(path, chunks)
        shutil.copyfile(path, shard._part)
        shard._part.chmod(FILE_MODE)
        shard.size = shard._part.stat().st_size
        tail = shard._read(shard.size - CRC_BYTES - shard.index.nbytes, shard.index.nbytes)
        shard.index = np.frombuffer(tail, "<u8").reshape(chunks, 2).copy()
        return shard

    @classmethod
    def open(cls, path: Path, chunks: int) -> ShardFile:
        """`reopen` if that shard has been finished, else a new one."""
        return cls.reopen(path, chunks) if path.exists() else cls(path, chunks)

    def append(self, chunk: int, data: Any, checksum: bytes) -> int:
        """Write one chunk and point its index entry there; returns the bytes written."""
        size = _write_all(self._open(), (data, checksum))
        self.index[chunk] = self.size, size
        self.size += size
        return size

    def clear(self, start: int, stop: int | None = None) -> None:
        """Take chunks start … stop - 1 out of the index; their bytes stay behind."""
        self.index[start:stop] = EMPTY

    def read(self, chunk: int) -> bytes | None:
        """Bytes of a chunk with its checksum; None if it is not there."""
        offset, size = map(int, self.index[chunk])
        return None if offset == EMPTY else self._read(offset, size)

    def finish(self) -> bool:
        """Append the index and take the real name; False, leaving no file, if the shard holds no chunk."""
        if (self.index == EMPTY).all():
            self.release()
            self._part.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            return False
        index = self.index.tobytes()
        self.size += _write_all(self._open(), (index, _checksum(index)))
        self.release()
        self._part.replace(self.path)
        return True

    def release(self) -> None:
        """Give the file descriptor back; the next append opens the file again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        if self._fd < 0:
            self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
        return self._fd

    def _read(self, offset: int, size: int) -> bytes:
        return os.pread(self._open(), size, offset)


def _checksum(data: Any) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def _write_all(fd: int, parts: Sequence[Any]) -> int:
    """Write flat byte buffers; one system call as a rule, more if the disk is so full that it takes only a part."""
    total = sum(map(len, parts))
    done = os.writev(fd, parts)
    if done < total:
        rest = memoryview(b"".join(parts))
        while done < total:
            done += os.write(fd, rest[done:])
    return total


def make_directory(path: Path) -> None:
    """A directory only this user may enter; raises FileExistsError if it is there."""
    path.mkdir(DIRECTORY_MODE)


def write_new(path: Path, data: bytes) -> None:
    """A file only this user may read, of those bytes."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
    try:
        _write_all(fd, (data,))
    finally:
        os.close(fd)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a metadata file: a reader sees the old or the new one, never half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # Two exporter processes may share a root.
    write_new(part, json.dumps(content, allow_nan=False, separators=(",", ":")).encode())
    part.replace(path)
