"""From a vLLM process to the exporter process: a bounded shared-memory queue and a Unix socket.

`Channel.send` never blocks and never raises: it copies the record into the ring or says that it could not. The
socket carries three things: the hello with the ring's file descriptor, single wake-up bytes, and answers to flushes.
The exporter process is started by whichever process needs it first, and started again if it dies.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import os
import select
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from tracer import config, log_relay, wire
from tracer.config import Settings
from tracer.errors import CaptureUnavailableError, SettingsError
from tracer.records import EngineInfo, FlushRecord, Record
from tracer.ring import Ring

__all__ = [
    "Channel",
    "Exporter",
    "engine_infos",
    "hooked_engines",
    "mark_hooked",
    "mark_unhookable",
    "process_channel",
    "publish_engine",
    "socket_path",
]

LOG: Final = logging.getLogger("tensorspan")
START_SECONDS: Final = 20.0
"""How long a process waits for the exporter at its own start; never waited while serving."""
RETRY_SECONDS: Final = 1.0
NAP_SHARE: Final = 4
"""Above this part of the queue (a quarter) an exporter that naps is woken."""
SWEEP_SECONDS: Final = 600.0
"""A lock this old and held by nobody is a dead server's; a younger one may be between two exporters."""


class Exporter(Protocol):
    """A way out for records. Runs in the exporter process, one call at a time.

    Records of one generation arrive as GenerationStart, any StepRecord and ArrayRecord, then one GenerationEnd whose
    `output_tokens` is final: steps at or past it are surplus and count as never run.
    """

    def export(self, record: Record, payload: memoryview) -> None:
        """Take one record; `payload` is valid only during the call."""

    def force_flush(self, timeout_s: float) -> bool:
        """Put what was exported where a reader finds it; False if that took longer than `timeout_s`."""

    def pending(self) -> Collection[str]:
        """Generations (span IDs) that have ended here and are not yet where a reader finds them. Never waits."""

    def shutdown(self, timeout_s: float) -> bool:
        """Flush and close within `timeout_s`."""


