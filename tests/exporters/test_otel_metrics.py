"""Metrics from records: histograms and figures as the SDK reads them, exemplars, OTLP at a real receiver, the page."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricReader

from exporters.otel_metrics import MetricsExporter
from tests.exporters.collectors import GrpcCollector
from tests.exporters.test_otel_spans import (
    GENERATION,
    MS,
    REQUEST,
    SECRET_ID,
    SECRET_TEXT,
    T0,
    TRACE,
    end,
    request,
    start,
    step,
    whole,
)
from tracer import metric_names as names
from tracer.config import Settings
from tracer.figures import Board, Figure
from tracer.metric_names import METRICS
from tracer.metrics_file import metrics_file, read_metrics
from tracer.records import EngineInfo, PlainGeneration, Record, RequestSpan, WorkerEnd

ARRAYS = memoryview(bytes(1000))
LABELS = {
    "gen_ai.operation.name": "chat", "gen_ai.provider.name": "vllm",
    "gen_ai.request.model": "SmolLM2", "gen_ai.response.model": "SmolLM2",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_otel_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


class Measured:
    """An exporter with a reader, and what it shows."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.reader = InMemoryMetricReader()
        readers: list[MetricReader] = [self.reader]
        self.exporter = MetricsExporter(settings or Settings(), readers)

    def send(self, *records: Record) -> None:
        for record in records:
            self.exporter.export(record, ARRAYS)
        self.exporter.watch(tuple(self.exporter.figures()))

    def points(self, *wanted: str) -> list[Any]:
        """The points of one metric; of several, a list for each."""
        data = self.reader.get_metrics_data()
        assert data is not None
        metrics = [m for part in data.resource_metrics for scope in part.scope_metrics for m in scope.metrics]
        found = [[p for m in metrics if m.name == name for p in m.data.data_points] for name in wanted]
        return found[0] if len(found) == 1 else found


def plain(**changes: Any) -> PlainGeneration:
    facts = {"parent_span_id": REQUEST, "prompt_tokens": 16, "end_ns": T0 + 500 * MS, "output_tokens": 5}
    return PlainGeneration("SmolLM2", "chat", T0, **{**facts, "first_token_ns": T0 + 100 * MS, **changes})


def asked(**changes: Any) -> RequestSpan:
    return request(operation="chat", **changes)


def test_a_sampled_request_is_measured_with_exemplars() -> None:
    measured = Measured()
    measured.send(*whole(output_tokens=4)[:-1], asked())
    # One reading: the SDK shows an exemplar to the first only.
    [duration], [first] = measured.points(names.REQUEST_DURATION, names.TIME_TO_FIRST_TOKEN)
    assert dict(duration.attributes) == LABELS
    assert (duration.count, duration.sum) == (1, pytest.approx(9.001))
    assert duration.explicit_bounds == names.METRICS[0].buckets
    [exemplar] = duration.exemplars
    assert (f"{exemplar.trace_id:032x}", f"{exemplar.span_id:016x}") == (TRACE, REQUEST)
    assert (first.count, first.sum) == (1, pytest.approx(0.02))
    assert f"{first.exemplars[0].span_id:016x}" == GENERATION


def test_time_per_token_and_usage() -> None:
    measured = Measured()
    measured.send(plain(), plain(choice=1), asked(sampled=False))
    [each] = measured.points(names.TIME_PER_OUTPUT_TOKEN)
    assert (each.count, each.sum) == (2, pytest.approx(0.2))
    usage = {p.attributes["gen_ai.token.type"]: (p.count, p.sum) for p in measured.points(names.TOKEN_USAGE)}
    assert usage == {"input": (1, 16), "output": (2, 10)}


def test_an_unsampled_request_counts_without_an_exemplar() -> None:
    measured = Measured()
    measured.send(plain(), asked(sampled=False))
    [duration] = measured.points(names.REQUEST_DURATION)
    assert (duration.count, duration.exemplars) == (1, [])


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (asked(status_code=400), "400"),
        (asked(status_code=503), "503"),
        (asked(error="client disconnected"), "cancelled"),
        (asked(error="ValueError: x", status_code=500), "ValueError"),
    ],
)
def test_failures_are_apart(record: RequestSpan, kind: str) -> None:
    measured = Measured()
    measured.send(EngineInfo("SmolLM2", "0.32.0", "V1", "cpu", "float32", 10, 20), record)
    [duration] = measured.points(names.REQUEST_DURATION)
    assert dict(duration.attributes) == {**LABELS, "error.type": kind}


def test_a_generation_that_failed_has_no_token_times() -> None:
    measured = Measured()
    measured.send(plain(status="aborted", parent_span_id=None))
    assert measured.points(names.TIME_TO_FIRST_TOKEN) == []
    [duration] = measured.points(names.REQUEST_DURATION)
    assert duration.attributes["error.type"] == "cancelled"


