"""`GET /metrics` of vLLM's app, with our families at its end.

Not a collector in `prometheus_client`'s registry: with several API servers vLLM answers from a registry that is made
for each scrape and holds nothing but the processes' own files, and it answers in the text format whatever was asked
for, which has no exemplars. So the answer is added to as it passes. A client that asks for OpenMetrics (Prometheus
does) gets vLLM's families in it too; whatever goes wrong here, it gets vLLM's answer as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tracer._guard import Guard
from tracer.metrics_file import metrics_file, read_metrics

__all__ = ["PATHS", "MetricsPage"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PATHS: Final = ("/metrics", "/metrics/")
GUARD: Final = Guard()


class _Answer(NamedTuple):
    body: bytes
    content_type: str


class MetricsPage:
    """ASGI around `app`, for requests to PATHS. `socket` is that of the exporter process."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], socket: str) -> None:
        self._app = app
        self._path = metrics_file(Path(socket)) if socket else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the app, add to its answer on a thread (parsing takes milliseconds), and pass it on."""
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        headers = [line for line in scope["headers"] if line[0].lower() != b"accept-encoding"]
        await self._app({**scope, "headers": headers}, receive, keep)
        with GUARD("adding to /metrics"):
            if self._path is not None and _is_text(messages):
                accept = b",".join(value for name, value in headers if name.lower() == b"accept").decode("latin-1")
                messages = await asyncio.to_thread(_added, messages, accept, self._path)
        for message in messages:
            await send(message)


def _is_text(messages: list[Message]) -> bool:
    """True for an answer in the text format, which may be appended to."""
    start: Message = messages[0] if messages else {"status": 0}
    found = {name.lower(): value for name, value in start.get("headers", ())}
    plain = found.get(b"content-type", b"").startswith(b"text/plain") and b"content-encoding" not in found
    return start["status"] == 200 and plain


def _added(messages: list[Message], accept: str, path: Path) -> list[Message]:
    """The app's answer with the families of `path`."""
    start = messages[0]
    found = {name.lower(): value for name, value in start["headers"]}
    theirs = _Answer(b"".join(item.get("body", b"") for item in messages[1:]), found[b"content-type"].decode())
    answer = _render(theirs, read_metrics(path), accept)
    ours = {b"content-type": answer.content_type.encode(), b"content-length": b"%d" % len(answer.body)}
    kept = [line for line in start["headers"] if line[0].lower() not in ours]
    return [{**start, "headers": [*kept, *ours.items()]}, {"type": "http.response.body", "body": answer.body}]


def _render(theirs: _Answer, families: list[dict[str, Any]], accept: str) -> _Answer:
    from prometheus_client import generate_latest
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.openmetrics import exposition as openmetrics

    ours = [_metric(family) for family in families]
    if choose_encoder(accept)[1].startswith("application/openmetrics-text"):
        both = _Families([*_parsed(theirs.body.decode()), *ours])
        # Any other escaping makes `vllm_` of `vllm:` (prometheus_client 0.26); before 0.22 there was none.
        raw = {"escaping": openmetrics.ALLOWUTF8} if hasattr(openmetrics, "ALLOWUTF8") else {}
        body = openmetrics.generate_latest(both, **raw)  # type: ignore[no-untyped-call]
        return _Answer(body, openmetrics.CONTENT_TYPE_LATEST)
    return _Answer(theirs.body + generate_latest(_Families(ours)), theirs.content_type)


class _Families:
    """What the encoders take for a registry."""

    def __init__(self, metrics: list[Any]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        return iter(self._metrics)


def _parsed(text: str) -> list[Any]:
    """The families of a page in the text format, without `_created`: OpenMetrics knows them as no families."""
    from prometheus_client.parser import text_string_to_metric_families

    metrics = list(text_string_to_metric_families(text))
    names = {metric.name for metric in metrics}
    return [metric for metric in metrics if metric.name.removesuffix("_created") not in names - {metric.name}]


def _metric(family: dict[str, Any]) -> Any:
    from prometheus_client import Metric
    from prometheus_client.samples import Exemplar

    metric = Metric(family["name"], family["help"], family["type"], family["unit"])
    for suffix, labels, value, exemplar in family["samples"]:
        metric.add_sample(family["name"] + suffix, labels, value, exemplar=exemplar and Exemplar(*exemplar))
    return metric
