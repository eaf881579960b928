"""The channel against a real exporter process: hand-over, flush, loss, restart, goodbye."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes import exporter_of_socket, parent_of
from tracer.config import Settings
from tracer.configure import ExporterProcess
from tracer.errors import SettingsError
from tracer.export import Channel, engine_infos, publish_engine, socket_path
from tracer.records import EngineInfo, GenerationEnd, GenerationStart, Record, RequestSpan, StepRecord

TRACE = "a" * 32
INFO = EngineInfo("m", "0.32.0", "V1", "cpu", "float32", 8, 64)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(enabled=True, store=str(tmp_path / "store"), socket=str(tmp_path / "x.sock"))


@pytest.fixture
def channels(settings: Settings) -> Iterator[Callable[[str], Channel]]:
    opened: list[Channel] = []

    def connect(role: str, capacity: int = 1 << 20) -> Channel:
        channel = Channel(settings, role, capacity)
        assert channel.connect()
        opened.append(channel)
        return channel

    yield connect
    for channel in opened:
        channel.close()


def generation(span_id: str) -> tuple[GenerationStart, StepRecord, GenerationEnd]:
    start = GenerationStart(TRACE, span_id, None, True, 10, "r", "m", "chat")
    step = StepRecord(TRACE, span_id, span_id[::-1], 0, "prefill", 1, 3, 4, 4, 11, 12)
    return start, step, GenerationEnd(TRACE, span_id, 20, "ok", "stop", 1)


def spans(settings: Settings) -> list[str]:
    lines = [line for file in Path(settings.store).glob("spans/*.jsonl") for line in file.read_text().splitlines()]
    resources = [resource for line in lines for resource in json.loads(line)["resourceSpans"]]
    return [span["name"] for resource in resources for scope in resource["scopeSpans"] for span in scope["spans"]]


def test_records_of_two_processes_become_spans(settings: Settings, channels: Callable[..., Channel]) -> None:
    api, worker = channels("api"), channels("worker")
    start, step, end = generation("b" * 15 + "1")
    worker.greet(INFO)
    assert all([api.send(start), worker.send(step), api.send(end)])
    assert api.flush([start.span_id], 30)
    assert sorted(spans(settings)) == ["chat m", "prefill"]


def test_steps_wait_for_the_start_of_their_generation(settings: Settings) -> None:
    """After a crash of the exporter both rings hold something, and the worker may reach the new one first."""
    api, worker = Channel(settings, "api", 1 << 20), Channel(settings, "worker", 1 << 20)
    start, step, end = generation("b" * 15 + "2")
    api._reconnecting = worker._reconnecting = True  # Nobody connects by himself.
    assert worker.send(INFO)
    assert worker.ring.read() is not None  # By an exporter process that is gone.
    worker.ring.release()
    assert all([api.send(start), api.send(end), worker.send(step)])
    assert worker.connect()
    assert worker.flush([], 0.3) is False, "nothing of a worker is read before an API process was heard"
    assert api.connect()
    assert api.flush([start.span_id], 30)
    assert sorted(spans(settings)) == ["chat m", "prefill"]
    worker.close()
    api.close()


class Kept:
    """An exporter that remembers the kinds of what it got."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def export(self, record: Record, payload: memoryview) -> None:
        self.kinds.append(type(record).__name__)

    def force_flush(self, timeout_s: float) -> bool:
        return True

    def pending(self) -> tuple[str, ...]:
        return ()

    def shutdown(self, timeout_s: float) -> bool:
        return True


def test_an_api_process_that_has_just_connected_is_heard_before_the_worker(settings: Settings) -> None:
    """Its first request: it connects, announces, and the worker's first step follows before it was even accepted."""
    kept = Kept()
    process = ExporterProcess(Path(settings.socket), [kept])
    worker, api = Channel(settings, "worker", 1 << 20), Channel(settings, "api", 1 << 20)
    start, step, _ = generation("b" * 15 + "3")
    assert worker.connect()
    process._wait()  # Accepts it,
    process._wait()  # and hears who it is.
    assert api.connect()
    assert all([api.send(start), worker.send(step)])
    process._drain()
    assert kept.kinds == ["GenerationStart", "StepRecord"]
    assert process._assembler.orphans == 0
    assert not process._accept(), "an event that was seen to already takes no time"
    worker.close()
    api.close()
    for client in list(process._clients):
        process._leave(client)
    process._finish()


def test_an_engine_is_known_before_its_first_generation(settings: Settings) -> None:
    """An offline engine: its worker, its first request and its first step may all be there at the first look."""
    kept = Kept()
    process = ExporterProcess(Path(settings.socket), [kept])
    worker, api = Channel(settings, "worker", 1 << 20), Channel(settings, "api", 1 << 20)
    start, step, _ = generation("b" * 15 + "4")
    assert worker.connect()
    assert api.connect()
    process._meet()
    worker.greet(INFO)
    assert all([api.send(start), worker.send(step)])
    process._drain()
    assert kept.kinds == ["EngineInfo", "GenerationStart", "StepRecord"]
    worker.close()
    api.close()
    for client in list(process._clients):
        process._leave(client)
    process._finish()


