"""A vLLM process that is connected to the exporter process, as that one sees it."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tracer import wire
from tracer.records import FlushRecord, Record
from tracer.ring import Frame, Ring

__all__ = ["QueueClient"]

LOG: Final = logging.getLogger("tensorspan.exporter")


@dataclass(slots=True)
class QueueClient:
    """One connection with its ring. What comes from there is looked at before it is believed: nothing here raises."""

    conn: socket.socket
    ring: Ring | None = None
    role: str = ""
    returning: bool = False
    """Another exporter process has read from its ring before."""
    greeted: bool = False
    """The first record of its ring has been looked at."""
    cpus: frozenset[int] = frozenset()
    """Cores that a worker has bound itself to."""
    flushes: list[FlushRecord] = field(default_factory=list)
    lost: int = 0
    """Records that could not be read; a ring that had to be emptied counts once."""

    def meet(self, data: bytes, fds: Sequence[int]) -> bool:
        """Take the hello line and the ring that came with it; False if it is none, and this client is to be left."""
        try:
            hello = json.loads(data.split(b"\n", 1)[0])
            role, cpus = str(hello["role"]), frozenset(map(int, hello.get("cpus", ())))
            ring = Ring(fds[0])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError) as error:
            LOG.error("a process said hello in words that mean nothing (%s): its spans are lost", error)  # noqa: TRY400
            for fd in fds:
                os.close(fd)
            return False
        self.ring, self.role = ring, role
        self.returning = ring.head > ring.used
        self.cpus = cpus if role == "worker" else frozenset()
        return True

    def read(self) -> Frame | None:
        """The next frame of its ring; says once if the ring was damaged."""
        if self.ring is None:
            return None
        before = self.ring.damaged
        frame = self.ring.read()
        if self.ring.damaged > before:
            self._lose("the queue of a %s process was damaged: what was in it is lost", self.role)
        return frame

    def decode(self, frame: Frame) -> Record | None:
        """The record in that frame; None if there is none, which is counted and said once."""
        try:
            return wire.decode(frame.kind, frame.meta)
        except wire.UNREADABLE as error:
            # Its text alone: whoever keeps the error keeps the frame, and with it the ring's memory.
            self._lose("a record of a %s process cannot be read and is lost: %s", self.role, str(error))
            return None

    def _lose(self, message: str, *facts: object) -> None:
        self.lost += 1
        if self.lost == 1:
            LOG.error(f"{message}; tensorspan.records.lost counts what follows", *facts)  # noqa: G004
