"""A bucket for the tests of remote stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exporters.seaweed import BUCKET, Seaweed


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


@pytest.fixture
def bucket(seaweed: Seaweed, tmp_path: Path) -> str:
    """The URL of a store that nobody else uses."""
    return f"s3://{BUCKET}/{tmp_path.name}"
