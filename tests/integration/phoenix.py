"""Arize Phoenix as `make phoenix` starts it, and questions to its two APIs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

from tests.exporters.collectors import free_port

__all__ = ["Phoenix"]

START_SECONDS: Final = 180
PATIENCE_SECONDS: Final = 120
"""Phoenix takes 2,000 spans in a second, and shows them as its database gets them: 100 a second on two busy cores."""
PAGE: Final = 1000
ROOT: Final = Path(__file__).resolve().parents[2]


class Phoenix:
    """Starts at once; whoever needs it calls `ready`."""

    def __init__(self, folder: Path) -> None:
        self.port, self.grpc_port = free_port(), free_port()
        self.log = folder / "log"
        ports = ["--port", str(self.port), "--grpc-port", str(self.grpc_port)]
        command = [sys.executable, "-m", "deploy.phoenix", *ports, "--data", str(folder / "data")]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> Phoenix:
        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
            try:
                self._get("/healthz")
            except OSError:
                return False
            return True

        _until(answers, START_SECONDS, lambda: self.log.read_text(errors="replace")[-4000:])
        return self

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()  # What runs in the namespace notices.
            self.process.wait(10)

    def send(self, request: ExportTraceServiceRequest, protocol: str) -> None:
        """Hand over what a collector received, byte for byte."""
        if protocol == "grpc":
            with grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
                TraceServiceStub(channel).Export(request, timeout=30)  # type: ignore[no-untyped-call]
            return
        headers = {"content-type": "application/x-protobuf"}
        post = urllib.request.Request(self.url + "/v1/traces", request.SerializeToString(), headers)
        urllib.request.urlopen(post, timeout=30).close()

    def trace(self, trace_id: str, count: int) -> list[dict[str, Any]]:
        """Every span of the trace, once there are `count`."""
        seen: list[int] = []

        def all_here() -> bool:
            found = self.ask(f'{{getTraceByOtelId(traceId:"{trace_id}") {{numSpans}}}}')["getTraceByOtelId"]
            seen.append(found["numSpans"] if found else 0)
            return seen[-1] >= count

        _until(all_here, PATIENCE_SECONDS, lambda: f"{seen[-1]} of {count} spans")
        spans = self._pages(trace_id)
        assert len(spans) == count
        return spans

    def _pages(self, trace_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        query = {"trace_id": trace_id, "limit": str(PAGE)}
        while True:
            page = json.loads(self._get(f"/v1/projects/default/spans?{urllib.parse.urlencode(query)}"))
            found += page["data"]
            if page["next_cursor"] is None:
                return found
            query["cursor"] = page["next_cursor"]

    def ask(self, query: str) -> Any:
        """The data of a GraphQL answer without errors."""
        body = json.dumps({"query": query}).encode()
        post = urllib.request.Request(self.url + "/graphql", body, {"content-type": "application/json"})
        with urllib.request.urlopen(post, timeout=30) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            data: bytes = response.read()
            return data


def _until(what: Callable[[], bool], seconds: float, message: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, message()
        time.sleep(0.2)
