"""Durations and sizes as people write them: `7d`, `50G`."""

from __future__ import annotations

import re
from typing import Final

from tracer.errors import SettingsError

__all__ = ["parse_bytes", "parse_seconds"]

DURATIONS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
SIZES: Final = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as `90s`, `45m`, `12h`, `7d` or `2w`; SettingsError if it is none."""
    return _quantity(text, DURATIONS, "a duration: a number with s, m, h, d or w, such as 7d")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `500M`, `50G` or `1.5T`, decimal; SettingsError if it is none."""
    return int(_quantity(text.removesuffix("B"), SIZES, "a size: a number with k, M, G or T (decimal), such as 50G"))


def _quantity(text: str, units: dict[str, int], what: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]?)", text)
    if match is None or match[2] not in units:
        raise SettingsError(f"{text!r} is not {what}")
    return float(match[1]) * units[match[2]]
