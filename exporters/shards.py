"""Append-only Zarr v3 shards: chunks as they come, then the index, then the rename.

A shard grows as `<name>.part`, which no reader looks at; with the index and its checksum at the end it takes its real
name, and every Zarr v3 library reads it. Libraries pay 3 to 60 times more CPU for small appends.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import google_crc32c
import numpy as np
from numcodecs import Blosc, Zstd, blosc
from numpy.typing import NDArray

from tracer.schema import ArrayLayout

__all__ = [
    "FILE_MODE",
    "PART",
    "ChunkCodec",
    "Placed",
    "ShardFile",
    "checksum",
    "make_directory",
    "place",
    "write_json",
    "write_new",
]

EMPTY: Final = 2**64 - 1
"""Offset and length of a chunk that is not in the shard."""
CRC_BYTES: Final = 4
PART: Final = ".part"
"""Ends the name of a file that is being written; no reader looks at it."""
FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700

Array = NDArray[Any]
crc32c: Final[Callable[[Any], int]] = google_crc32c.value

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

    def encode(self, blocks: Array) -> list[Any]:
        """Data and checksum of each chunk of C-contiguous `blocks` [chunk, ...]; data may be views of them."""
        if self._compressor is None:
            chunks: Any = blocks.reshape(len(blocks), -1).view(np.uint8)
        else:
            chunks = map(self._compressor.encode, blocks)
        parts: list[Any] = []
        for data in chunks:
            parts += data, crc32c(data).to_bytes(CRC_BYTES, "little")
        return parts

    def decode(self, data: bytes) -> Array:
        """Values of the layout's chunk without its first axis."""
        body = data[:-CRC_BYTES]
        raw = body if self._compressor is None else self._compressor.decode(body)
        return np.frombuffer(raw, self._dtype).reshape(self._shape)


class Placed(NamedTuple):
    """Where consecutive chunks lie that were written together: at `offset`, one after the other."""

    offset: int
    sizes: tuple[int, ...]
    """Bytes of each, its checksum included."""


class ShardFile:
    """One shard of `chunks` inner chunks. Methods raise OSError as the file system does."""

    def __init__(self, path: Path, chunks: int) -> None:
        self.path = path
        self.size = 0
        self._chunks = chunks
        self._where: dict[int, tuple[int, int]] = {}
        """Offset and size of each chunk that is there, by its place in C order of the shard's grid."""
        self._part = path.with_name(path.name + PART)
        self._fd = -1

    @classmethod
    def reopen(cls, path: Path, chunks: int) -> ShardFile:
        """A finished shard to append to: works on a copy, so that readers keep the finished one meanwhile."""
        shard = cls(path, chunks)
        shutil.copyfile(path, shard._part)
        shard._part.chmod(FILE_MODE)
        shard.size = shard._part.stat().st_size
        shard._where = _index_of(shard._read(shard.size - CRC_BYTES - 16 * chunks, 16 * chunks))
        return shard

    @classmethod
    def open(cls, path: Path, chunks: int) -> ShardFile:
        """`reopen` if that shard has been finished, else a new one."""
        return cls.reopen(path, chunks) if path.exists() else cls(path, chunks)

    @classmethod
    def recover(cls, path: Path, chunks: int, where: Mapping[int, tuple[int, int]]) -> ShardFile | None:
        """The shard of a writer that was killed, with the chunks that its journal names and nothing after them.

        None if there is nothing to do: the shard had been finished with all of them. Raises FileNotFoundError if
        those chunks are nowhere.
        """
        shard = cls(path, chunks)
        shard._where = dict(where)
        shard.size = max((offset + size for offset, size in where.values()), default=0)
        if _size(shard._part) >= shard.size:
            os.truncate(shard._part, shard.size)
            return shard
        # Killed while it copied a finished shard to append to: the finished one is whole.
        shard._part.unlink(missing_ok=True)
        if _size(path) < shard.size:
            raise FileNotFoundError(errno.ENOENT, "the shard does not hold what its journal names", str(path))
        return None

    def append(self, first: int, parts: Sequence[Any]) -> Placed:
        """Write chunks `first`, `first + 1`, … from `parts`: data and checksum of one after the other."""
        placed = Placed(self.size, tuple([len(data) + CRC_BYTES for data in parts[::2]]))
        self.size += _write_all(self._fd if self._fd >= 0 else self._open(), parts, sum(placed.sizes))
        place(self._where, first, placed)
        return placed

    def clear(self, start: int, stop: int | None = None) -> None:
        """Take chunks start … stop - 1 out of the index; their bytes stay behind."""
        for chunk in range(start, self._chunks if stop is None else stop):
            self._where.pop(chunk, None)

    def __contains__(self, chunk: int) -> bool:
        """True if that chunk is there."""
        return chunk in self._where

    def read(self, chunk: int) -> bytes | None:
        """Bytes of a chunk with its checksum; None if it is not there."""
        where = self._where.get(chunk)
        return None if where is None else self._read(*where)

    def finish(self) -> bool:
        """Append the index and take the real name; False, leaving no file, if the shard holds no chunk."""
        if not self._where:
            self.release()
            self._part.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            return False
        index = np.full((self._chunks, 2), EMPTY, dtype="<u8")
        index[list(self._where)] = list(self._where.values())
        data = index.tobytes()
        self.size += _write_all(self._open(), (data, checksum(data)), len(data) + CRC_BYTES)
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


def place(where: dict[int, tuple[int, int]], first: int, placed: Placed) -> None:
    """Point chunks `first`, `first + 1`, … of an index to where they were written."""
    offset = placed.offset
    for chunk, size in enumerate(placed.sizes, first):
        where[chunk] = offset, size
        offset += size


def _index_of(data: bytes) -> dict[int, tuple[int, int]]:
    pairs = np.frombuffer(data, "<u8").reshape(-1, 2)
    return {chunk: (int(pairs[chunk, 0]), int(pairs[chunk, 1])) for chunk in np.flatnonzero(pairs[:, 0] != EMPTY)}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def checksum(data: Any) -> bytes:
    """crc32c of bytes or of a flat array of bytes, as it stands after them."""
    return crc32c(data).to_bytes(CRC_BYTES, "little")


def _write_all(fd: int, parts: Sequence[Any], total: int) -> int:
    """Write flat buffers of `total` bytes: one system call, more if the disk is so full that it takes only a part."""
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
        _write_all(fd, (data,), len(data))
    finally:
        os.close(fd)


def write_json(path: Path, content: Mapping[str, Any], part: Path | None = None) -> None:
    """Replace a metadata file: a reader sees the old or the new one, never half of it.

    part: the temporary file, if others may write the same metadata at the same time.
    """
    part = part or path.with_name(path.name + PART)
    write_new(part, json.dumps(content, allow_nan=False, separators=(",", ":")).encode())
    part.replace(path)
