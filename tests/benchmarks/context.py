"""What a captured decode step costs against its context and the number of captured rows in it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tests.benchmarks.load import Batch, Load
from tests.benchmarks.measure import Fleet, Variant

__all__ = ["Fit", "Point", "fit", "step_ms", "sweep"]

STREAMS: Final = 8
STEPS: Final = 40
CAPTURE: Final = "attention"


@dataclass(frozen=True, slots=True)
class Point:
    """Milliseconds that capturing adds to a decode step of 8 requests of the same server."""

    context: int
    """Prompt tokens of each request."""
    rows: int
    """Requests of the step whose attention is captured."""
    added_ms: float
    base_ms: float
    """A step of which nothing is captured, with its spans."""


@dataclass(frozen=True, slots=True)
class Fit:
    """added = base + rows * (per_row + per_key * context), by least squares; all in ms."""

    base: float
    per_row: float
    per_key: float
    r2: float
    """Share of the variance that the line explains."""

    def __str__(self) -> str:
        return (
            f"{self.base:.2f} ms + rows x ({self.per_row:.2f} ms + {self.per_key * 1000:.2f} ms per 1,000 keys), "
            f"R² {self.r2:.3f}"
        )


def sweep(fleet: Fleet, contexts: Sequence[int], rows: Sequence[int], say: Callable[[str], None]) -> list[Point]:
    """Measure every pair. Prompts of one context are the same, so that only the first is prefilled.

    The base is a step of the same server: two processes differ by a millisecond a step, by luck of their memory.
    """
    points = []
    for context in contexts:
        load, seed = Load(STREAMS, context, STEPS), fleet.seed()
        fleet.run(_capturing(0), load, seed)  # Fills the prefix cache.
        before = step_ms(fleet.run(_capturing(0), load, seed)[0])
        for count in rows:
            batch, captured = fleet.run(_capturing(count), load, seed)
            after = step_ms(fleet.run(_capturing(0), load, seed)[0])
            base = (before + after) / 2
            points.append(Point(context, count, step_ms(batch) - base, base))
            faults = f", INCOMPLETE: {captured.faults[0]}" if captured is not None and captured.faults else ""
            say(f"  {context} keys, {count} rows: {points[-1].added_ms:+.2f} ms on {base:.2f} ms{faults}")
            before = after
    return points


def _capturing(rows: int) -> Variant:
    return Variant(f"{rows} rows", "traced", CAPTURE, capturing=tuple(range(rows)))


def step_ms(batch: Batch) -> float:
    """Median time of a decode step after the last prefill of the batch."""
    decoding = max(stream.arrivals[0] for stream in batch.streams)
    gaps = [
        end - start
        for stream in batch.streams
        for start, end in zip(stream.arrivals, stream.arrivals[1:], strict=False)
        if start >= decoding
    ]
    return 1e3 * statistics.median(gaps)


def fit(points: Sequence[Point]) -> Fit:
    """The plane through the points."""
    matrix = np.array([(1.0, point.rows, point.rows * point.context) for point in points])
    values = np.array([point.added_ms for point in points])
    found, *_ = np.linalg.lstsq(matrix, values, rcond=None)
    left = float(np.sum((values - matrix @ found) ** 2))
    total = float(np.sum((values - values.mean()) ** 2))
    base, per_row, per_key = map(float, found)
    return Fit(base, per_row, per_key, 1 - left / total if total else 1.0)
