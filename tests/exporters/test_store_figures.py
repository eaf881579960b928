"""What the writer says about its store: size, captures it lost, and arrays dropped on either side of the queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters.drop_causes import cause_class
from exporters.ledger import DROPS
from exporters.zarr_writer import ZarrExporter
from tests.exporters.synthetic import NOTHING, Synthetic, engine, exporter
from tracer import metric_names as names
from tracer.records import CaptureSpec, LogitsSpec
from tracer.store_files import tree_bytes

MADE = Synthetic(3, spec=CaptureSpec(LogitsSpec()))


@pytest.fixture(autouse=True)
def _nothing_dropped() -> None:
    DROPS.clear()


def figures(out: ZarrExporter) -> dict[tuple[str, ...], float]:
    return {(item.name, *(value for _, value in item.attributes)): item.value for item in out.figures()}


def test_the_size_of_the_store_once_it_has_been_looked_at(tmp_path: Path) -> None:
    out = exporter(tmp_path)
    for record, payload in MADE.records():
        out.export(record, payload)
    list(out.figures())
    out._store.budget.wait()
    assert figures(out)[names.STORE_SIZE,] == pytest.approx(tree_bytes(MADE.path(tmp_path)), rel=0.2)
    assert out.shutdown(10)


def test_drops_of_the_worker_and_of_the_writer(tmp_path: Path) -> None:
    out = exporter(tmp_path, request_mb=0)
    out.export(engine(), NOTHING)
    out.export(MADE.start(), NOTHING)
    out.export(MADE.step(0, without=["logits"], dropped=("logits: rank 0: queue full",))[0], NOTHING)
    out.export(*MADE.step(1))
    out.export(MADE.end(), NOTHING)
    found = figures(out)
    assert found[names.ARRAYS_DROPPED, "logits", "queue_full"] == 1
    assert found[names.ARRAYS_DROPPED, "logits", "request_budget"] == 1
    assert out.shutdown(10)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    out = exporter(tmp_path / "file")
    out.export(engine(), NOTHING)
    out.export(MADE.start(), NOTHING)
    lost = [value for (name, *_), value in figures(out).items() if name == names.CAPTURE_LOST]
    assert sum(lost) >= 1
    out.shutdown(10)


@pytest.mark.parametrize(
    ("cause", "known"),
    [
        ("queue full at positions 3 to 9", "queue_full"),
        ("rank 1: 2 of 4 layers were not seen", "layer_not_seen"),
        ("the spool of s3://b/c is full", "spool_full"),
        ("store budget of 1 MB reached; run tensorspan prune", "store_budget"),
        ("byte budget of 4096 MB reached", "request_budget"),
        ("block (3,) at (0,) does not fit the array", "unreadable"),
        ("unreadable: buffer is too small", "unreadable"),
        ("layer 3: CUDA error", "other"),
    ],
)
def test_causes_have_classes(cause: str, known: str) -> None:
    assert cause_class(cause) == known