class Channel:
    """The producer's end: one per process and role."""

    def __init__(self, settings: Settings, role: str, capacity: int) -> None:
        self.settings = settings
        self.role = role
        self.ring = Ring.create(capacity)
        self.lost = 0
        """Records refused because the ring was full."""
        self._lock = threading.Lock()
        self._greeting: list[Record] = []
        self._socket: socket.socket | None = None
        self._retry_at = 0.0
        self._probe_at = 0.0
        self._reconnecting = False

    def connect(self, timeout_s: float = START_SECONDS) -> bool:
        """Reach the exporter process, starting it if nobody listens; False if it did not come up in time."""
        deadline = time.monotonic() + timeout_s
        path = Path(self.settings.socket)
        while (conn := _open_socket(path)) is None:
            _ensure_process(path, self.settings)
            if time.monotonic() > deadline:
                LOG.error("tensorspan: no exporter process at %s after %.0f s; traces are lost", path, timeout_s)
                return False
            threading.Event().wait(0.05)
        process = os.getpid()  # Also the ID of its first thread, whose cores are meant: this one may be `_reconnect`'s.
        hello = {"role": self.role, "pid": process, "cpus": sorted(os.sched_getaffinity(process))}
        socket.send_fds(conn, [json.dumps(hello).encode() + b"\n"], [self.ring.fd])
        conn.setblocking(False)
        self._socket = conn
        for record in self._greeting:
            self.send(record)
        return True

    def greet(self, record: Record) -> None:
        """Send `record` now and again after every reconnection (facts that a new exporter process must know)."""
        self._greeting.append(record)
        self.send(record)

    def send(self, record: Record, payload: Sequence[memoryview] = ()) -> bool:
        """Copy one record into the queue; False if there was no room (nothing is written then)."""
        kind, meta = wire.encode(record)
        with self._lock:
            written = self.ring.write(kind, meta, payload)
        if not written:
            self.lost += 1
        self._see_to_exporter()
        return written

    def _see_to_exporter(self) -> None:
        """Wake it if it sleeps, or naps while the queue fills; look once a second whether it lives.

        An exporter that died at work never said that it slept.
        """
        now = time.monotonic()
        if self._socket is None:
            self._reconnect_later()
        elif self.ring.waiting or now >= self._probe_at or self.ring.used > self.ring.capacity // NAP_SHARE:
            self._probe_at = now + RETRY_SECONDS
            self._wake()

    def flush(self, generations: Sequence[str], timeout_s: float) -> bool:
        """Wait until the exporter has finished these generations; False if it did not within `timeout_s`."""
        conn = self._socket
        token = os.urandom(8).hex()
        if conn is None or not self.send(FlushRecord(token, tuple(generations))):
            return False
        return _await_line(conn, token.encode(), timeout_s)

    def close(self) -> None:
        """Say goodbye; the exporter reads what is left in the ring first."""
        if self.lost:
            LOG.warning("tensorspan: %d records did not fit into the queue (TENSORSPAN_QUEUE_MB)", self.lost)
        conn, self._socket = self._socket, None
        if conn is not None:
            conn.close()

    def _wake(self) -> None:
        conn = self._socket
        if conn is None:
            return
        try:
            conn.send(b"\x01")
        except BlockingIOError:
            return  # The exporter has unread wake-ups: it is awake.
        except OSError:
            LOG.warning("tensorspan: the exporter process went away; starting it again")
            self.close()
            self._reconnect_later()

    def _reconnect_later(self) -> None:
        """Reconnect on a thread of its own, at most once a second: the caller is the engine's step."""
        now = time.monotonic()
        if self._reconnecting or now < self._retry_at:
            return
        self._retry_at = now + RETRY_SECONDS
        self._reconnecting = True
        threading.Thread(target=self._reconnect, name="tensorspan-reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        # This thread's own: a worker binds its threads to cores that its steps fill, and a child inherits that.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        try:
            self.connect()
        except OSError as error:
            LOG.warning("tensorspan: cannot reach the exporter process: %s", error)
        finally:
            self._reconnecting = False


_CHANNELS: dict[tuple[int, str], Channel] = {}
_HOOKED: set[int] = set()
_UNHOOKABLE: dict[int, str] = {}


def process_channel(settings: Settings, role: str = "api", capacity_mb: int = 16) -> Channel:
    """This process's channel for `role`, connected on first use (a forked child gets its own)."""
    key = (os.getpid(), role)
    if key not in _CHANNELS:
        ready = settings if settings.socket else replace(settings, socket=str(socket_path()))
        channel = _CHANNELS[key] = Channel(ready, role, capacity_mb * 1_000_000)
        atexit.register(channel.close)
        channel.connect()
        log_relay.attach(channel.send)
    return _CHANNELS[key]


def mark_hooked() -> None:
    """Note that generations of this process are announced: its engine client has our hooks."""
    _HOOKED.add(os.getpid())


def mark_unhookable(reason: str) -> None:
    """Note why this process's engine client cannot have our hooks."""
    _UNHOOKABLE[os.getpid()] = reason


def hooked_engines(settings: Settings) -> tuple[EngineInfo, ...]:
    """`engine_infos` for a process with our hooks, so that nobody is promised a capture that is never announced.

    Empty in a process without; raises CaptureUnavailableError with the reason if there is one.
    """
    reason = _UNHOOKABLE.get(os.getpid())
    if reason is not None:
        raise CaptureUnavailableError(f"unavailable: {reason}")
    return engine_infos(settings) if os.getpid() in _HOOKED else ()


def socket_path() -> Path:
    """A fresh socket path for one server or script, in a directory only this user may enter."""
    base = config.runtime_directory()
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise SettingsError(f"{base} is not a private directory of this user; remove it or set XDG_RUNTIME_DIR")
    _sweep(base)
    return base / f"{os.getpid()}-{os.urandom(4).hex()}.sock"


def _sweep(base: Path) -> None:
    """Remove what servers left that were killed with their exporter: files of locks that nobody holds."""
    for lock in base.glob("*.lock"):
        if time.time() - lock.stat().st_mtime > SWEEP_SECONDS and not _held(lock):
            for file in base.glob(f"{lock.stem}.*"):
                file.unlink(missing_ok=True)


def _held(lock: Path) -> bool:
    """True if an exporter process lives behind this lock file; works across containers that share the directory."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def publish_engine(settings: Settings, info: EngineInfo) -> None:
    """Leave this worker's facts beside the socket, where the API process and `doctor` read them."""
    path = _engine_path(settings, info)
    path.with_suffix(".tmp").write_bytes(wire.encode_json(info))
    path.with_suffix(".tmp").replace(path)


def engine_infos(settings: Settings) -> tuple[EngineInfo, ...]:
    """Facts of every worker that has reported, by replica and rank; empty before the first has loaded its model."""
    if not settings.socket:
        return ()
    path = Path(settings.socket)
    files = sorted(path.parent.glob(f"{path.stem}.engine-*.json"))
    infos = [wire.decode_json(file.read_bytes(), EngineInfo) for file in files]
    return tuple(sorted(infos, key=lambda info: (info.replica, info.rank)))


def _engine_path(settings: Settings, info: EngineInfo) -> Path:
    path = Path(settings.socket)
    return path.with_name(f"{path.stem}.engine-{info.replica}-{info.rank}.json")


def _open_socket(path: Path) -> socket.socket | None:
    conn = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        conn.connect(str(path))
    except OSError:
        conn.close()
        return None
    return conn


def _ensure_process(path: Path, settings: Settings) -> None:
    """Start the exporter process unless somebody holds its lock, that is, has just started one."""
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(path.with_suffix(".lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        # The child inherits the locked descriptor: the lock is free again when it ends, however it ends.
        environment = {**config.inherited(), **config.child_environment(replace(settings, socket=str(path)))}
        # It forks and leaves at once: vLLM kills the children of its processes, and this one must outlive them.
        subprocess.run(
            [sys.executable, "-m", "tracer.configure", str(path)],
            pass_fds=[lock.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
            check=False,
        )


def _await_line(conn: socket.socket, wanted: bytes, timeout_s: float) -> bool:
    """Read lines until one is `wanted`; False at the deadline or at the end of the stream."""
    deadline = time.monotonic() + timeout_s
    buffer = b""
    while wanted not in buffer.split(b"\n"):
        try:
            # Not a timeout on the socket: the engine's step sends its wake-ups through it meanwhile.
            readable, _, _ = select.select([conn], [], [], max(deadline - time.monotonic(), 0.0))
            data = conn.recv(4096) if readable else b""
        except (OSError, ValueError):  # Closed by a sender that found the exporter gone.
            data = b""
        if not data:
            return False
        buffer += data
    return True
