"""The real exporter process behind the real channel, killed at random moments; 200 rounds are a benchmark's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.exporters.crashing import VICTIMS, Victim, crash

RANDOM = random.Random(7)
DELAYS = [RANDOM.uniform(0.0, 0.35) for _ in range(7)]


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", DELAYS, ids=lambda delay: f"{delay:.3f}s")
@pytest.mark.parametrize("victim", VICTIMS)
def test_every_acknowledged_step_is_whole(tmp_path: Path, victim: Victim, delay_s: float) -> None:
    outcome = crash(tmp_path, victim, delay_s)
    assert outcome.problems == []
    assert outcome.stored >= outcome.acknowledged
    assert outcome.statuses or not outcome.acknowledged, "killed before anything was there"