def test_captures_and_their_bytes() -> None:
    measured = Measured()
    now = time.time_ns()
    measured.send(start(), step(0, end_ns=now - 2_000 * MS), WorkerEnd(TRACE, GENERATION, records_lost=3))
    assert [p.value for p in measured.points(names.CAPTURE_OPEN)] == [1]
    assert [p.value for p in measured.points(names.CAPTURE_BYTES)] == [1000]
    assert measured.points(names.WRITER_LAG)[0].value == pytest.approx(2, abs=1)
    assert [p.value for p in measured.points(names.RECORDS_LOST)] == [3]
    measured.send(end(1, status="aborted"))
    assert [p.value for p in measured.points(names.CAPTURE_OPEN)] == [0]
    [ended] = measured.points(names.CAPTURE_FINISHED)
    assert (ended.value, dict(ended.attributes)) == (1, {"tensorspan.capture.outcome": "aborted"})


def test_the_board_asks_everybody_once_a_second_and_equal_figures_add_up() -> None:
    class Queue:
        def figures(self) -> list[Figure]:
            return [Figure(names.QUEUE_USAGE, 40, (("tensorspan.queue.role", "worker"),))]

    measured, now = Measured(), [0.0]
    board = Board([Queue(), Queue(), measured.exporter], lambda: now[0])
    board.look()
    [usage] = measured.points(names.QUEUE_USAGE)
    assert (usage.value, dict(usage.attributes)) == (80, {"tensorspan.queue.role": "worker"})
    measured.exporter.export(WorkerEnd(TRACE, GENERATION, records_lost=1), ARRAYS)
    now[0] = 0.9
    board.look()
    assert measured.points(names.RECORDS_LOST)[0].value == 0
    now[0] = 1.1
    board.look()
    assert measured.points(names.RECORDS_LOST)[0].value == 1


def test_nothing_of_the_content_is_in_any_metric(tmp_path: Path) -> None:
    measured = Measured(Settings(socket=str(tmp_path / "x.sock")))
    measured.send(*whole(output_tokens=4), asked())
    data = measured.reader.get_metrics_data()
    assert data is not None
    text = data.to_json() + metrics_file(tmp_path / "x.sock").read_text(encoding="utf-8")
    assert "gen_ai_server_request_duration_seconds" in text
    assert str(SECRET_ID) not in text
    assert SECRET_TEXT not in text


def test_the_page_keeps_the_last_exemplar_of_each_bucket(tmp_path: Path) -> None:
    measured = Measured(Settings(socket=str(tmp_path / "x.sock")))
    measured.send(*whole(output_tokens=4)[:-1], asked())
    measured.send(plain(), asked(sampled=False))
    families = {family["name"]: family for family in read_metrics(metrics_file(tmp_path / "x.sock"))}
    assert metrics_file(tmp_path / "x.sock").stat().st_mode & 0o777 == 0o600
    duration = families["gen_ai_server_request_duration_seconds"]
    assert (duration["type"], duration["unit"]) == ("histogram", "seconds")
    buckets = [sample for sample in duration["samples"] if sample[0] == "_bucket"]
    assert [sample[2] for sample in buckets if sample[1]["le"] in ("5.12", "10.24", "+Inf")] == [0, 2, 2]
    [exemplar] = [sample[3] for sample in buckets if sample[3]]
    assert exemplar[0] == {"trace_id": TRACE, "span_id": REQUEST}
    assert families["tensorspan_capture_bytes"]["samples"][0][0] == "_total"
    assert families["tensorspan_writer_lag_seconds"]["type"] == "gauge"


@pytest.mark.parametrize("choice", ["never", "always"])
def test_exemplars_follow_the_standard_filter(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXEMPLAR_FILTER", {"never": "always_off", "always": "always_on"}[choice])
    measured = Measured()
    measured.send(plain(), asked(sampled=False))
    [duration] = measured.points(names.REQUEST_DURATION)
    assert len(duration.exemplars) == (choice == "always")


def test_otlp_at_a_real_receiver_and_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = GrpcCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
    exporter = MetricsExporter(Settings())
    exporter.export(plain(parent_span_id=None), ARRAYS)
    exporter.watch(tuple(exporter.figures()))
    assert exporter.shutdown(10)
    assert set(collector.metrics()) >= {names.REQUEST_DURATION, names.CAPTURE_BYTES, names.WRITER_LAG}
    exporter = MetricsExporter(Settings())
    collector.stop()
    exporter.export(plain(parent_span_id=None), ARRAYS)
    began = time.monotonic()
    exporter.shutdown(0.5)
    assert time.monotonic() - began < 1.5


def test_metrics_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    exporter = MetricsExporter(Settings())
    exporter.export(plain(), ARRAYS)
    assert exporter.shutdown(0.5)


def test_the_docs_name_every_metric() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [item.name for item in METRICS if f"| `{item.name}` | {item.kind} | `{item.unit}` |" not in page] == []


def test_a_page_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.json") == []
    (tmp_path / "some.json").write_text(json.dumps([{"name": "x"}]), encoding="utf-8")
    assert read_metrics(tmp_path / "some.json") == [{"name": "x"}]
