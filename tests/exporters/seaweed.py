"""A real S3 server for the tests: SeaweedFS, on 127.0.0.1 alone, its data in a temporary folder, ended by its PID."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

__all__ = ["KEY", "SECRET", "Seaweed"]

KEY: Final = "tensorspan"
SECRET: Final = "not-a-secret"
BUCKET: Final = "captures"
START_SECONDS: Final = 60.0
IDENTITY: Final = {
    "name": "tests",
    "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
}


class Seaweed:
    """`start` and `kill` as often as a test likes: ports and data stay the same. A bucket is made by its first key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        # In this order: the S3 gateway, then HTTP and gRPC of master, volume, filer, and the gateway's gRPC.
        self._ports = _free_ports(8)
        (folder / "data").mkdir(parents=True)
        (folder / "s3.json").write_text(json.dumps({"identities": [IDENTITY]}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    def environment(self) -> dict[str, str]:
        """The standard variables of a client that may do everything."""
        return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": self.endpoint}

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log, cwd=self.folder)
        deadline, pause = time.monotonic() + START_SECONDS, threading.Event()
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start; see {self.folder / 'log'}")
            pause.wait(0.1)

    def kill(self) -> None:
        """As a machine that goes away: nothing is flushed and no connection is closed in good order."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        """True once the gateway can reach what is behind it: it refuses a stranger then."""
        try:
            urlopen(self.endpoint, timeout=1).close()
        except HTTPError as error:
            error.close()
            return error.code == 403
        except (URLError, OSError):
            return False
        return True

    def _command(self) -> list[str]:
        s3, *rest = self._ports
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
        ports = [f"-{name}={port}" for name, port in zip((*names, "s3.port.grpc"), rest, strict=True)]
        weed = str(Path(sys.executable).with_name("weed"))
        return [
            weed, "server", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
            f"-s3.port={s3}", *ports, f"-s3.config={self.folder / 's3.json'}", "-s3.iam=false",
            # No telemetry, no further services, no sockets outside the folder, small files, no long election.
            "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-filer.localSocket={self.folder / 'f.sock'}", f"-s3.localSocket={self.folder / 's.sock'}",
            "-volume.max=200", "-master.volumeSizeLimitMB=64", "-master.electionTimeout=1s",
        ]  # fmt: skip


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()
