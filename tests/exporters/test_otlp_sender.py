"""The queue and the transports: file, full queue, dead and hanging collectors, settings that cannot work."""

from __future__ import annotations

import base64
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext

from exporters.otlp_sender import RESERVE, Sender
from exporters.span_transport import open_transport
from tracer.config import Settings, spool_directory
from tracer.errors import SettingsError

TRACE = 0x0AF7651916CD43DD8448EB211C80319C


@pytest.fixture(autouse=True)
def _no_otel_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


class Stuck(SpanExporter):
    """Takes one batch and holds it until it is let go."""

    def __init__(self) -> None:
        self.holding = threading.Event()
        self.let_go = threading.Event()
        self.names: list[str] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.holding.set()
        assert self.let_go.wait(10)
        self.names += [span.name for span in spans]
        return SpanExportResult.SUCCESS


def bare(name: str, number: int = 1) -> ReadableSpan:
    context = SpanContext(TRACE, number, is_remote=False)
    numbers = {"tensorspan.logits.entropy": 0.5, "tensorspan.step.index": number}
    return ReadableSpan(name, context, resource=Resource.get_empty(), attributes=numbers, start_time=1, end_time=2)


def otlp_json(line: dict[str, Any]) -> list[Span]:
    """Spans of one line. OTLP JSON is protobuf JSON except for IDs, which are hexadecimal; an unknown field fails."""

    def fix(node: Any) -> Any:
        if isinstance(node, list):
            return [fix(one) for one in node]
        if not isinstance(node, dict):
            return node
        ids = ("traceId", "spanId", "parentSpanId")
        return {k: hex_to_base64(v) if k in ids else fix(v) for k, v in node.items()}

    out = pb.ExportTraceServiceRequest()
    ParseDict(fix(line), out)
    return [s for rs in out.resource_spans for ss in rs.scope_spans for s in ss.spans]


def hex_to_base64(text: str) -> str:
    return base64.b64encode(bytes.fromhex(text)).decode()


def test_file_in_the_store_without_a_collector(tmp_path: Path) -> None:
    sender = Sender(open_transport(Settings(store=str(tmp_path))))
    assert sender.flush(1)
    assert list(tmp_path.iterdir()) == [], "nothing is created before the first span"
    for number in (1, 2):
        assert sender.offer(bare("decode", number))
        assert sender.flush(10)
    [path] = (tmp_path / "spans").glob("*.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sender.close(5)
    spans = [
        s for line in path.read_text().splitlines() for s in otlp_json(json.loads(line, parse_constant=pytest.fail))
    ]
    assert [(s.name, s.trace_id.hex(), s.span_id.hex()) for s in spans] == [
        ("decode", f"{TRACE:032x}", f"{number:016x}") for number in (1, 2)
    ]
    assert {item.key for s in spans for item in s.attributes} == {"tensorspan.logits.entropy", "tensorspan.step.index"}


def test_unwritable_store_loses_spans_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spans").write_text("a file where the directory should be")
    sender = Sender(open_transport(Settings(store=str(tmp_path))))
    sender.offer(bare("decode"))
    assert not sender.flush(5)
    assert sender.dropped == 1
    assert "make the store writable" in caplog.text


def test_spans_of_a_store_in_a_bucket_go_into_its_spool(tmp_path: Path) -> None:
    settings = Settings(store="s3://bucket/captures", spool=str(tmp_path))
    sender = Sender(open_transport(settings))
    sender.offer(bare("decode"))
    assert sender.flush(5)
    (file,) = spool_directory(settings).glob("spans/*.jsonl")
    assert "decode" in file.read_text()
    assert sender.close(5)


def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(SettingsError, match="http/json"):
        open_transport(Settings())


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("alive", [False, True], ids=["closed port", "never answers"])
def test_no_collector_makes_anybody_wait(monkeypatch: pytest.MonkeyPatch, protocol: str, *, alive: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if alive:
            listener.listen(16)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        sender = Sender(open_transport(Settings()))
        assert all(sender.offer(bare("decode", number)) for number in range(1, 1001))
        began = time.monotonic()
        assert not sender.flush(0.3)
        assert time.monotonic() - began < 1.0
        began = time.monotonic()
        assert not sender.close(0.3)
        assert time.monotonic() - began < 1.0
        assert sender.dropped == 1000


def test_full_queue_refuses_steps_first_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    stuck = Stuck()
    sender = Sender(lambda: stuck, capacity=10)
    assert sender.offer(bare("first"))
    assert not sender.flush(0)
    assert stuck.holding.wait(10)
    assert [sender.offer(bare("step")) for _ in range(12)] == [True] * 10 + [False] * 2
    assert all(sender.offer(bare("trunk"), reserve=True) for _ in range(RESERVE))
    assert not sender.offer(bare("trunk"), reserve=True)
    assert sender.dropped == 3
    assert caplog.text.count("spans are being lost") == 1
    stuck.let_go.set()
    assert sender.close(10)
    assert (len(stuck.names), stuck.names[:2], stuck.names[-1]) == (11 + RESERVE, ["first", "step"], "trunk")
    assert not sender.offer(bare("late"))


def test_a_failing_exporter_is_counted_and_the_next_batch_still_goes(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([SpanExportResult.FAILURE, SpanExportResult.SUCCESS])
    exporter = Stuck()
    exporter.export = lambda spans: next(answers)  # type: ignore[method-assign]
    sender = Sender(lambda: exporter)
    sender.offer(bare("one"))
    assert not sender.flush(10), "what was lost is not flushed"
    sender.offer(bare("two"))
    assert sender.flush(10)
    assert sender.close(10)
    assert sender.dropped == 1
    assert "1 spans were lost" in caplog.text
