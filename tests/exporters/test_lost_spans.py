"""For every capture on disk its span has arrived, or the capture says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters.otel_spans import OtelExporter
from exporters.zarr_writer import ZarrExporter
from tests.exporters.collectors import GrpcCollector, free_port
from tests.exporters.synthetic import Synthetic
from tracer import metric_names, open_capture
from tracer.config import Settings

GENERATIONS = [Synthetic(steps=3, span_id=f"{number + 1:016x}") for number in range(2)]


def record(root: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> OtelExporter:
    """Two captured generations, whose spans go to that port."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", "true")
    settings = Settings(store=str(root))
    spans, arrays = OtelExporter(settings), ZarrExporter(settings)
    for work in GENERATIONS:
        for item, payload in work.records():
            spans.export(item, payload)
            arrays.export(item, payload)
    assert arrays.shutdown(10)
    return spans


def test_captures_say_that_their_spans_were_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = record(tmp_path, free_port(), monkeypatch)
    assert not spans.shutdown(0.5)
    for work in GENERATIONS:
        cap = open_capture(work.path(tmp_path))
        assert (cap.spans_lost, cap.traced, cap.complete) == ("shutdown", True, True)
    lost = {dict(figure.attributes)["tensorspan.drop.cause"]: figure.value for figure in spans.figures()}
    assert lost["shutdown"] == sum(figure.value for figure in spans.figures() if figure.name == metric_names.SPANS_LOST)
    assert lost["shutdown"] == 2 * (1 + 3)


def test_captures_whose_spans_arrived_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = GrpcCollector()
    spans = record(tmp_path, collector.port, monkeypatch)
    assert spans.force_flush(10)
    assert spans.shutdown(10)
    collector.stop()
    assert [open_capture(work.path(tmp_path)).spans_lost for work in GENERATIONS] == ["", ""]


def test_a_capture_that_is_gone_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    spans = record(tmp_path, free_port(), monkeypatch)
    shutil.rmtree(GENERATIONS[0].path(tmp_path))
    spans.shutdown(0.5)
    assert not GENERATIONS[0].path(tmp_path).exists()
