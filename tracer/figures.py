"""Numbers about ourselves, gathered on the exporter process's one thread for those who publish them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

__all__ = ["Board", "Figure", "Measured", "Watcher"]

INTERVAL_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Figure:
    """The value of one metric (of `tracer.metric_names`) now."""

    name: str
    value: float
    attributes: tuple[tuple[str, str], ...] = ()
    """Pairs of few possible values; figures with the same name and pairs are added up."""


@runtime_checkable
class Measured(Protocol):
    """An exporter that has figures."""

    def figures(self) -> Iterable[Figure]:
        """What is to be said now; cheap, and called once a second."""


@runtime_checkable
class Watcher(Protocol):
    """An exporter that publishes the figures of all."""

    def watch(self, figures: Sequence[Figure]) -> None:
        """Take them; never waits."""


class Board:
    """Once a second, the figures of all `parts` for those of them that watch."""

    def __init__(self, parts: Sequence[object], clock: Callable[[], float] = time.monotonic) -> None:
        self._measured = [part for part in parts if isinstance(part, Measured)]
        self._watchers = [part for part in parts if isinstance(part, Watcher)]
        self._clock = clock
        self._due = clock()

    def look(self) -> None:
        """Gather and pass on, if it is time and anybody wants it."""
        if self._watchers and self._clock() >= self._due:
            self._due = self._clock() + INTERVAL_SECONDS
            figures = tuple(figure for part in self._measured for figure in part.figures())
            for watcher in self._watchers:
                watcher.watch(figures)
