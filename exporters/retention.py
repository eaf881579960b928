"""Old captures go by themselves while a server runs: `tensorspan prune --keep`, once an hour, beside the writer."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tracer.prune import plan, prune
from tracer.quantities import parse_seconds

__all__ = ["Retention"]

LOG: Final = logging.getLogger("tensorspan.zarr")
EVERY_SECONDS: Final = 3_600.0


class Retention:
    """Keeps a store for the duration `keep`; empty is for ever. One thread at a time."""

    def __init__(self, root: Path, keep: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._keep_s = parse_seconds(keep) if keep else None
        self._clock = clock
        self._due = clock()
        self._working: threading.Thread | None = None

    def look(self) -> None:
        """Start removing if an hour has gone since the last time; returns at once."""
        if self._keep_s is not None and self._clock() >= self._due:
            self._due = self._clock() + EVERY_SECONDS
            if self._working is None or not self._working.is_alive():
                self._working = threading.Thread(target=self._remove, name="tensorspan-retention", daemon=True)
                self._working.start()

    def wait(self) -> None:
        """Until the removal that is under way, if one is, has ended."""
        if self._working is not None:
            self._working.join()

    def _remove(self) -> None:
        try:
            removed = prune(self._root, plan(self._root, self._keep_s, None).remove)
        except (OSError, ValueError, KeyError, sqlite3.Error) as error:
            LOG.warning("tensorspan: old captures in %s cannot be removed: %s", self._root, error)
            return
        if removed:
            LOG.info("tensorspan: %d captures or span files older than their time are removed", len(removed))
