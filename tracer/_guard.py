"""The one boundary between telemetry and the engine: our mistakes are logged and counted, never raised into vLLM.

Our own tests make the guard strict, so that no bug of ours can hide behind it.
"""

from __future__ import annotations

import logging
from collections import Counter
from types import TracebackType
from typing import ClassVar, Final

__all__ = ["Guard"]

LOG: Final = logging.getLogger("tensorspan")


class Guard:
    """Makes context managers around telemetry work; `failures` counts what they swallowed. Safe in threads."""

    strict: ClassVar[bool] = False
    """True in our tests: raise instead of counting."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    def __call__(self, where: str) -> _Section:
        return _Section(self, where)


class _Section:
    """One piece of work under a guard."""

    __slots__ = ("_guard", "_where")

    def __init__(self, guard: Guard, where: str) -> None:
        self._guard = guard
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is None or not isinstance(error, Exception) or Guard.strict:
            return False
        self._guard.failures[self._where] += 1
        if self._guard.failures[self._where] == 1:
            LOG.error("tensorspan failed in %s; serving goes on with less telemetry", self._where, exc_info=error)
        return True
