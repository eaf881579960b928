"""Our traces under Jaeger's rules, its configuration under its schema, and the command that starts it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from exporters.otel_spans import OtelExporter
from tests import jaeger
from tests.exporters.collectors import GrpcCollector, attributes, named, spans_of
from tests.exporters.test_otel_spans import MS, T0, TRACE, end, request, send, start, step, whole
from tracer import semconv
from tracer.config import Settings
from tracer.records import Record

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "jaeger"
UI = json.loads((FOLDER / "ui.json").read_text())
CONFIG: dict[str, Any] = yaml.safe_load((FOLDER / "config.yaml").read_text())
SERVER = {"server.address": "127.0.0.1", "server.port": 8000}
STEPS = 2000

# Keys that Jaeger UI's `Config` type knows (packages/jaeger-ui/src/types/config.ts, commit 0453dba), and ours of them.
UI_KEYS = {
    "archiveEnabled", "criticalPathEnabled", "dependencies", "menu", "search", "traceIdDisplayLength", "topTagPrefixes",
    "tracking", "linkPatterns", "monitor", "traceGraph", "disableFileUploadControl", "disableJsonView", "forbidNewPage",
    "themes", "traceTimeline", "useOpenTelemetryTerms", "traceDiff", "qualityMetrics", "deepDependencies", "tracing",
}  # fmt: skip
# Parameters that need no attribute (packages/jaeger-ui/src/model/link-patterns.ts, the same commit).
LINK_TYPES = {"attributes", "resource", "events", "traces"}
BUILT_IN = {"trace.traceID", "trace.traceName", "trace.duration", "trace.startTime", "trace.endTime", "spanID"}


@pytest.fixture(autouse=True)
def _no_otel_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpcCollector]:
    running = GrpcCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{running.port}")
    yield running
    running.stop()


def sent(collector: GrpcCollector, records: list[Record]) -> OtelExporter:
    exporter = OtelExporter(Settings())
    send(exporter, records)
    return exporter


def long(steps: int) -> list[Record]:
    """A generation past the cap, under a request that knows its server."""
    run = [step(i, step_span_id=f"57{i:014x}") for i in range(steps)]
    return [start(), *run, end(steps), request(attributes=SERVER, end_ns=T0 + (steps + 3) * 10 * MS)]


def test_no_span_gets_a_warning(collector: GrpcCollector) -> None:
    sent(collector, whole()).shutdown(5)
    assert jaeger.warnings_of(collector.requests) == []
    for message in collector.requests:
        for resource in message.resource_spans:
            assert any(key in attributes(resource.resource) for key in jaeger.HOST_KEYS)
            resource.resource.ClearField("attributes")
    assert jaeger.warnings_of(collector.requests) == [], "not even where nobody knows the hosts"


def test_an_overhanging_child_would_be_noticed(collector: GrpcCollector) -> None:
    """The rule bites: what the test above finds is not nothing."""
    sent(collector, whole()).shutdown(5)
    for message in collector.requests:
        for resource in message.resource_spans:
            resource.resource.ClearField("attributes")
            for scope in resource.scope_spans:
                scope.spans[0].start_time_unix_nano = 1
                scope.spans.append(scope.spans[0])
    said = " ".join(jaeger.warnings_of(collector.requests))
    assert "clock skew" in said
    assert "duplicate span ID" in said


def test_a_long_generation_stays_under_what_the_ui_draws(collector: GrpcCollector) -> None:
    """Reports of slowness begin at some 2,000 spans (jaeger-ui #645)."""
    exporter = OtelExporter(Settings())
    send(exporter, long(STEPS + 500))
    exporter.shutdown(5)
    spans = spans_of(collector.requests)
    assert STEPS <= len(spans) <= STEPS + 100
    assert len({span.span_id for span in spans}) == len(spans)
    assert jaeger.warnings_of(collector.requests) == []
    assert len({span.name for span in spans}) <= 8, "span names are operations: few"


def test_only_the_generation_is_a_genai_span(collector: GrpcCollector) -> None:
    sent(collector, whole()).shutdown(5)
    [generation] = jaeger.genai_spans(spans_of(collector.requests))
    facts = attributes(generation)
    assert facts[semconv.OPERATION_NAME] == "chat", "the icon of a call of a model"
    assert facts[semconv.REQUEST_MODEL], "the pill"
    assert generation.name.startswith("chat ")


def test_each_reference_opens_its_own_span(collector: GrpcCollector) -> None:
    records = whole()
    sent(collector, [*records[:-1], request(attributes=SERVER)]).shutdown(5)
    spans = spans_of(collector.requests)
    links = jaeger.links(UI, spans)
    with_reference = [span for span in spans if "tensorspan.capture_ref" in attributes(span)]
    assert len(with_reference) > 2
    assert links == {
        span.span_id: [f"http://127.0.0.1:8000/tensorspan/open/{TRACE}/{span.span_id.hex()}"] for span in with_reference
    }
    assert {span.span_id for span in named(spans, "decode")} <= links.keys()


def test_without_a_server_there_is_no_broken_link(collector: GrpcCollector) -> None:
    sent(collector, whole()[:-1]).shutdown(5)
    assert jaeger.links(UI, spans_of(collector.requests)) == {}


def test_the_query_answer_has_the_shape_of_v3(collector: GrpcCollector) -> None:
    """`/api/v3/services`, `/operations` and `/traces` need a service, names, kinds and nanoseconds as strings."""
    sent(collector, whole()).shutdown(5)
    answer = jaeger.v3_trace(collector.requests)
    resources = answer["result"]["resourceSpans"]
    services = {
        item["value"]["stringValue"]
        for resource in resources
        for item in resource["resource"]["attributes"]
        if item["key"] == "service.name"
    }
    assert services == {"vllm"}
    spans = [span for resource in resources for scope in resource["scopeSpans"] for span in scope["spans"]]
    assert {span["traceId"] for span in spans} == {TRACE}
    assert all(isinstance(span["startTimeUnixNano"], str) for span in spans)
    assert {span["kind"] for span in spans} == {"SPAN_KIND_SERVER", "SPAN_KIND_INTERNAL"}
    assert all(scope["scope"]["name"] == semconv.SCOPE for resource in resources for scope in resource["scopeSpans"])


def test_files_of_spans_can_be_uploaded(tmp_path: Path) -> None:
    exporter = OtelExporter(Settings(store=str(tmp_path)))
    send(exporter, whole())
    assert exporter.shutdown(5)
    [path] = (tmp_path / "spans").glob("*")
    assert path.suffix == ".jsonl", "the upload goes by the name"
    spans = [s for r in jaeger.upload(path.read_text()) for scope in r["scopeSpans"] for s in scope["spans"]]
    assert {len(span["traceId"]) for span in spans} == {32}
    assert {len(span["spanId"]) for span in spans} == {16}
    assert all(int(span["startTimeUnixNano"]) >= T0 - MS for span in spans)


def test_the_ui_configuration_says_only_what_the_ui_knows() -> None:
    assert UI.keys() <= UI_KEYS
    assert UI["useOpenTelemetryTerms"] is True
    assert UI["topTagPrefixes"] == ["tensorspan."]
    for pattern in UI["linkPatterns"]:
        assert pattern.keys() == {"type", "key", "url", "text"}
        assert pattern["type"] in LINK_TYPES
        assert pattern["key"] == semconv.CAPTURE_REF
        known = BUILT_IN | SERVER.keys()
        assert set(jaeger.PARAMETER.findall(pattern["url"])) <= known
        assert pattern["url"].startswith("http://"), "values are URI-encoded: they cannot be the scheme"


def test_the_configuration_names_what_it_defines() -> None:
    service = CONFIG["service"]
    assert set(service["extensions"]) == set(CONFIG["extensions"])
    pipeline = service["pipelines"]["traces"]
    assert set(pipeline["receivers"]) == set(CONFIG["receivers"])
    assert set(pipeline["exporters"]) == set(CONFIG["exporters"])
    storage = CONFIG["extensions"]["jaeger_storage"]["backends"]
    query = CONFIG["extensions"]["jaeger_query"]
    assert {query["storage"]["traces"], CONFIG["exporters"]["jaeger_storage_exporter"]["trace_storage"]} == set(storage)
    assert query.keys() <= {"storage", "ui", "max_clock_skew_adjust", "grpc", "http", "base_path", "max_trace_size"}
    assert query["ui"]["config_file"].endswith(":-deploy/jaeger/ui.json}")


def test_nothing_listens_beyond_this_machine_unless_told() -> None:
    def endpoints(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "endpoint":
                    yield value
                else:
                    yield from endpoints(value)

    found = list(endpoints(CONFIG))
    assert len(found) == 5
    assert all(one.startswith("${env:JAEGER_LISTEN_HOST:-localhost}:") for one in found)


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A PATH with nothing but bash's own needs."""
    for name in ("bash", "dirname", "env", "cat"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    return tmp_path


def run(commands: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FOLDER / "start.sh"], env={"PATH": str(commands)}, capture_output=True, text=True, timeout=30, check=False
    )


def put(path: Path, script: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def test_start_says_what_is_missing(commands: Path) -> None:
    ended = run(commands)
    assert ended.returncode == 1
    assert "install Docker" in ended.stderr
    put(commands / "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    ended = run(commands)
    assert ended.returncode == 1
    assert "Docker does not answer (Cannot connect to the Docker daemon)" in ended.stderr


def test_start_publishes_loopback_only(commands: Path) -> None:
    put(commands / "docker", '[ "$1" = info ] || echo "$@"')
    ended = run(commands)
    assert ended.returncode == 0, ended.stderr
    asked = ended.stdout.split()
    published = [asked[i + 1] for i, word in enumerate(asked) if word == "--publish"]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert f"{FOLDER}:/etc/tensorspan:ro" in asked
    assert asked[-2:] == ["--config", "/etc/tensorspan/config.yaml"]


def test_a_jaeger_on_the_path_is_preferred(commands: Path) -> None:
    put(commands / "jaeger", 'echo "$@ $TENSORSPAN_JAEGER_UI $JAEGER_LISTEN_HOST"')
    ended = run(commands)
    assert ended.stdout.splitlines()[-1] == f"--config {FOLDER}/config.yaml {FOLDER}/ui.json 127.0.0.1"
