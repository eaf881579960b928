"""Real OTLP receivers for tests: gRPC through the official servicer, HTTP through oteltap."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import grpc  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from oteltap import OtelTapHttpProtobufReceiver, OtelTapHttpProtobufReceiverSettings

__all__ = ["GrpcCollector", "HttpCollector", "attributes", "named"]


class GrpcCollector(rpc.TraceServiceServicer):
    """A real OTLP/gRPC receiver that keeps what it got."""

    def __init__(self) -> None:
        self.requests: list[pb.ExportTraceServiceRequest] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        rpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return pb.ExportTraceServiceResponse()

    def spans(self, count: int) -> list[Span]:
        """Everything received; the exporter was flushed before, so nothing is under way."""
        found = spans_of(self.requests)
        assert len(found) == count
        return found

    def stop(self) -> None:
        self._server.stop(None)


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
