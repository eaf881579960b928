"""Which prompt tokens came from which message: found by text, so that no chat template has to be understood."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from tracer.records import Region

__all__ = ["find_regions"]

TEMPLATE = "template"
"""Role of tokens between messages: markers, role names, generation prompt."""


def find_regions(messages: Sequence[tuple[str, str]], tokens: Sequence[bytes]) -> tuple[Region, ...]:
    """Cover all of `tokens` with regions; a message that the template changed (not found) is left in its template.

    A token that straddles a border belongs to the message: its first byte decides for the start, its last for the end.
    """
    if not tokens:
        return ()
    text, ends = b"".join(tokens), list(accumulate(len(token) for token in tokens))
    regions: list[Region] = []
    at, covered = 0, 0
    for role, content in messages:
        needle = content.strip().encode()
        found = text.find(needle, at) if needle else -1
        if found < 0:
            continue
        at = found + len(needle)
        start, end = max(bisect_right(ends, found), covered), bisect_left(ends, at) + 1
        if start > covered:
            regions.append(Region(TEMPLATE, covered, start))
        regions.append(Region(role, start, end))
        covered = end
    if covered < len(tokens):
        regions.append(Region(TEMPLATE, covered, len(tokens)))
    return tuple(regions)
