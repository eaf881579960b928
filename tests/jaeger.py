"""What Jaeger 2.20 and its UI do with spans, as far as it concerns ours; read from their sources, see docs/backends.md.

Jaeger itself is in no package registry that the tests use. These are the rules that its adjusters and its UI follow,
applied to OTLP as a collector gets it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote

from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.exporters.collectors import attributes, spans_of

__all__ = ["HOST_KEYS", "genai_spans", "links", "upload", "v3_trace", "warnings_of"]

HOST_KEYS: Final = ("host.id", "host.ip", "host.name")
PARAMETER: Final = re.compile(r"#\{([^{}]*)\}")
ID_FIELDS: Final = ("traceId", "spanId", "parentSpanId")


def warnings_of(requests: Sequence[ExportTraceServiceRequest], *, complete: bool = True) -> list[str]:
    """The warnings that Jaeger would put on spans of one trace (adjusters of clock skew, IDs and parents)."""
    spans = spans_of(requests)
    by_id = {span.span_id: span for span in spans}
    hosts = {
        span.span_id: next((facts[key] for key in HOST_KEYS if key in facts), "")
        for request in requests
        for resource in request.resource_spans
        for facts in (attributes(resource.resource),)
        for scope in resource.scope_spans
        for span in scope.spans
    }
    found = [f"duplicate span ID {key.hex()}" for key, count in Counter(s.span_id for s in spans).items() if count > 1]
    roots = [span for span in spans if span.parent_span_id not in by_id]
    if complete and len(roots) != 1:
        found += [f"parent span ID={span.parent_span_id.hex()} is not in the trace" for span in roots]
    for span in spans:
        parent = by_id.get(span.parent_span_id)
        same = parent is not None and hosts[span.span_id] and hosts[span.span_id] == hosts[parent.span_id]
        if parent is not None and not same and not _inside(span, parent):
            found.append(f"clock skew adjustment disabled; not applying calculated delta to {span.name}")
    return found


def _inside(span: Span, parent: Span) -> bool:
    return (
        parent.start_time_unix_nano <= span.start_time_unix_nano
        and span.end_time_unix_nano <= parent.end_time_unix_nano
    )


def genai_spans(spans: Sequence[Span]) -> list[Span]:
    """Spans that get the UI's GenAI icon: every one with any `gen_ai.*` key."""
    return [span for span in spans if any(key.startswith("gen_ai.") for key in attributes(span))]


def links(config: dict[str, Any], spans: Sequence[Span]) -> dict[bytes, list[str]]:
    """The URLs that the UI puts on each span's attributes; a pattern that lacks a parameter makes none."""
    by_id = {span.span_id: span for span in spans}
    found: dict[bytes, list[str]] = {}
    for span in spans:
        for pattern in config["linkPatterns"]:
            if pattern["type"] in ("attributes", "tags") and pattern["key"] in attributes(span):
                values = {name: _parameter(name, span, by_id) for name in PARAMETER.findall(pattern["url"])}
                if None not in values.values():
                    url = _filled(pattern["url"], values)
                    found.setdefault(span.span_id, []).append(url)
    return found


def _filled(url: str, values: dict[str, Any]) -> str:
    """Every value URI-encoded, as JavaScript's encodeURIComponent does it."""
    return PARAMETER.sub(lambda match: quote(str(values[match[1]]), safe="!'()*"), url)


def _parameter(name: str, span: Span, by_id: dict[bytes, Span]) -> Any:
    """`trace.*` from the trace; else of the span, or of the nearest ancestor that has it."""
    if name == "trace.traceID":
        return span.trace_id.hex()
    current: Span | None = span
    while current is not None:
        if name == "spanID":
            return current.span_id.hex()
        if (value := attributes(current).get(name)) is not None:
            return value
        current = by_id.get(current.parent_span_id)
    return None


def v3_trace(requests: Sequence[ExportTraceServiceRequest]) -> dict[str, Any]:
    """The shape of `GET /api/v3/traces/{id}`: OTLP JSON under `result`, IDs in hexadecimal."""
    whole = ExportTraceServiceRequest()
    for request in requests:
        whole.resource_spans.extend(request.resource_spans)
    return {"result": _hex_ids(MessageToDict(whole))}


def _hex_ids(node: Any) -> Any:
    import base64

    if isinstance(node, list):
        return [_hex_ids(one) for one in node]
    if not isinstance(node, dict):
        return node
    return {k: base64.b64decode(v).hex() if k in ID_FIELDS else _hex_ids(v) for k, v in node.items()}


def upload(text: str) -> list[dict[str, Any]]:
    """The resources of a `.jsonl` as the UI uploads it: every line is a JSON object with `resourceSpans`."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(list(line) == ["resourceSpans"] for line in lines)
    return [resource for line in lines for resource in line["resourceSpans"]]
