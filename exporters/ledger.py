"""What a capture was asked to hold, what it holds, and why the rest is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporters.drop_causes import cause_class
from tracer.ranks import Part
from tracer.schema import ATTENTION_PREFILL

__all__ = ["DROPS", "EVERYTHING", "NUMBERS", "Ledger", "ranges"]

NUMBERS: Final = "span_id"
"""Stands for all one-dimensional arrays over `step`: they come with the record, together or not at all."""
EVERYTHING: Final = "*"
MAX_DROPPED: Final = 1000
MAX_RANGES: Final = 50
NOT_RECEIVED: Final = "not received"
CACHED: Final = "prefix cache hit: no query was computed"

DROPS: Final[Counter[tuple[str, str]]] = Counter()
"""What all captures of this process have lost, by array and class of cause."""
Mask = NDArray[np.bool_]
Entry = dict[str, str]


class _Drop(NamedTuple):
    array: str
    step: int | None
    cause: str


class Ledger:
    """Book-keeping of one capture; pure data.

    A row is stored when all its parts are: where several ranks share the heads, each brings some of them.
    """

    def __init__(
        self, asked: Sequence[str], lengths: Mapping[str, int], parts: Mapping[str, Sequence[Part]] | None = None
    ) -> None:
        self._lengths = lengths
        """Rows of arrays whose first axis is not `step`."""
        self._parts = parts or {}
        self._begun: dict[str, dict[int, set[int]]] = {}
        """By array and step, the parts of a row that have come, while others have not."""
        self._steps: dict[str, set[int]] = {name: set() for name in (NUMBERS, *asked) if name != ATTENTION_PREFILL}
        self._drops: list[_Drop] = []
        self._facts: list[Entry] = []

    def stored(self, array: str, step: int, parts: Iterable[int] = (0,)) -> None:
        """These parts of row `step` of `array` are in the capture; an array nobody asked for is not booked."""
        if array not in self._steps or step in self._steps[array]:
            return
        count = len(self._parts.get(array, (0,)))
        if count > 1:
            rows = self._begun.setdefault(array, {})
            there = rows.setdefault(step, set())
            there.update(parts)
            if len(there) < count:
                return
            del rows[step]
        self._steps[array].add(step)

    def drop(self, array: str, step: int | None, cause: str) -> None:
        """Something of `array` was lost at `step`, or while the prompt was read (None)."""
        self._drops.append(_Drop(array, step, cause))
        DROPS[array, cause_class(cause)] += 1

    def mark(self) -> int:
        """A point that `since` counts from."""
        return len(self._drops)

    def since(self, mark: int) -> Sequence[tuple[str, int | None, str]]:
        """(array, step, cause) of what was dropped after that point."""
        return self._drops[mark:]

    def gone(self, array: str, step: int, cause: str) -> None:
        """Row `step` of `array` was in the capture and is no longer."""
        begun = self._begun.get(array, {}).pop(step, None)
        if begun is not None or step in self._steps.get(array, ()):
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

        steps: valid output tokens; prompt_seen: bool [strip, prompt row] received, None if the prompt's map was not
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
        """Rows that never came, and parts of rows by their heads."""
        causes = self._causes(array)
        groups: dict[tuple[str, str], list[int]] = {}
        for step in absent:
            for who, reason in self._absent_parts(array, step, causes.get(step, [])):
                groups.setdefault((who, reason), []).append(step)
        noun = "position" if array in self._lengths else "step"
        return [
            {"array": array, "what": who + ranges(noun, group), "reason": reason}
            for (who, reason), group in groups.items()
        ]

    def _causes(self, array: str) -> dict[int | None, list[str]]:
        causes: dict[int | None, list[str]] = {}
        for drop in self._drops:
            if drop.array == array:
                causes.setdefault(drop.step, []).append(drop.cause)
        return causes

    def _absent_parts(self, array: str, step: int, causes: Sequence[str]) -> list[tuple[str, str]]:
        """(whose, why) of what there is not of a row: "" for all of it, else the heads of one rank."""
        parts, there = self._parts.get(array, ()), self._begun.get(array, {}).get(step, set())
        of_ranks = any(cause.startswith("rank ") for cause in causes)
        if len(parts) < 2 or not (there or of_ranks):
            return [("", causes[-1] if causes else NOT_RECEIVED)]
        heads: dict[int, list[int]] = {}
        for at, part in enumerate(parts):
            if at not in there:
                heads.setdefault(part.rank, []).extend(part.heads)
        return [(f"{ranges('head', owned)}: ", _of_rank(rank, causes)) for rank, owned in heads.items()]

    def _absent_rows(self, seen: Mask, cached: int, layers: Sequence[int]) -> list[Entry]:
        """Rows of the prompt's map that never came, by layer and heads where these differ."""
        parts = self._parts.get(ATTENTION_PREFILL, ())
        causes = list(dict.fromkeys(drop.cause for drop in self._drops if drop.array == ATTENTION_PREFILL))
        if len(parts) < 2 or len(seen) != len(layers) * len(parts):
            return self._absent_of(seen, cached, layers, "", "; ".join(causes) or NOT_RECEIVED)
        if len({row.tobytes() for row in seen}) == 1:
            return self._absent_of(seen[:1], cached, layers, "", "; ".join(causes) or NOT_RECEIVED)
        out = []
        for rank in dict.fromkeys(part.rank for part in parts):
            own = [at for at, part in enumerate(parts) if part.rank == rank]
            who = ranges("head", [head for at in own for head in parts[at].heads]) + ": "
            strips = np.asarray(seen.reshape(-1, len(parts), seen.shape[1])[:, own].all(axis=1))
            out += self._absent_of(strips, cached, layers, who, _of_rank(rank, causes))
        return out

    def _absent_of(self, seen: Mask, cached: int, layers: Sequence[int], whose: str, lost: str) -> list[Entry]:
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
                    what = whose + who + ranges("row", rows)
                    out.append({"array": ATTENTION_PREFILL, "what": what, "reason": reason})
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


def _of_rank(rank: int, causes: Sequence[str]) -> str:
    """What that rank says of what it did not bring; workers put their rank before their causes."""
    own = [cause for cause in causes if cause.startswith(f"rank {rank}: ")]
    others = [cause for cause in causes if not cause.startswith("rank ")]
    return "; ".join(own or others) or f"rank {rank}: {NOT_RECEIVED}"


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
