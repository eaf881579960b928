"""A real server in a process of its own, and what is needed to talk to it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

__all__ = ["Server", "await_true", "free_port", "server_environment"]

START_SECONDS: Final = 420
"""The first start on a machine compiles the model."""


def await_true(what: Callable[[], bool]) -> None:
    """Return when `what` holds; fail after a minute."""
    for _ in range(1200):
        if what():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not happen")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_environment(**extra: str) -> dict[str, str]:
    """The environment of a server without anything of this test process's own tracing."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("TENSORSPAN_", "OTEL_", "VLLM_"))}
    return clean | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | extra


class Server:
    """`command` started, waited for until it answers, and ended by its process group."""

    def __init__(
        self, command: list[str], log: Path, port: int, environment: dict[str, str], folder: Path | None = None
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
            )
        self._await_ready()

    @classmethod
    def vllm(cls, model: Path, log: Path, environment: dict[str, str], *options: str) -> Server:
        """`vllm serve MODEL` with our middleware: nothing of our launcher."""
        port = free_port()
        # The CPU wheel's own `vllm` command asks for the version of a distribution that it is not.
        module = "vllm.entrypoints.openai.api_server"
        base = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
        middleware = ["--middleware", "tracer.middleware.TracingMiddleware"]
        return cls(
            [sys.executable, "-m", module, "--model", str(model), *base, *middleware, *options], log, port, environment
        )

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        ended = os.pidfd_open(self.process.pid)
        while time.monotonic() < deadline:
            # Wakes at once if the server dies, else looks again after half a second.
            if select.select([ended], [], [], 0.5)[0]:
                break
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    os.close(ended)
                    return
            except (urllib.error.URLError, OSError):
                continue
        os.close(ended)
        self.stop()
        raise AssertionError("the server did not start:\n" + self.log.read_text(errors="replace")[-4000:])

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], Any]:
        """(status, headers in lower case, JSON body or text)."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"content-type": "application/json", **(headers or {})}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return _parts(response)
        except urllib.error.HTTPError as error:
            return _parts(error)

    def stop(self) -> None:
        """Interrupt as Ctrl-C does; kill what is left of the group after that."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


def _parts(response: Any) -> tuple[int, dict[str, str], Any]:
    text = response.read().decode()
    headers = {key.lower(): value for key, value in response.headers.items()}
    return response.status, headers, json.loads(text) if "json" in headers.get("content-type", "") else text
