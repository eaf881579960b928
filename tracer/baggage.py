"""W3C Baggage, of which one member or another is read."""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote

__all__ = ["baggage_member"]

MAX_BAGGAGE: Final = 8192
"""Bytes that a header may have (W3C Baggage 3.3.2); a longer one is not read at all."""


def baggage_member(text: str, wanted: str) -> str | None:
    """The value of that member of W3C baggage; None if it has none or is over its size limit."""
    if len(text) > MAX_BAGGAGE:
        return None
    for member in text.split(","):
        name, found, value = member.partition(";")[0].partition("=")
        if found and name.strip() == wanted:
            return unquote(value.strip())
    return None
