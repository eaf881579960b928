"""`deploy/otel-collector.yaml` against the names that the collector's schemas know, and its numbers against our spans.

No package registry of ours ships a collector with these parts, so that none starts here: what is checked is what the
documents of opentelemetry-collector(-contrib) say, and the policies' effect on traces as our exporter sends them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from exporters import otlp_sender
from exporters.otel_spans import OtelExporter
from tests.exporters.collectors import GrpcCollector, attributes, spans_of
from tests.exporters.test_otel_spans import MS, T0, end, request, send, start, step
from tracer.config import Settings
from tracer.records import Record

PATH = Path(__file__).resolve().parent.parent / "deploy" / "otel-collector.yaml"
CONFIG: dict[str, Any] = yaml.safe_load(PATH.read_text())
TAIL: dict[str, Any] = CONFIG["processors"]["tail_sampling"]
STEP_BYTES = 4096
GO_GRPC_BYTES = 4 << 20
QUICK = request(end_ns=T0)

# processor/tailsamplingprocessor/config.schema.yaml, commit 048c7a0.
TAIL_KEYS = {
    "block_on_overflow", "decision_cache", "decision_wait", "decision_wait_after_root_received",
    "drop_pending_traces_on_shutdown", "expected_new_traces_per_sec", "maximum_trace_size_bytes", "num_traces",
    "policies", "sample_on_first_match", "sampling_strategy",
}  # fmt: skip
POLICY_KEYS = {
    "status_code": {"status_codes"},
    "latency": {"threshold_ms", "upper_threshold_ms"},
    "string_attribute": {"cache_max_size", "enabled_regex_matching", "invert_match", "key", "values"},
    "numeric_attribute": {"invert_match", "key", "max_value", "min_value"},
    "probabilistic": {"hash_salt", "sampling_percentage"},
}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpcCollector]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    running = GrpcCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{running.port}")
    yield running
    running.stop()


def kept_by(spans: list[Span]) -> set[str]:
    """The policies that keep a trace, by the rules of the processor's README; `share` is left to chance."""
    return {policy["name"] for policy in TAIL["policies"] if _keeps(policy, spans)}


def _keeps(policy: dict[str, Any], spans: list[Span]) -> bool:
    rule = policy[policy["type"]]
    values = [attributes(span).get(rule.get("key")) for span in spans]
    match policy["type"]:
        case "status_code":
            wanted = {getattr(Status, f"STATUS_CODE_{code}") for code in rule["status_codes"]}
            return any(span.status.code in wanted for span in spans)
        case "latency":
            took = max(s.end_time_unix_nano for s in spans) - min(s.start_time_unix_nano for s in spans)
            return bool(took >= rule["threshold_ms"] * 10**6)
        case "string_attribute":
            patterns = [re.compile(one) for one in rule["values"]]
            return any(isinstance(value, str) and any(p.search(value) for p in patterns) for value in values)
        case "numeric_attribute":
            return any(isinstance(v, int) and rule["min_value"] <= v <= rule["max_value"] for v in values)
    return False


@pytest.mark.parametrize(
    ("records", "kept"),
    [
        ([start(capture=None), step(0, capture=False), end(1), QUICK], set()),
        ([start(), step(0), end(1), QUICK], {"captured"}),
        ([start(capture=None), step(0, capture=False), end(1), request(end_ns=T0 + 31_000 * MS)], {"slow"}),
        (
            [start(capture=None), end(0, status="error", error="Broken"), replace(QUICK, status_code=500)],
            {"failed"},
        ),
        (
            [start(), step(0, dropped={"queue full": 2}), end(1), QUICK],
            {"captured", "incomplete"},
        ),
    ],
    ids=["ordinary", "captured", "slow", "failed", "arrays lost"],
)
def test_what_the_policies_keep(collector: GrpcCollector, records: list[Record], kept: set[str]) -> None:
    exporter = OtelExporter(Settings())
    send(exporter, records)
    exporter.shutdown(5)
    assert kept_by(spans_of(collector.requests)) == kept


def test_only_names_that_the_collector_knows() -> None:
    assert TAIL.keys() <= TAIL_KEYS
    for policy in TAIL["policies"]:
        kind = policy["type"]
        assert policy.keys() == {"name", "type", kind}
        assert policy[kind].keys() <= POLICY_KEYS[kind]
    assert CONFIG["processors"]["batch"].keys() <= {"send_batch_size", "send_batch_max_size", "timeout"}
    assert CONFIG["processors"]["memory_limiter"].keys() <= {"check_interval", "limit_mib", "spike_limit_mib"}
    names = [policy["name"] for policy in TAIL["policies"]]
    assert len(set(names)) == len(names)


def test_the_pipeline_uses_everything_in_the_right_order() -> None:
    traces = CONFIG["service"]["pipelines"]["traces"]
    assert set(traces["receivers"]) == set(CONFIG["receivers"])
    assert traces["processors"] == ["memory_limiter", "tail_sampling", "batch"] == list(CONFIG["processors"])
    assert set(traces["exporters"]) == set(CONFIG["exporters"])
    assert len(traces["exporters"]) >= 2, "fan-out"


def test_messages_fit() -> None:
    received = CONFIG["receivers"]["otlp"]["protocols"]["grpc"]["max_recv_msg_size_mib"] << 20
    assert received > otlp_sender.BATCH * STEP_BYTES
    assert otlp_sender.BATCH_BYTES < GO_GRPC_BYTES
    batch = CONFIG["processors"]["batch"]
    assert batch["send_batch_size"] <= batch["send_batch_max_size"]
    assert batch["send_batch_max_size"] * STEP_BYTES < GO_GRPC_BYTES


def test_what_is_decided_stays_decided_and_exporters_hold_as_long_as_we_do() -> None:
    cache = TAIL["decision_cache"]
    assert min(cache["sampled_cache_size"], cache["non_sampled_cache_size"]) >= 10 * TAIL["num_traces"]
    for exporter in CONFIG["exporters"].values():
        assert exporter["retry_on_failure"]["max_elapsed_time"] == f"{otlp_sender.HOLD_SECONDS:.0f}s"
        assert exporter["sending_queue"]["queue_size"]


def test_it_listens_on_loopback_unless_told() -> None:
    for protocol in CONFIG["receivers"]["otlp"]["protocols"].values():
        assert protocol["endpoint"].startswith("${env:OTEL_LISTEN_HOST:-127.0.0.1}:")
