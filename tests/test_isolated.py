"""A server that listens on every interface, in its namespace: reached from loopback, by both directions of bytes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import isolated
from deploy.bootstrap import ROOT
from tests.exporters.collectors import free_port

INSIDE = """
import asyncio, sys
from pathlib import Path
from deploy import isolated

async def echo(reader, writer):
    writer.write(await reader.read())
    writer.write_eof()

async def main(folder, port):
    isolated.raise_loopback()
    await asyncio.start_server(echo, "0.0.0.0", port)
    await isolated.carry_in(folder, [port])
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""
BYTES = os.urandom(1 << 20)

pytestmark = pytest.mark.skipif(isolated.why_not() is not None, reason="no user namespaces here")


async def through(folder: Path, port: int, sent: bytes) -> bytes:
    """What comes back for `sent`."""
    [server] = await isolated.carry_out(folder, [port])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    if sent:
        writer.write_eof()
    answer = await reader.read()
    writer.close()
    server.close()
    return answer


def test_bytes_go_both_ways_and_nothing_listens_here(tmp_path: Path) -> None:
    port = free_port()
    command = [*isolated.UNSHARE, sys.executable, "-c", INSIDE, str(tmp_path), str(port)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert f":{port:04X} " not in Path("/proc/net/tcp").read_text(), "this machine has no such port"
        assert asyncio.run(through(tmp_path, port, BYTES)) == BYTES
        assert child.stdin is not None
        child.stdin.close()  # The end of whoever started it is the end of it.
        assert child.wait(30) == 0


def test_a_port_that_nobody_serves_is_a_closed_connection(tmp_path: Path) -> None:
    assert asyncio.run(through(tmp_path, free_port(), b"")) == b""


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install util-linux" in (isolated.why_not() or "")
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    assert "not allowed here (Operation not permitted)" in (isolated.why_not() or "")