def test_a_full_ring_refuses_and_counts(settings: Settings) -> None:
    channel = Channel(settings, "worker", 4096)  # Never connected: nobody reads.
    channel._reconnecting = True
    sent = [channel.send(generation("b" * 16)[1]) for _ in range(50)]
    assert sent[0]
    assert not sent[-1]
    assert channel.lost == sent.count(False)


def test_a_dead_exporter_is_replaced_and_hears_the_greeting_again(
    settings: Settings, channels: Callable[..., Channel]
) -> None:
    worker = channels("worker")
    worker.greet(INFO)
    api = channels("api")
    assert api.flush([], 30)
    os.kill(exporter_of_socket(settings.socket), signal.SIGKILL)
    for channel in (api, worker):
        deadline = threading.Event()
        while channel._socket is None or not channel.flush([], 1):
            channel.send(RequestSpan(TRACE, "c" * 16, None, 1, 2, "POST", "/x", 200))
            deadline.wait(0.05)
    start, step, end = generation("b" * 15 + "2")
    assert all([api.send(start), worker.send(step), api.send(end)])
    assert api.flush([start.span_id], 30)
    assert "prefill" in spans(settings)


def test_a_dead_exporter_is_forked_again_by_its_keeper(settings: Settings, channels: Callable[..., Channel]) -> None:
    """Nobody loads the libraries again, and no client is refused meanwhile."""
    api = channels("api")
    before = exporter_of_socket(settings.socket)
    keeper = parent_of(before)
    os.kill(before, signal.SIGKILL)
    while exporter_of_socket(settings.socket) == before:
        pass
    assert parent_of(exporter_of_socket(settings.socket)) == keeper
    while api._socket is None or not api.flush([], 1):
        api.send(RequestSpan(TRACE, "c" * 16, None, 1, 2, "POST", "/x", 200))
    assert parent_of(exporter_of_socket(settings.socket)) == keeper


def test_an_exporter_outlives_its_keeper(settings: Settings, channels: Callable[..., Channel]) -> None:
    api = channels("api")
    exporter = exporter_of_socket(settings.socket)
    os.kill(parent_of(exporter), signal.SIGKILL)
    assert api.flush([], 30)
    os.kill(exporter, signal.SIGKILL)
    while api._socket is None or not api.flush([], 1):
        api.send(RequestSpan(TRACE, "c" * 16, None, 1, 2, "POST", "/x", 200))
    assert exporter_of_socket(settings.socket) != exporter


def test_the_exporter_leaves_nothing_behind(settings: Settings, channels: Callable[..., Channel]) -> None:
    api = channels("api")
    publish_engine(settings, INFO)
    assert engine_infos(settings) == (INFO,)
    pid = exporter_of_socket(settings.socket)
    ended = os.pidfd_open(pid)
    api.close()
    import select

    assert select.select([ended], [], [], 30)[0]
    os.close(ended)
    assert list(Path(settings.socket).parent.glob("x.*")) == []


def test_an_exporter_that_died_at_work_is_noticed(settings: Settings, channels: Callable[..., Channel]) -> None:
    api = channels("api")
    os.kill(exporter_of_socket(settings.socket), signal.SIGSTOP)
    pid = exporter_of_socket(settings.socket)
    api.ring.set_waiting(False)  # As if it had died in the middle of a batch: it never said that it sleeps.
    os.kill(pid, signal.SIGKILL)
    patience = threading.Event()
    for _ in range(400):
        api.ring.set_waiting(False)
        api.send(RequestSpan(TRACE, "c" * 16, None, 1, 2, "POST", "/x", 200))
        if api._socket is not None and api.flush([], 1):
            break
        patience.wait(0.05)
    assert exporter_of_socket(settings.socket) != pid


def test_a_runtime_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.config.runtime_directory", lambda: tmp_path)
    tmp_path.chmod(0o755)
    with pytest.raises(SettingsError, match="private directory"):
        socket_path()


def test_files_of_dead_servers_are_swept_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.config.runtime_directory", lambda: tmp_path)
    tmp_path.chmod(0o700)
    for name in ("1-dead.lock", "1-dead.sock", "1-dead.engine-0.json", "2-alive.lock", "2-alive.sock"):
        (tmp_path / name).touch()
    for name in ("1-dead.lock", "2-alive.lock"):
        os.utime(tmp_path / name, (1, 1))
    with (tmp_path / "2-alive.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(tmp_path / "2-alive.lock", (1, 1))
        socket_path()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2-alive.lock", "2-alive.sock"]
