"""What holds for every test: mistakes of ours are raised, not swallowed; and the S3 server that several need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests import workers
from tests.exporters.seaweed import Seaweed
from tracer._guard import Guard


def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means."""
    return workers.process_count()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> workers.Scheduling:
    """What `--dist loadscope` means."""
    return workers.Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In several processes, the longest first."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items[:] = workers.ordered(items)


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "strict", True)


@pytest.fixture(scope="session")
def running_seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """One server for the session."""
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def seaweed(running_seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Seaweed:
    """The server, with its credentials in this process's environment."""
    for name, value in running_seaweed.environment().items():
        monkeypatch.setenv(name, value)
    return running_seaweed
