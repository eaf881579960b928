"""The exporter process: reads the rings, orders the records, hands them to the exporters.

The process ends by itself when the last vLLM process has gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from tracer import config, metric_names, semconv, wire
from tracer._guard import Guard
from tracer.assemble import Assembler
from tracer.config import Settings
from tracer.export import Exporter, engine_infos
from tracer.exporter_points import exporter_names, load_exporters, preload_exporters
from tracer.figures import Board, Figure
from tracer.keeper import keep
from tracer.log_context import LOG_SPAN, LogSpan
from tracer.log_relay import Seldom
from tracer.queue_client import QueueClient
from tracer.records import (
    ArrayRecord,
    EngineInfo,
    FlushRecord,
    GenerationEnd,
    GenerationStart,
    Record,
    RequestSpan,
    StepRecord,
)
from tracer.ring import Ring

__all__ = ["ExporterProcess", "main"]

LOG: Final = logging.getLogger("tensorspan.exporter")
FIRST_CLIENT_SECONDS: Final = 120.0
"""End if nobody has connected by then: whoever started us is gone."""
LINGER_SECONDS: Final = 2.0
"""Stay after the last client left: a restarted server finds us."""
UPLOAD_SECONDS: Final = 60.0
"""Stay so long if captures are still on their way to a bucket."""
SHUTDOWN_SECONDS: Final = 2.0
"""A dead collector delays the end by no more than this."""
TICK_SECONDS: Final = 0.1
NAP_SECONDS: Final = 0.025
"""Pause after records have been read. A worker's records come at the end of a step, which is when the engine's
scheduler needs a core most: waking up on each of them costs serving several percent where cores are few."""
API_SECONDS: Final = 3.0
"""How long a new process lets the records of a worker that another one has read before wait for an API process.

