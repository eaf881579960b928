"""The servers under measurement, and what the kernel says about their processes.

All servers are up at the same time and asleep (SIGSTOP) but the one that is measured: whatever an idle engine or
exporter would still do, it does not do it to its rival.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from tests.integration.server import Server, free_port, server_environment
from tests.processes import exporter_of_store

__all__ = ["Engine", "Memory", "cpu_seconds", "descendants", "memory", "open_files", "other_plugins"]

ROOT: Final = Path(__file__).resolve().parents[2]
TICKS: Final = os.sysconf("SC_CLK_TCK")
MIDDLEWARE: Final = ("--middleware", "tracer.middleware.TracingMiddleware")
QUIET_SECONDS: Final = 0.25
QUIET_SHARE: Final = 0.05
"""A process that used less of a core than this over QUIET_SECONDS has nothing to do."""
SETTLE_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of one process, MB."""

    anonymous: float
    shared: float
    """Shared memory, tensorspan's queue among it; a page counts once it was touched."""
    peak: float
    """The most that was ever resident, of any kind."""


def memory(pid: int) -> Memory:
    """From /proc/PID/status."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    kb = {words[0]: int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}
    return Memory(kb["RssAnon:"] / 1e3, kb["RssShmem:"] / 1e3, kb["VmHWM:"] / 1e3)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, all threads."""
    return sum(map(int, _stat(pid)[11:13])) / TICKS


def descendants(pid: int) -> list[int]:
    """All children of a process, and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def other_plugins() -> str:
    """Value of VLLM_PLUGINS that loads every installed plugin but ours."""
    names = (entry.name for entry in entry_points(group="vllm.general_plugins") if entry.name != "tensorspan")
    return ",".join(names)


class Engine:
    """One vLLM server. `asleep` it keeps its memory and takes no CPU."""

    def __init__(self, name: str, model: Path, folder: Path, options: Sequence[str], **variables: str) -> None:
        """Start and wait until it answers. variables: of the server's environment, over this process's own."""
        self.name = name
        self.store = folder / "captures"
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        path = os.pathsep.join(filter(None, (str(ROOT), variables.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH"))))
        # The CPU wheel's own `vllm` command asks for the version of a distribution that it is not.
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        base = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
        environment = server_environment(PYTHONPATH=path, **variables)
        self.server = Server([*module, *base, *options], folder / "log", port, environment, folder)
        self.url = self.server.url
        self.api = self.server.process.pid
        self.worker = max(descendants(self.api), key=lambda pid: memory(pid).anonymous)
        self.exporter = _exporter_of(self.store)
        self._stopped: list[int] = []

    @classmethod
    def plain(cls, model: Path, folder: Path, options: Sequence[str]) -> Engine:
        """vLLM without any trace of us: the plugin is not even loaded."""
        return cls("plain", model, folder, options, VLLM_PLUGINS=other_plugins())

    @classmethod
    def off(cls, model: Path, folder: Path, options: Sequence[str]) -> Engine:
        """Plugin and middleware loaded, nothing enabled."""
        return cls("off", model, folder, (*MIDDLEWARE, *options))

    @classmethod
    def traced(cls, model: Path, folder: Path, options: Sequence[str], **variables: str) -> Engine:
        """Tracing on; spans go to the file exporter in the store."""
        store = str(folder / "captures")
        return cls("traced", model, folder, (*MIDDLEWARE, *options), TENSORSPAN_STORE=store, **variables)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run for the length of the block."""
        self.wake()
        try:
            yield
        finally:
            self.sleep()

    def sleep(self) -> None:
        """Stop all of its processes where they are."""
        self._stopped = [pid for pid in (self.api, *descendants(self.api), self.exporter) if pid is not None]
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)
        self._stopped = []

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def writer_cpu(self) -> float:
        """CPU seconds of the exporter process so far; 0 without one."""
        return cpu_seconds(self.exporter) if self.exporter is not None else 0.0

    def settle(self) -> float:
        """Wait until the exporter has nothing to do; returns the CPU seconds it has used so far."""
        deadline = time.monotonic() + SETTLE_SECONDS
        used = self.writer_cpu()
        while self.exporter is not None and time.monotonic() < deadline:
            time.sleep(QUIET_SECONDS)
            before, used = used, self.writer_cpu()
            if used - before <= QUIET_SHARE * QUIET_SECONDS:
                break
        return used

    def idle_share(self, seconds: float = 1.0) -> float:
        """Cores used by all its processes while nobody asks for anything."""
        pids = [pid for pid in (self.api, *descendants(self.api), self.exporter) if pid is not None]
        before = sum(map(cpu_seconds, pids))
        time.sleep(seconds)
        return (sum(map(cpu_seconds, pids)) - before) / seconds

    def resident(self) -> Mapping[str, Memory]:
        """Memory of its processes by role."""
        roles = {"api": self.api, "worker": self.worker, "exporter": self.exporter}
        return {role: memory(pid) for role, pid in roles.items() if pid is not None}

    def stop(self) -> None:
        """End it."""
        self.wake()
        self.server.stop()


def open_files(engine: Engine) -> dict[str, int]:
    """Open file descriptors of its processes by role."""
    roles = {"api": engine.api, "worker": engine.worker, "exporter": engine.exporter}
    return {role: len(list(Path(f"/proc/{pid}/fd").iterdir())) for role, pid in roles.items() if pid is not None}


def _exporter_of(store: Path) -> int | None:
    """The exporter process that writes to `store`; None if there is none."""
    try:
        return exporter_of_store(store)
    except AssertionError:
        return None
