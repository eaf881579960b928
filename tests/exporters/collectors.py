"""Real OTLP receivers for tests: gRPC through the official servicer, HTTP through oteltap."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import grpc  # type: ignore[import-untyped]
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs_pb
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2_grpc as logs_rpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_rpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from oteltap import OtelTapHttpProtobufReceiver, OtelTapHttpProtobufReceiverSettings

__all__ = ["GrpcCollector", "HttpCollector", "attributes", "named"]


class GrpcCollector(rpc.TraceServiceServicer):
    """A real OTLP/gRPC receiver that keeps what it got."""

    def __init__(self) -> None:
        self.requests: list[pb.ExportTraceServiceRequest] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        rpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.metric_requests: list[Any] = []
        self.log_requests: list[Any] = []
        metrics = _Keeper(self.metric_requests, metrics_pb.ExportMetricsServiceResponse, self._came)
        metrics_rpc.add_MetricsServiceServicer_to_server(metrics, self._server)  # type: ignore[no-untyped-call]
        logs = _Keeper(self.log_requests, logs_pb.ExportLogsServiceResponse, self._came)
        logs_rpc.add_LogsServiceServicer_to_server(logs, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self._came()
        return pb.ExportTraceServiceResponse()

    def _came(self) -> None:
        """Something has been received."""

    def metrics(self) -> dict[str, Metric]:
        """The newest state of each metric."""
        found = [scope for r in list(self.metric_requests) for rm in r.resource_metrics for scope in rm.scope_metrics]
        return {metric.name: metric for scope in found for metric in scope.metrics}

    def logs(self) -> list[LogRecord]:
        """Every log record received."""
        found = [scope for r in list(self.log_requests) for rl in r.resource_logs for scope in rl.scope_logs]
        return [record for scope in found for record in scope.log_records]

    def spans(self, count: int) -> list[Span]:
        """Everything received; the exporter was flushed before, so nothing is under way."""
        found = spans_of(self.requests)
        assert len(found) == count
        return found

    def stop(self) -> None:
        self._server.stop(None)


class _Keeper:
    """The service of another signal."""

    def __init__(self, received: list[Any], answer: Callable[[], Any], came: Callable[[], None]) -> None:
        self._received, self._answer, self._came = received, answer, came

    def Export(self, request: Any, context: Any) -> Any:
        self._received.append(request)
        self._came()
        return self._answer()


class HttpCollector:
    """oteltap on a thread of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self._received: list[Span] = []
        self._changed = threading.Condition()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with OtelTapHttpProtobufReceiver(OtelTapHttpProtobufReceiverSettings(self.port)) as tap:
            task = asyncio.create_task(tap.await_trace(self._take))
            self._loop.call_soon(self._ready.set)  # After the task's first turn, in which it subscribes.
            await self._stop.wait()
            task.cancel()

    def _take(self, span: Span) -> bool:
        with self._changed:
            self._received.append(span)
            self._changed.notify_all()
        return False

    def spans(self, count: int) -> list[Span]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._received) >= count, 10)
            assert len(self._received) == count
            return list(self._received)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spans_of(requests: Sequence[pb.ExportTraceServiceRequest]) -> list[Span]:
    return [s for r in requests for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]


def value_of(item: Any) -> Any:
    kind = item.WhichOneof("value")
    value = getattr(item, kind)
    return [value_of(one) for one in value.values] if kind == "array_value" else value


def attributes(holder: Any) -> dict[str, Any]:
    return {item.key: value_of(item.value) for item in holder.attributes}


def named(spans: Sequence[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]
