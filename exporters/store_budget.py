"""The byte budget of a store: how much is in it, cheaply, and whether there is room for more.

What this process writes is counted at once. What others write, prune or remove is seen by looking at the store, on a
thread beside the writer: the index knows the size of every closed capture, so that only open ones are measured.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tracer.prune import plan

__all__ = ["StoreBudget"]

LOG: Final = logging.getLogger("tensorspan.zarr")
MB: Final = 1_000_000
LOOK_SECONDS: Final = 60.0
"""How often the store is looked at while there is room."""
FULL_LOOK_SECONDS: Final = 5.0
"""And while there is none: `tensorspan prune` is noticed this fast."""
SHARE: Final = 20.0
"""A look that takes a second is not repeated for 20: it may not cost more than a twentieth of a core."""


class StoreBudget:
    """Room in one store; `limit_mb` 0 is no limit. One thread at a time."""

    def __init__(self, root: Path, limit_mb: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._limit_mb = limit_mb
        self._clock = clock
        self._known = 0
        """Bytes in the store at the last look, corrected so that adding `_written` gives what is there now."""
        self._written = 0
        self._seen = False
        self._next_look = clock()
        self._looking: threading.Thread | None = None
        self.refusal()

    def add(self, size: int) -> None:
        """This process has written that many bytes."""
        self._written += size

    def refusal(self) -> str | None:
        """Why nothing more may be stored, with the repair; None if there is room."""
        if not self._limit_mb:
            return None
        full = self._known + self._written > self._limit_mb * MB
        now = self._clock()
        if now >= self._next_look - (LOOK_SECONDS - FULL_LOOK_SECONDS if full else 0.0):
            self._look_beside(now)
        return f"store budget of {self._limit_mb} MB reached; run tensorspan prune" if full else None

    def size(self) -> int | None:
        """Bytes in the store as of the last look, and what has been written since; None before the first look."""
        now = self._clock()
        if now >= self._next_look:
            self._look_beside(now)
        return self._known + self._written if self._seen else None

    def wait(self) -> None:
        """Until the look that is under way, if one is, has ended."""
        if self._looking is not None:
            self._looking.join()

    def _look_beside(self, now: float) -> None:
        if self._looking is None or not self._looking.is_alive():
            self._next_look = now + LOOK_SECONDS
            self._looking = threading.Thread(target=self._look, name="tensorspan-budget", daemon=True)
            self._looking.start()

    def _look(self) -> None:
        begin = self._clock()
        try:
            found = plan(self._root, None, None).kept
        except (OSError, ValueError, KeyError) as error:
            LOG.warning("tensorspan: the size of %s cannot be measured: %s", self._root, error)
            return
        # What was written during the look may be in `found` or not: taken as if it were, so that nothing counts twice.
        self._known = found - self._written
        self._seen = True
        self._next_look += SHARE * (self._clock() - begin)