After a crash both connect again, in any order, and a step that is read before the start of its generation belongs to
nobody.
"""
REPEAT_SECONDS: Final = 600.0
"""How often an OTLP exporter may say the same on standard error."""
LEARNT: Final = -1
"""Stands for the connection of facts that came in no ring."""
NICENESS: Final = 5
"""Serving goes before writing when they want the same core; a full queue drops arrays and says so."""


class ExporterProcess:
    """The loop; everything happens on one thread."""

    def __init__(self, path: Path, exporters: Sequence[Exporter], listener: socket.socket | None = None) -> None:
        """listener: the socket at `path` if it is there already; without one it is made."""
        self._path = path
        self._exporters = exporters
        self._guard = Guard()
        self._board = Board([*exporters, self])
        self._assembler = Assembler(self._emit, time.monotonic)
        self._clients: dict[int, QueueClient] = {}
        self._selector = selectors.DefaultSelector()
        self._cpus = frozenset(os.sched_getaffinity(0))
        self._listener = listener or _listen(path)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._stopping = False
        self._heard, self._born = False, time.monotonic()
        self._worked = False
        self._unread = 0
        """Records of clients that have left which could not be read."""

    def run(self) -> None:
        """Serve until the last client has gone or a signal asks to stop."""
        quiet_since = time.monotonic() + FIRST_CLIENT_SECONDS - LINGER_SECONDS
        while not self._stopping:
            self._wait()
            self._drain()
            self._assembler.expire()
            self._answer_flushes()
            with self._guard("gathering figures"):
                self._board.look()
            if self._clients:
                quiet_since = time.monotonic()
            elif time.monotonic() > quiet_since + (UPLOAD_SECONDS if self._pending() else LINGER_SECONDS):
                break
        self._finish()

    def learn(self, engines: Sequence[EngineInfo]) -> None:
        """Facts of workers that were there before this process; their greeting may not fit into a full ring."""
        for info in engines:
            self._assembler.take(LEARNT, info)

    def figures(self) -> Iterable[Figure]:
        """How full the queues are, and what was lost on this side of them."""
        for client in self._clients.values():
            if client.ring is not None:
                role = ((semconv.QUEUE_ROLE, client.role),)
                yield Figure(metric_names.QUEUE_USAGE, client.ring.used, role)
                yield Figure(metric_names.QUEUE_LIMIT, client.ring.capacity, role)
        yield Figure(metric_names.RECORDS_LOST, self._records_lost(), ((semconv.LOSS_PLACE, "exporter"),))
        yield Figure(metric_names.EXPORTER_FAILURES, self._guard.failures.total())

    def _records_lost(self) -> int:
        return self._assembler.orphans + self._unread + sum(client.lost for client in self._clients.values())

    def stop(self, *_: object) -> None:
        """Signal handler: leave the loop at the next turn."""
        self._stopping = True

    def _wait(self) -> None:
        """Nap after work, without being woken; else sleep until a producer writes, unless one already has."""
        if self._worked:
            pause = NAP_SECONDS
        else:
            waiting = [ring.set_waiting(True) for ring in self._rings()]
            held = not self._heard and any(client.returning for client in self._clients.values())
            pause = TICK_SECONDS if all(waiting) or held else 0.0
        self._worked = False
        for key, _ in self._selector.select(pause):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._receive(key.fd)
        for ring in self._rings():
            ring.set_waiting(False)

    def _rings(self) -> list[Ring]:
        return [client.ring for client in self._clients.values() if client.ring is not None]

    def _accept(self) -> bool:
        """False if nobody waits (any more: `_meet` may have been faster than an event)."""
        try:
            conn, _ = self._listener.accept()
        except BlockingIOError:
            return False
        self._clients[conn.fileno()] = QueueClient(conn)
        self._selector.register(conn, selectors.EVENT_READ)
        return True

    def _receive(self, fd: int) -> None:
        """A hello, wake-up bytes, or the end of a client."""
        client = self._clients.get(fd)
        if client is None:
            return
        try:
            data, fds, _, _ = socket.recv_fds(client.conn, 65536, 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        known = not fds or client.meet(data, fds)
        if fds:
            self._keep_off()
        if not data or not known:
            self._leave(fd)

    def _leave(self, fd: int) -> None:
        if self._clients[fd].ring is not None:
            self._heard = True  # What it has sent is read now or never.
            self._drain()
        client = self._clients.pop(fd)
        self._unread += client.lost
        self._selector.unregister(client.conn)
        client.conn.close()
        self._assembler.lost_source(fd)
        if client.ring is not None:
            client.ring.close()
        self._keep_off()

    def _keep_off(self) -> None:
        """Leave the cores to which workers have bound their threads, if that leaves any.

        A thread that waits for its core makes its whole team wait.
        """
        taken = frozenset[int]().union(*(client.cpus for client in self._clients.values()))
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, self._cpus - taken or self._cpus)

    def _drain(self) -> None:
        """Workers' records up to now, after everything the API processes had said before them."""
        heads = {fd: client.ring.head for fd, client in self._clients.items() if client.ring is not None}
        self._meet()
        self._greet()
        for fd, client in list(self._clients.items()):
            if client.role == "api" and client.ring is not None:
                self._read(fd, client, client.ring, client.ring.head)
        announced = self._announced()
        for fd, client in list(self._clients.items()):
            if client.role != "api" and client.ring is not None and fd in heads and (announced or not client.returning):
                self._read(fd, client, client.ring, heads[fd])

    def _meet(self) -> None:
        """Hear out whoever has connected by now: what a worker has sent may belong to what a new API process said."""
        while self._listener.fileno() >= 0 and self._accept():
            pass
        for fd, client in list(self._clients.items()):
            if client.ring is None:
                self._receive(fd)

    def _greet(self) -> None:
        """Know an engine before its first generation: a worker says what it is before anything else."""
        for fd, client in list(self._clients.items()):
            ring = client.ring
            if client.role == "api" or client.greeted or ring is None or (frame := client.read()) is None:
                continue
            client.greeted = True
            if wire.is_engine(frame.kind):
                frame = None
                self._read(fd, client, ring, ring.head - ring.used + 1)

    def _announced(self) -> bool:
        """True once an API process has been heard, or none is to be waited for any longer."""
        if not self._heard:
            said = any(client.role == "api" and client.ring is not None for client in self._clients.values())
            self._heard = said or self._stopping or time.monotonic() > self._born + API_SECONDS
        return self._heard

    def _read(self, fd: int, client: QueueClient, ring: Ring, until: int) -> None:
        while ring.head - ring.used < until and (frame := client.read()) is not None:
            self._worked = True
            with self._guard("reading a record"):
                record = client.decode(frame)
                if isinstance(record, FlushRecord):
                    client.flushes.append(record)
                elif record is not None:
                    self._assembler.take(fd, record, frame.payload)
            frame = None
            ring.release()

    def _emit(self, record: Record, payload: memoryview) -> None:
        said = LOG_SPAN.set(_log_span(record))
        for exporter in self._exporters:
            with self._guard(type(exporter).__name__):
                exporter.export(record, payload)
        LOG_SPAN.reset(said)

    def _answer_flushes(self) -> None:
        if not any(client.flushes for client in self._clients.values()):
            return
        pending = self._pending()
        for client in self._clients.values():
            for flush in [flush for flush in client.flushes if self._is_done(flush, pending)]:
                client.flushes.remove(flush)
                self._flush()
                with contextlib.suppress(OSError):  # The client may have gone meanwhile.
                    client.conn.send(flush.token.encode() + b"\n")

    def _is_done(self, flush: FlushRecord, pending: frozenset[str]) -> bool:
        return not any(self._assembler.is_open(span_id) or span_id in pending for span_id in flush.generations)

    def _pending(self) -> frozenset[str]:
        """Generations that have ended here and that readers cannot find yet."""
        return frozenset(span_id for exporter in self._exporters for span_id in exporter.pending())

    def _flush(self) -> None:
        for exporter in self._exporters:
            with self._guard(f"flushing {type(exporter).__name__}"):
                exporter.force_flush(SHUTDOWN_SECONDS)

    def _finish(self) -> None:
        # A producer that comes now must start a new process, not wait for this one or for its keeper.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._drain()
        self._assembler.close()
        for exporter in self._exporters:
            with self._guard(f"closing {type(exporter).__name__}"):
                exporter.shutdown(SHUTDOWN_SECONDS)
        if self._assembler.orphans:
            LOG.warning("%d records belonged to no open generation", self._assembler.orphans)
        _remove(self._path, engines=not self._clients)


