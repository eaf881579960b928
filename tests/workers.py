"""The suite in several processes (pytest-xdist): how many, and which tests share one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

import pytest

__all__ = ["ordered", "process_count"]

MOST: Final = 2
"""Each may hold an engine, an oracle and a server: 8 GB at most."""
SESSION_SERVER: Final = "the session's server"
SINGLE: Final = ("test_families.py", "test_feature_models.py", "test_fp8.py")
"""Files in which every test makes its own engine: each may run anywhere."""


def process_count() -> int:
    """How many processes `-n auto` means."""
    return min(MOST, len(os.sched_getaffinity(0)))


def ordered(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The tests, each marked with its group, longest groups first: what is short fills the gaps at the end.

    Tests of one group run in one process, in their order, so that fixtures of a file or of the session are made once.
    """
    found = list(items)
    for item in found:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    return sorted(found, key=_rank)


def _uses_session_server(item: pytest.Item) -> bool:
    return "server" in getattr(item, "fixturenames", ())


def _group(item: pytest.Item) -> str:
    if _uses_session_server(item):
        return SESSION_SERVER
    return item.nodeid if item.path.name in SINGLE else str(item.path)


def _rank(item: pytest.Item) -> int:
    if _uses_session_server(item):
        return 0
    return 1 if item.get_closest_marker("engine") else 2
