"""Ports of a server in a network namespace of its own, carried to this machine's loopback by Unix sockets.

A server that insists on listening on every interface is alone with a loopback there; sockets in the file system cross
network namespaces, so nothing but `127.0.0.1` of this machine ever reaches it. Linux, `unshare` of util-linux, and
user namespaces for the calling user are needed; no rights.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import shutil
import socket
import struct
import subprocess
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final

__all__ = ["UNSHARE", "carry_in", "carry_out", "raise_loopback", "why_not"]

UNSHARE: Final = ("unshare", "--map-root-user", "--net", "--kill-child")
"""What a command is started with."""
SIOCGIFFLAGS: Final = 0x8913
SIOCSIFFLAGS: Final = 0x8914
IFF_UP: Final = 1
PIECE: Final = 1 << 16

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def why_not() -> str | None:
    """Why nothing can be isolated on this machine, with the repair; None if it can."""
    if shutil.which(UNSHARE[0]) is None:
        return "there is no `unshare`; repair: sudo apt install util-linux"
    run = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    return (
        f"user namespaces are not allowed here ({run.stderr.strip()}); repair: sudo sysctl -w "
        "kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0 (whichever exists)"
    )


def raise_loopback() -> None:
    """Switch `lo` on: in a new namespace it is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


async def carry_in(folder: Path, ports: Iterable[int]) -> list[asyncio.Server]:
    """Inside: `folder/PORT` leads to 127.0.0.1:PORT, until the servers are closed."""
    return [await asyncio.start_unix_server(_carrier(_to_port(port)), folder / str(port)) for port in ports]


async def carry_out(folder: Path, ports: Iterable[int]) -> list[asyncio.Server]:
    """Outside: 127.0.0.1:PORT leads to `folder/PORT`, until they are closed. Raises OSError if a port is taken."""
    return [await asyncio.start_server(_carrier(_to_socket(folder / str(port))), "127.0.0.1", port) for port in ports]


def _to_port(port: int) -> Callable[[], Awaitable[Streams]]:
    return lambda: asyncio.open_connection("127.0.0.1", port)


def _to_socket(path: Path) -> Callable[[], Awaitable[Streams]]:
    return lambda: asyncio.open_unix_connection(path)


def _carrier(
    connect: Callable[[], Awaitable[Streams]],
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """What serves one connection by carrying it to another; it ends when both directions have."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await connect()
        except OSError:  # Nobody listens yet, or no more: the caller sees a closed connection.
            writer.close()
            return
        await asyncio.gather(_pump(reader, there_writer), _pump(there_reader, writer))
        writer.close()
        there_writer.close()

    return carry


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(PIECE):
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
