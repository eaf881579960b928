"""The byte budget of a store: captures stop, say why, and go on once there is room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporters.store_budget import FULL_LOOK_SECONDS, LOOK_SECONDS, StoreBudget
from exporters.zarr_writer import ZarrExporter
from tests.exporters.synthetic import NOTHING, Synthetic, attributes, engine, exporter, opened, write
from tracer.prune import plan, prune
from tracer.reader import open_capture
from tracer.records import CaptureSpec, LogitsSpec
from tracer.store_files import tree_bytes

SPEC = CaptureSpec(LogitsSpec())
REASON = "store budget of 1 MB reached; run tensorspan prune"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def generation(number: int, steps: int = 8) -> Synthetic:
    """0.2 MB of logits a step."""
    return Synthetic(steps, 2, 100_000, 1, 1, SPEC, span_id=f"{number + 1:016x}")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(StoreBudget.__init__, "__defaults__", (made,))
    return made


def limited(root: Path) -> ZarrExporter:
    out = exporter(root, store_mb=1, codec="none")
    out._store.budget.wait()
    out.export(engine(1, 1), NOTHING)
    return out


def send(out: ZarrExporter, made: Synthetic) -> None:
    for record, payload in list(made.records())[1:]:
        out.export(record, payload)


def look(out: ZarrExporter) -> None:
    """What would happen beside the writer has happened."""
    out._store.budget.refusal()
    out._store.budget.wait()


def test_a_capture_stops_at_the_budget_and_says_so(tmp_path: Path, clock: Clock) -> None:
    out, made = limited(tmp_path), generation(0)
    send(out, made)
    group = opened(made.path(tmp_path))
    logits = group["logits"][:]
    np.testing.assert_array_equal(logits[:5], made.logits[:5])
    assert np.isnan(logits[5:]).all()
    assert group.attrs["missing"] == [{"array": "logits", "what": "steps 5-7", "reason": REASON}]
    assert group.attrs["dropped"]["entries"][0] == {"array": "logits", "step": 5, "cause": REASON}
    assert group["token_id"].shape == (8,), "numbers per step go on"
    assert (group.attrs["status"], group.attrs["complete"]) == ("ok", False)
    assert out.lost == {"EDQUOT": 1}
    assert out.problem is not None
    assert f"run `tensorspan prune {tmp_path}`" in out.problem


def test_new_captures_are_refused_with_the_reason(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    out = limited(tmp_path)
    send(out, generation(0))
    for number in (1, 2):
        send(out, generation(number))
        found = attributes(generation(number).path(tmp_path))
        assert (found["status"], found["closed"], found["complete"]) == ("failed", True, False)
        assert found["missing"] == [{"array": "*", "what": "all from step 0 on", "reason": REASON}]
        assert open_capture(tmp_path, generation(number).span_id).missing == found["missing"]
        assert tree_bytes(generation(number).path(tmp_path)) < 5_000
    assert out.lost == {"EDQUOT": 3}
    assert len([record for record in caplog.records if record.name == "tensorspan.zarr"]) == 1, "said once"


def test_it_goes_on_once_there_is_room(tmp_path: Path, clock: Clock) -> None:
    out = limited(tmp_path)
    send(out, generation(0))
    look(out)
    prune(tmp_path, plan(tmp_path, None, 0).remove)
    send(out, generation(1, 1))
    assert attributes(generation(1).path(tmp_path))["status"] == "failed", "nobody has looked again"
    clock.now += FULL_LOOK_SECONDS
    look(out)
    send(out, generation(2, 3))
    assert attributes(generation(2).path(tmp_path))["complete"] is True
    assert out.problem is None


def test_what_is_there_at_the_start_counts(tmp_path: Path, clock: Clock) -> None:
    write(tmp_path, generation(0, 6), codec="none")
    out = limited(tmp_path)
    look(out)
    send(out, generation(1))
    assert attributes(generation(1).path(tmp_path))["missing"][0]["reason"] == REASON


def test_what_other_processes_write_counts(tmp_path: Path, clock: Clock) -> None:
    out = limited(tmp_path)
    look(out)
    write(tmp_path, generation(0, 6), codec="none")
    clock.now += LOOK_SECONDS
    look(out)
    send(out, generation(1))
    assert attributes(generation(1).path(tmp_path))["missing"][0]["reason"] == REASON


def test_what_this_process_wrote_counts_once(tmp_path: Path, clock: Clock) -> None:
    out = limited(tmp_path)
    send(out, generation(0, 3))
    clock.now += LOOK_SECONDS
    look(out)
    send(out, generation(1, 1))
    assert attributes(generation(1).path(tmp_path))["complete"] is True


def test_without_a_budget_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.store_budget.plan", lambda *_: pytest.fail("measured"))
    out = exporter(tmp_path, codec="none")
    out.export(engine(1, 1), NOTHING)
    send(out, generation(0))
    look(out)
    assert attributes(generation(0).path(tmp_path))["complete"] is True
