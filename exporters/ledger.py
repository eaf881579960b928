"""What a capture was asked to hold, what it holds, and why the rest is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracer.schema import ATTENTION_PREFILL

__all__ = ["EVERYTHING", "NUMBERS", "Ledger", "ranges"]

NUMBERS: Final = "span_id"
"""Stands for all one-dimensional arrays over `step`: they come with the record, together or not at all."""
EVERYTHING: Final = "*"
MAX_DROPPED: Final = 1000
MAX_RANGES: Final = 50
NOT_RECEIVED: Final = "not received"
CACHED: Final = "prefix cache hit: no query was computed"

Mask = NDArray[np.bool_]
Entry = dict[str, str]


class _Drop(NamedTuple):
    array: str
    step: int | None
    cause: str


class Ledger:
    """Book-keeping of one capture; pure data."""

    def __init__(self, asked: Sequence[str], lengths: Mapping[str, int]) -> None:
        self._lengths = lengths
        """Rows of arrays whose first axis is not `step`."""
        self._steps: dict[str, set[int]] = {name: set() for name in (NUMBERS, *asked) if name != ATTENTION_PREFILL}
        self._drops: list[_Drop] = []
        self._facts: list[Entry] = []

    def stored(self, array: str, step: int) -> None:
        """Row `step` of `array` is in the capture; an array nobody asked for is not booked."""
        if array in self._steps:
            self._steps[array].add(step)

    def drop(self, array: str, step: int | None, cause: str) -> None:
        """Something of `array` was lost at `step`, or while the prompt was read (None)."""
        self._drops.append(_Drop(array, step, cause))

    def mark(self) -> int:
        """A point that `since` counts from."""
        return len(self._drops)

    def since(self, mark: int) -> Sequence[tuple[str, int | None, str]]:
        """(array, step, cause) of what was dropped after that point."""
        return self._drops[mark:]

    def gone(self, array: str, step: int, cause: str) -> None:
        """Row `step` of `array` was in the capture and is no longer."""
        if step in self._steps.get(array, ()):
            self._steps[array].discard(step)
            self.drop(array, step, cause)

    def state(self, array: str, what: str, reason: str) -> None:
        """A fact about the whole array, e.g. a layer that cannot be captured."""
        self._facts.append({"array": array, "what": what, "reason": reason})

    def dropped(self, steps: int) -> dict[str, Any]:
        """Attribute `dropped`: the total and the first thousand, without surplus steps."""
        drops = [drop for drop in self._drops if drop.step is None or drop.step < self._rows(drop.array, steps)]
        return {"count": len(drops), "entries": [drop._asdict() for drop in drops[:MAX_DROPPED]]}

    def missing(self, steps: int, prompt_seen: Mask | None, cached: int, layers: Sequence[int]) -> list[Entry]:
        """Attribute `missing`: empty if the capture is complete.

        steps: valid output tokens; prompt_seen: bool [layer, prompt row] received, None if the prompt's map was not
        asked for; cached: prompt tokens whose queries were never computed; layers: the model's indices of the layers.
        """
        out = list(self._facts)
        for array, present in self._steps.items():
            absent = [step for step in range(self._rows(array, steps)) if step not in present]
            out += self._absent_steps(array, absent)
        if prompt_seen is not None:
            out += self._absent_rows(prompt_seen, cached, layers)
        return out + self._damaged(steps)

    def _rows(self, array: str, steps: int) -> int:
        return self._lengths.get(array, steps)

    def _absent_steps(self, array: str, absent: Sequence[int]) -> list[Entry]:
        causes = {drop.step: drop.cause for drop in self._drops if drop.array == array}
        groups: dict[str, list[int]] = {}
        for step in absent:
            groups.setdefault(causes.get(step, NOT_RECEIVED), []).append(step)
        noun = "position" if array in self._lengths else "step"
        return [{"array": array, "what": ranges(noun, group), "reason": reason} for reason, group in groups.items()]

    def _absent_rows(self, seen: Mask, cached: int, layers: Sequence[int]) -> list[Entry]:
        """Rows that never came, by layer where the layers differ."""
        causes = dict.fromkeys(drop.cause for drop in self._drops if drop.array == ATTENTION_PREFILL)
        lost = "; ".join(causes) or NOT_RECEIVED
        groups: dict[bytes, list[int]] = {}
        for slot, row in enumerate(seen):
            groups.setdefault(row.tobytes(), []).append(slot)
        out = []
        for slots in groups.values():
            absent = np.flatnonzero(~seen[slots[0]]).tolist()
            who = "" if len(groups) == 1 else ranges("layer", [layers[slot] for slot in slots]) + ": "
            for reason, rows in (
                (CACHED, [row for row in absent if row < cached]),
                (lost, [row for row in absent if row >= cached]),
            ):
                if rows:
                    out.append({"array": ATTENTION_PREFILL, "what": who + ranges("row", rows), "reason": reason})
        return out

    def _damaged(self, steps: int) -> list[Entry]:
        """Drops reported at a step whose row is there: part of that row, or something before it, is not."""
        groups: dict[tuple[str, str], list[int]] = {}
        for array, step, cause in self._drops:
            known = self._steps.get(array)
            if step is None or step >= self._rows(array, steps) or (known is not None and step not in known):
                continue
            groups.setdefault((array, cause), []).append(step)
        return [
            {"array": array, "what": f"reported at {ranges('step', group)}", "reason": cause}
            for (array, cause), group in groups.items()
        ]


def ranges(noun: str, numbers: Iterable[int]) -> str:
    """`step 3` or `steps 0-4, 9`, for people; at most 50 ranges are spelled out."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(low) if low == high else f"{low}-{high}" for low, high in runs[:MAX_RANGES]]
    rest = f" and {len(runs) - MAX_RANGES} more ranges" if len(runs) > MAX_RANGES else ""
    single = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"{noun if single else noun + 's'} {', '.join(parts)}{rest}"
