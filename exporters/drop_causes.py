"""Why an array was dropped, in a few words that a metric can carry: the full text has positions and ranks in it."""

from __future__ import annotations

from typing import Final

__all__ = ["cause_class"]

CLASSES: Final = (
    ("queue full", "queue_full"),
    ("the spool of", "spool_full"),
    ("store budget", "store_budget"),
    ("byte budget", "request_budget"),
    ("were not seen", "layer_not_seen"),
    ("does not fit", "unreadable"),
    ("unreadable", "unreadable"),
)
"""Part of a cause, and its class; the first that fits counts."""


def cause_class(cause: str) -> str:
    """The class of a cause of `Ledger.drop`; `other` for an error's own text."""
    return next((name for part, name in CLASSES if part in cause), "other")
