"""What holds for every test: mistakes of ours are raised, not swallowed."""

from __future__ import annotations

import pytest

from tracer._guard import Guard


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "strict", True)
