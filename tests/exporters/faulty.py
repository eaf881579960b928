"""Real OTLP receivers that answer as they are told: one of gRPC and one of HTTP, with the same script."""

from __future__ import annotations

import threading
from collections import deque
from concurrent import futures
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.protobuf.duration_pb2 import Duration  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc

from tests.exporters.collectors import spans_of

__all__ = ["AWAY", "LATER", "REFUSED", "TOO_LARGE", "Answer", "FaultyGrpc", "FaultyHttp", "partly"]


@dataclass(frozen=True)
class Answer:
    """What is said instead of yes."""

    grpc: grpc.StatusCode | None
    http: int
    retry_s: int | None = None
    rejected: int = 0


AWAY = Answer(grpc.StatusCode.UNAVAILABLE, 503)
REFUSED = Answer(grpc.StatusCode.UNAUTHENTICATED, 401)
TOO_LARGE = Answer(grpc.StatusCode.RESOURCE_EXHAUSTED, 413)
LATER = Answer(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, retry_s=1)


def partly(rejected: int) -> Answer:
    return Answer(None, 200, rejected=rejected)


class _Scripted:
    """Answers from the script first, then takes everything."""

    def __init__(self, *script: Answer) -> None:
        self.script = deque(script)
        self.taken: list[pb.ExportTraceServiceRequest] = []
        self.asked = 0
        self.gate = threading.Event()
        """Nobody is answered before it is set."""
        self.gate.set()

    def names(self) -> list[str]:
        return [span.name for span in spans_of(self.taken)]

    def decide(self, request: pb.ExportTraceServiceRequest) -> tuple[Answer | None, pb.ExportTraceServiceResponse]:
        self.asked += 1
        assert self.gate.wait(30)
        answer = self.script.popleft() if self.script else None
        said = pb.ExportTraceServiceResponse()
        if answer is not None and answer.rejected:
            said.partial_success.rejected_spans = answer.rejected
            said.partial_success.error_message = "too old"
            answer = None
        if answer is None:
            self.taken.append(request)
        return answer, said


class FaultyGrpc(_Scripted, rpc.TraceServiceServicer):
    protocol = "grpc"

    def __init__(self, *script: Answer, port: int = 0) -> None:
        super().__init__(*script)
        self._server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        rpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        answer, said = self.decide(request)
        if answer is None:
            return said
        if answer.retry_s is not None:
            delay = RetryInfo(retry_delay=Duration(seconds=answer.retry_s)).SerializeToString()
            context.set_trailing_metadata((("google.rpc.retryinfo-bin", delay),))
        return context.abort(answer.grpc, "as told")

    def stop(self) -> None:
        self.gate.set()
        self._server.stop(None).wait(10)


class FaultyHttp(_Scripted):
    protocol = "http/protobuf"

    def __init__(self, *script: Answer, port: int = 0) -> None:
        super().__init__(*script)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                answer, said = outer.decide(pb.ExportTraceServiceRequest.FromString(body))
                data = b"as told" if answer else said.SerializeToString()
                self.send_response(answer.http if answer else 200)
                self.send_header("content-type", "text/plain" if answer else "application/x-protobuf")
                self.send_header("content-length", str(len(data)))
                if answer and answer.retry_s is not None:
                    self.send_header("retry-after", str(answer.retry_s))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base's name)
                """Nothing on the tests' stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
