"""A server that removes what is older than it was told to keep."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from exporters.retention import EVERY_SECONDS, Retention
from tests.exporters.synthetic import DECODE, Synthetic, exporter
from tracer import config
from tracer.errors import SettingsError
from tracer.reader import find_captures

HOUR_NS = 3_600 * 10**9


def write(root: Path, number: int, hours: int, **settings: str) -> None:
    """A capture that began so many hours ago, and everything that an exporter does about old ones meanwhile."""
    made = Synthetic(2, 2, 8, 1, 1, DECODE, span_id=f"{number + 1:016x}")
    out = exporter(root, **settings)
    for record, payload in made.records():
        changed = made.start(start_ns=time.time_ns() - hours * HOUR_NS) if record == made.start() else record
        out.export(changed, payload)
        out._store._retention.wait()
    assert out.lost == {}
    assert out.shutdown(1.0)


def test_old_captures_go_when_the_next_one_begins(tmp_path: Path) -> None:
    for number, hours in enumerate((30, 2)):
        write(tmp_path, number, hours)
    write(tmp_path, 2, 0, keep="1d")
    assert [entry.span_id for entry in find_captures(tmp_path)] == [f"{3:016x}", f"{2:016x}"]


def test_once_an_hour(tmp_path: Path) -> None:
    now = [0.0]
    retention = Retention(tmp_path, "1d", lambda: now[0])
    write(tmp_path, 0, 30)
    retention.look()
    retention.wait()
    assert find_captures(tmp_path) == []
    write(tmp_path, 1, 30)
    retention.look()
    retention.wait()
    assert len(find_captures(tmp_path)) == 1
    now[0] += EVERY_SECONDS
    retention.look()
    retention.wait()
    assert find_captures(tmp_path) == []


def test_a_store_that_cannot_be_pruned_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("exporters.retention.prune", refuse)
    write(tmp_path, 0, 30, keep="1d")
    assert "cannot be removed: [Errno 13] Permission denied" in caplog.text


def test_without_the_setting_everything_stays(tmp_path: Path) -> None:
    write(tmp_path, 0, 10_000)
    write(tmp_path, 1, 0)
    assert len(find_captures(tmp_path)) == 2


def test_the_setting_is_checked_where_it_is_read() -> None:
    assert config.load({"keep": "7d"}, {}).keep == "7d"
    with pytest.raises(SettingsError, match="TENSORSPAN_KEEP='week' is not a duration"):
        config.load({}, {"TENSORSPAN_KEEP": "week"})
