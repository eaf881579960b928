"""The exporter process itself with a collector that takes connections and says nothing: who waits, and how long."""

from __future__ import annotations

import os
import select
import socket
import time
from pathlib import Path

import pytest

from tests.processes import exporter_of_socket
from tracer.config import Settings
from tracer.configure import LINGER_SECONDS, SHUTDOWN_SECONDS
from tracer.export import Channel
from tracer.records import EngineInfo, GenerationEnd, GenerationStart, StepRecord

TRACE, SPAN = "a" * 32, "b" * 16
STEPS = 2000
SLACK_SECONDS = 5.0
"""For a busy machine; OpenTelemetry's own exporters took 20 s and more."""


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_silent_collector_holds_up_neither_the_producer_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        settings = Settings(enabled=True, store=str(tmp_path / "store"), socket=str(tmp_path / "x.sock"))
        channel = Channel(settings, "api", 1 << 22)
        assert channel.connect()
        assert channel.send(EngineInfo("m", "0.32.0", "V1", "cpu", "float32", 8, 64))
        assert channel.send(GenerationStart(TRACE, SPAN, None, True, 10, "r", "m", "chat"))
        longest = 0.0
        for i in range(STEPS):
            began = time.perf_counter()
            assert channel.send(
                StepRecord(TRACE, SPAN, f"{i + 1:016x}", i, "decode", 1, 3 + i, 1, 4 + i, 11 + i, 12 + i)
            )
            longest = max(longest, time.perf_counter() - began)
        assert channel.send(GenerationEnd(TRACE, SPAN, 12 + STEPS, "ok", "stop", STEPS))
        assert longest < 0.25, "what a send met is another process on this core"
        began = time.monotonic()
        assert channel.flush([SPAN], 30), "a flush is answered whether or not a collector was there"
        assert time.monotonic() - began < SHUTDOWN_SECONDS + SLACK_SECONDS
        process = os.pidfd_open(exporter_of_socket(settings.socket))
        channel.close()
        ended, _, _ = select.select([process], [], [], LINGER_SECONDS + SHUTDOWN_SECONDS + SLACK_SECONDS)
        os.close(process)
        assert ended, "the process outlived what shutdown may take"
