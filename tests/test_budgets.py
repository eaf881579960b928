"""Budgets: what is taken, what is paid afterwards, and how long to wait."""

from __future__ import annotations

import pytest

from tracer.budgets import Budgets, Spent, captured_bytes
from tracer.config import Settings
from tracer.context import parse_capture
from tracer.keys import Key
from tracer.records import EngineInfo, LayerInfo

MB = 1_000_000


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def key(per_minute: float = 0, per_hour: float = 0) -> Key:
    return Key("alice", b"", frozenset(), False, per_minute, per_hour)


def test_captures_per_minute() -> None:
    clock = Clock()
    budgets = Budgets(Settings(captures_per_minute=2), clock)
    assert [budgets.admit(None) for _ in range(2)] == [None, None]
    assert budgets.admit(None) == Spent("TENSORSPAN_CAPTURES_PER_MINUTE", 30)
    clock.now += 29
    assert budgets.admit(None) == Spent("TENSORSPAN_CAPTURES_PER_MINUTE", 1)
    clock.now += 1
    assert budgets.admit(None) is None
    clock.now += 3600
    assert [budgets.admit(None) is None for _ in range(3)] == [True, True, False], "what was saved is a minute's worth"


def test_less_than_one_a_minute() -> None:
    clock = Clock()
    budgets = Budgets(Settings(captures_per_minute=0.5), clock)
    assert budgets.admit(None) is None
    assert budgets.admit(None) == Spent("TENSORSPAN_CAPTURES_PER_MINUTE", 120)
    clock.now += 120
    assert budgets.admit(None) is None


def test_bytes_are_paid_afterwards() -> None:
    clock = Clock()
    budgets = Budgets(Settings(capture_mb_per_hour=3.6), clock)  # 1,000 bytes a second.
    assert budgets.admit(None) is None
    budgets.pay(None, 5 * MB)
    spent = budgets.admit(None)
    assert spent == Spent("TENSORSPAN_CAPTURE_MB_PER_HOUR", 1401)
    clock.now += 1401
    assert budgets.admit(None) is None


def test_a_key_has_limits_of_its_own_beside_those_of_all() -> None:
    clock = Clock()
    budgets, alice = Budgets(Settings(captures_per_minute=3), clock), key(per_minute=1)
    assert budgets.admit(alice) is None
    assert budgets.admit(alice) == Spent("captures_per_minute of the key alice", 60)
    assert [budgets.admit(None) is None for _ in range(3)] == [True, True, False], "what was refused took nothing"
    assert [Budgets(Settings(), clock).admit(None) for _ in range(1000)] == [None] * 1000


LAYERS = tuple(LayerInfo(index, f"layers.{index}", 4, 2, 8, 1.0) for index in range(3))
ENGINE = EngineInfo("m", "0.32.0", "V1", "cpu", "float32", 100, 64, LAYERS)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("logits", 5 * 100 * 2),
        ("logits;dtype=f32", 5 * 100 * 4),
        ("logits;top=7", 5 * 7 * (2 + 4)),
        ("attention", (10 + 11 + 12 + 13 + 14) * 3 * 4 * 2),
        ('attention=(0 2);heads="1-2"', (10 + 11 + 12 + 13 + 14) * 2 * 2 * 2),
        ("attention;rows=all", (55 + 60) * 3 * 4 * 2),
        ("qk;dtype=f16", 3 * 8 * (5 * 4 + 15 * 2) * 2),
        ("qk=(1);rows=all;dtype=f16", 8 * (15 * 4 + 15 * 2) * 2),
        ("prompt_logits", 10 * 100 * 2),
        ("summary", 0),
    ],
)
def test_bytes_of_a_capture(asked: str, expected: int) -> None:
    spec = parse_capture(asked)
    assert spec is not None
    assert captured_bytes(spec, ENGINE, prompt=10, output=5) == expected
