"""A bounded queue of frames in shared memory, from exactly one producer to exactly one consumer.

The law: the producer alone writes `HEAD`, the consumer alone writes `TAIL`, each is one aligned 64-bit store, and a
frame is complete before `HEAD` passes it. Nobody ever waits here: a frame that does not fit is refused and the caller
counts it. The memory has no name in any file system (`memfd_create`): it is handed over as a file descriptor and is
gone with the last process that holds it, also after `kill -9`.

Byte order of loads and stores is that of x86-64 and of any machine whose CPython stores are sequentially visible to
other processes; on weakly ordered CPUs the wake-up over the socket is the barrier in practice.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["Frame", "Ring"]

HEADER_BYTES: Final = 4096
FRAME: Final = struct.Struct("=IIQ")
"""Kind, bytes of metadata, bytes of payload; the frame's length follows from them."""
SKIP: Final = 0
"""Kind of the filler that sends the consumer back to the start."""
ALIGN: Final = 64
HEAD: Final = 0
TAIL: Final = 8
"""Indices of 64-bit words, a cache line apart."""
HOT_BYTES: Final = 1 << 24
"""A ring that is empty starts again at its first byte once it has come this far: memory that was just used is still in
the CPU's cache, and a ring whose consumer keeps up never touches (so never occupies) the rest of its capacity."""
BASE: Final = 24
"""The position that lies at the first byte; the producer moves it, and only while the ring is empty."""
WAITING: Final = 16
"""Set by a consumer that is about to sleep: the producer should wake it."""


class Frame(NamedTuple):
    """One message; both views point into shared memory and die with `Ring.release`."""

    kind: int
    meta: memoryview
    payload: memoryview


def _aligned(size: int) -> int:
    return (size + ALIGN - 1) // ALIGN * ALIGN


class Ring:
    """Both ends of the queue over one file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        size = os.fstat(fd).st_size
        if size < HEADER_BYTES + ALIGN:
            raise ValueError(f"a ring needs {HEADER_BYTES + ALIGN} bytes or more, not {size}")
        self._map = mmap.mmap(fd, size)
        self._memory = memoryview(self._map)
        self._words = self._memory[:HEADER_BYTES].cast("Q")
        self._data = self._memory[HEADER_BYTES:]
        self.capacity = len(self._data)
        self._after: int | None = None
        """Where the frame that is being read ends."""
        self.damaged = 0
        """Consumer: how often the ring had to be emptied."""

    @classmethod
    def create(cls, capacity: int) -> Ring:
        """A new ring of at least `capacity` bytes; memory is taken as it is first used."""
        fd = os.memfd_create("tensorspan-ring", os.MFD_CLOEXEC)
        os.ftruncate(fd, HEADER_BYTES + _aligned(capacity))
        return cls(fd)

    @property
    def used(self) -> int:
        """Bytes waiting for the consumer."""
        return int(self._words[HEAD] - self._words[TAIL])

    @property
    def head(self) -> int:
        """Bytes written since the start; a consumer that has read up to here has seen everything sent before."""
        return int(self._words[HEAD])

    def write(self, kind: int, meta: bytes, payload: Sequence[memoryview] = ()) -> bool:
        """Append one frame; False, with nothing written, if it does not fit."""
        payload_bytes = sum(part.nbytes for part in payload)
        need = _aligned(FRAME.size + len(meta) + payload_bytes)
        head = int(self._words[HEAD])
        used = self.used
        if used == 0 and (self._offset(head) >= HOT_BYTES or self._offset(head) + need > self.capacity):
            self._words[BASE] = head
        offset = self._offset(head)
        filler = self.capacity - offset if offset + need > self.capacity else 0
        if used + filler + need > self.capacity:
            return False
        if filler:
            FRAME.pack_into(self._data, offset, SKIP, 0, 0)
            head, offset = head + filler, 0
        FRAME.pack_into(self._data, offset, kind, len(meta), payload_bytes)
        at = offset + FRAME.size
        self._data[at : at + len(meta)] = meta
        at += len(meta)
        for part in payload:
            flat = part.cast("B")
            self._data[at : at + flat.nbytes] = flat
            at += flat.nbytes
        self._words[HEAD] = head + need
        return True

    def read(self) -> Frame | None:
        """The next frame, or None if the ring is empty; call `release` before reading again.

        A ring that holds no frames where it should (a process wrote where it must not) is emptied, and `damaged` counts
        it: what was in it is lost, what comes later is read. This never raises, and never looks at more than is there.
        """
        tail, head = int(self._words[TAIL]), int(self._words[HEAD])
        while tail != head:
            offset = self._offset(tail)
            room = min(head - tail, self.capacity - offset)
            if head - tail > self.capacity or room < FRAME.size:
                self._empty(head)
                return None
            kind, meta_bytes, payload_bytes = FRAME.unpack_from(self._data, offset)
            filler = kind == SKIP
            need = self.capacity - offset if filler else _aligned(FRAME.size + meta_bytes + payload_bytes)
            if need > room:
                self._empty(head)
                return None
            tail += need
            if filler:
                self._words[TAIL] = tail
                continue
            self._after = tail
            at = offset + FRAME.size
            body = at + meta_bytes
            return Frame(kind, self._data[at:body], self._data[body : body + payload_bytes])
        return None

    def _empty(self, head: int) -> None:
        self.damaged += 1
        self._words[TAIL] = head

    def release(self) -> None:
        """Give the space of the frame last read back to the producer."""
        if self._after is not None:
            self._words[TAIL] = self._after
        self._after = None

    def _offset(self, position: int) -> int:
        return (position - int(self._words[BASE])) % self.capacity

    def close(self) -> None:
        """Give the memory back; if somebody still holds a frame, with that."""
        with contextlib.suppress(BufferError):
            for view in (self._words, self._data, self._memory):
                view.release()
            self._map.close()
        os.close(self.fd)

    def set_waiting(self, waiting: bool) -> bool:
        """Consumer: say whether a wake-up is wanted; returns True if the ring is empty, that is, sleeping is safe."""
        self._words[WAITING] = int(waiting)
        return bool(self._words[TAIL] == self._words[HEAD])

    @property
    def waiting(self) -> bool:
        """Producer: True if the consumer sleeps and should be woken."""
        return bool(self._words[WAITING])