def _log_span(record: Record) -> LogSpan | None:
    """Where log lines about this record belong."""
    if not isinstance(record, StepRecord | ArrayRecord | GenerationStart | GenerationEnd | RequestSpan):
        return None
    return LogSpan(record.trace_id, record.span_id, getattr(record, "sampled", True))


def _listen(path: Path) -> socket.socket:
    """A socket that only this user can reach; a dead predecessor's file is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(64)
    listener.setblocking(False)
    return listener


def _remove(path: Path, *, engines: bool) -> None:
    """Leave nothing behind in the runtime directory but the facts of engines that live on."""
    path.unlink(missing_ok=True)
    if engines:
        for file in path.parent.glob(f"{path.stem}.*"):
            file.unlink(missing_ok=True)


def main() -> None:
    """`python -m tracer.configure SOCKET`: the keeper, and by it the exporter process."""
    if os.fork():
        # The caller gets its child back at once; what goes on belongs to nobody who could be killed with its children.
        os._exit(0)
    # A vLLM worker may have bound itself to some cores; its child need not stay there.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s [tensorspan] %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(Seldom("opentelemetry", REPEAT_SECONDS))
    settings, path = config.load(), Path(sys.argv[1])
    listener = _listen(path)
    preload_exporters(exporter_names())
    keep(lambda: _serve(settings, path, listener))


def _serve(settings: Settings, path: Path, listener: socket.socket) -> None:
    """The exporter process, from its first moment to its last."""
    process = ExporterProcess(path, load_exporters(settings, exporter_names()), listener)
    process.learn(engine_infos(settings))
    # Not before it can read: on busy cores a start that yields takes long, and the queues fill meanwhile.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # Does not preempt anybody by waking up.
        os.nice(NICENESS)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, process.stop)
    process.run()


if __name__ == "__main__":
    main()
