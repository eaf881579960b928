"""The suite in several processes (pytest-xdist): how many, and which tests share one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

import pytest
from xdist.scheduler import LoadScopeScheduling

__all__ = ["Scheduling", "ordered", "process_count"]

MOST: Final = 2
"""Each may hold an engine, an oracle and a server: 8 GB at most."""
SESSION_SERVER: Final = ("test_agent.py", "test_concurrency.py", "test_phoenix.py", "test_server.py", "test_signals.py")
"""Files whose tests share the session's server, and so a process; one that is not named here starts a second."""
SINGLE: Final = ("test_families.py", "test_feature_models.py", "test_fp8.py")
"""Files in which every test makes its own engine: each may run anywhere."""


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Tests of one group run in one process, in their order, so that what they share is made once."""

    def _split_scope(self, nodeid: str) -> str:
        """The group of a test: all of the session's server, one test, or its file."""
        file = nodeid.partition("::")[0]
        name = file.rpartition("/")[2]
        if name in SESSION_SERVER:
            return "server"
        return nodeid if name in SINGLE else file


def process_count() -> int:
    """How many processes `-n auto` means."""
    return min(MOST, len(os.sched_getaffinity(0)))


def ordered(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The longest groups first: what is short fills the gaps at the end."""
    return sorted(items, key=_rank)


def _rank(item: pytest.Item) -> int:
    if item.path.name in SESSION_SERVER:
        return 0
    return 1 if item.get_closest_marker("engine") else 2
