"""A server without a model: an API process, a worker process and the real exporter, one or all of them killed.

`crash` runs one round: both processes hand synthetic generations to the exporter process through their real channels
and rings, somebody is killed at a given moment, and the stores are compared with what had been acknowledged: every
record that the ring's tail had passed. The rings are made here and outlive those who use them. As a program
(`python -m tests.exporters.crashing ROLE ROOT RING LOG`) this module is one of the two processes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from exporters.journal import FOLDER
from tests.exporters.synthetic import DECODE, FULL, NOTHING, Synthetic, engine, exporter, opened
from tests.processes import exporter_of_socket, parent_of
from tracer.config import Settings
from tracer.export import Channel
from tracer.records import GenerationEnd, Record, WorkerEnd
from tracer.ring import Ring

__all__ = ["VICTIMS", "Outcome", "crash"]

Victim = Literal["exporter", "worker", "server"]
VICTIMS: Final[tuple[Victim, ...]] = ("exporter", "worker", "server")
STEPS: Final = 90
"""Past the first shard of 64."""
LINE: Final = struct.Struct("<Qhh")
"""The ring's head after a record, the generation, and its step (-1: another kind of record)."""
PATIENCE: Final = 60.0


def generations() -> list[Synthetic]:
    """What is sent; the last asks for the prompt's map too."""
    specs = [DECODE] * 5 + [FULL]
    return [
        Synthetic(steps=STEPS, prompt=70, vocab=3000, spec=spec, span_id=f"{n + 1:016x}", seed=n, trace_id=f"{n:032x}")
        for n, spec in enumerate(specs, start=1)
    ]


def settings_of(root: Path) -> Settings:
    """Store and socket below `root`."""
    return Settings(enabled=True, store=str(root / "store"), socket=str(root / "x.sock"))


# -- the two processes ---------------------------------------------------------------------------------------------


class Producer:
    """Sends until everything is in the ring, and notes where the ring's head was after each record."""

    def __init__(self, role: str, root: Path, ring: int, log: int) -> None:
        self.channel = Channel(settings_of(root), role, 4096)
        self.channel.ring = Ring(ring)
        self._log = log
        assert self.channel.connect()

    def send(self, record: Record, payload: memoryview = NOTHING, generation: int = -1, step: int = -1) -> None:
        """Wait for room: this test is about kills, not about a full ring."""
        while not self.channel.send(record, [payload]):
            time.sleep(0.001)
        os.write(self._log, LINE.pack(self.channel.ring.head, generation, step))


def worker(producer: Producer) -> None:
    """Prompt blocks, then the steps of all generations in turn."""
    work = generations()
    producer.channel.greet(engine())
    assert producer.channel.flush([], PATIENCE)
    say("ready")
    sys.stdin.readline()
    for first, stop in ((0, 30), (30, 70)):
        for layer in range(3):
            producer.send(*work[-1].block(layer, first, stop))
    for step in range(STEPS):
        for number, generation in enumerate(work):
            producer.send(*generation.step(step), number, step)
        time.sleep(0.003)
    for generation in work:
        producer.send(WorkerEnd(generation.trace_id, generation.span_id))
    say("done")
    sys.stdin.readline()


def api(producer: Producer) -> None:
    """The starts, then the ends as the parent says: with how many tokens each."""
    work = generations()
    for number, generation in enumerate(work):
        producer.send(generation.start(), NOTHING, number)
    say("ready")
    for generation, count in zip(work, sys.stdin.readline().split(), strict=True):
        producer.send(generation.end(int(count)))
    while producer.channel._socket is None or not producer.channel.flush([g.span_id for g in work], 5):
        producer.send(GenerationEnd("0" * 32, "0" * 16, 0, "ok", "", 0))  # Finds out that the exporter is gone.
        time.sleep(0.05)
    say("flushed")
    sys.stdin.readline()


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


# -- the round -----------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """One of the two processes as its parent sees it."""

    process: subprocess.Popen[str]
    ring: Ring
    log: Path

    def hear(self, word: str) -> None:
        """Wait for that word."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def tell(self, line: str = "") -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def sent(self) -> list[tuple[int, int, int]]:
        """(head, generation, step) of each record in the ring."""
        data = self.log.read_bytes()
        return list(LINE.iter_unpack(data[: len(data) // LINE.size * LINE.size]))

    def acknowledged(self) -> list[tuple[int, int]]:
        """(generation, step) of each record that the ring's tail has passed."""
        tail = self.ring.head - self.ring.used
        return [(generation, step) for head, generation, step in self.sent() if head <= tail]


@dataclass
class Outcome:
    """What one round showed."""

    victim: str
    acknowledged: int = 0
    """Steps that had been acknowledged when the victim died, of all generations."""
    stored: int = 0
    """Steps in the stores afterwards."""
    statuses: dict[str, int] = field(default_factory=dict)
    recovery_s: float = 0.0
    """Seconds that the recovery took; known where the test itself recovers."""
    problems: list[str] = field(default_factory=list)


def start(role: str, root: Path) -> Child:
    ring = Ring.create(1 << 22)
    log = root / f"{role}.log"
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.exporters.crashing", role, str(root), str(ring.fd), str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[ring.fd, out],
        env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
    )  # fmt: skip
    os.close(out)
    return Child(process, ring, log)


@contextlib.contextmanager
def children(root: Path) -> Iterator[dict[str, Child]]:
    """Both processes, ready; gone afterwards."""
    out: dict[str, Child] = {}
    try:
        for role in ("worker", "api"):  # The engine's facts come before the first generation.
            out[role] = start(role, root)
            out[role].hear("ready")
        yield out
    finally:
        for child in out.values():
            child.process.kill()
            child.process.wait()
            for pipe in (child.process.stdin, child.process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            child.ring.close()


def exporter_of(root: Path) -> int:
    """The exporter process of that socket, as a file descriptor that says when it has ended."""
    return os.pidfd_open(exporter_of_socket(root / "x.sock"))


def ended(process: int) -> None:
    assert select.select([process], [], [], PATIENCE)[0], "the exporter process did not end"
    os.close(process)


def crash(root: Path, victim: Victim, delay_s: float) -> Outcome:
    """Kill the victim `delay_s` seconds after the work began; compare the store with what was acknowledged."""
    outcome = Outcome(victim)
    with children(root) as both:
        both["worker"].tell()
        threading.Event().wait(delay_s)
        kept = {"exporter": kill_exporter, "worker": kill_worker, "server": kill_server}[victim](root, both)
        if victim == "server":
            begin = time.perf_counter()
            exporter(root / "store").recover()
            outcome.recovery_s = time.perf_counter() - begin
    if victim != "server":
        ended(exporter_of(root)) if alive(root) else None
    compare(root / "store", kept, outcome)
    return outcome


def alive(root: Path) -> bool:
    try:
        os.close(exporter_of(root))
    except AssertionError:
        return False
    return True


def kill_exporter(root: Path, both: dict[str, Child]) -> list[tuple[int, int]]:
    """The exporter dies between two instructions of everybody else; then all goes on."""
    victim = exporter_of(root)
    for child in both.values():
        child.process.send_signal(signal.SIGSTOP)
    signal.pidfd_send_signal(victim, signal.SIGKILL)
    ended(victim)
    kept = both["worker"].acknowledged() + both["api"].acknowledged()
    for child in both.values():
        child.process.send_signal(signal.SIGCONT)
    both["worker"].hear("done")
    both["api"].tell(" ".join([str(STEPS)] * len(generations())))
    both["api"].hear("flushed")
    return kept


def kill_worker(root: Path, both: dict[str, Child]) -> list[tuple[int, int]]:
    """The worker dies; the API process ends its generations with what has come: all that was in the ring counts."""
    both["worker"].process.kill()
    both["worker"].process.wait()
    sent = [(generation, step) for _, generation, step in both["worker"].sent()]
    both["api"].tell(" ".join(str(count_of(sent, number)) for number in range(len(generations()))))
    both["api"].hear("flushed")
    return sent


def kill_server(root: Path, both: dict[str, Child]) -> list[tuple[int, int]]:
    """Everybody dies, the exporter somewhere between the other two."""
    victim = exporter_of(root)
    os.kill(parent_of(exporter_of_socket(root / "x.sock")), signal.SIGKILL)  # Or the keeper would make another one.
    both["api"].process.kill()
    signal.pidfd_send_signal(victim, signal.SIGKILL)
    both["worker"].process.kill()
    ended(victim)
    both["worker"].process.wait()
    return both["worker"].acknowledged() + both["api"].acknowledged()


def count_of(kept: list[tuple[int, int]], number: int) -> int:
    """How many steps of that generation are among them; they are its first ones."""
    return 1 + max([step for generation, step in kept if generation == number], default=-1)


def compare(store: Path, kept: list[tuple[int, int]], outcome: Outcome) -> None:
    """Every acknowledged step is whole and equal; nothing temporary is left."""
    left = [str(path) for path in store.rglob("*") if path.suffix in {".part", ".tmp"} or path.name == FOLDER]
    outcome.problems += [f"left over: {path}" for path in left]
    for number, generation in enumerate(generations()):
        needed = count_of(kept, number)
        outcome.acknowledged += needed
        path = generation.path(store)
        if not path.exists():
            if (number, -1) in kept:
                outcome.problems.append(f"{path} is not there")
            continue
        try:
            outcome.stored += check(opened(path), generation, needed, outcome)
        except (AssertionError, KeyError, OSError, ValueError) as error:
            outcome.problems.append(f"{path}: {error}")


def check(group: Any, generation: Synthetic, needed: int, outcome: Outcome) -> int:
    """Compare one capture; returns how many of its steps are stored."""
    attributes, steps = group.attrs, int(group.attrs["output_tokens"])
    outcome.statuses[attributes["status"]] = outcome.statuses.get(attributes["status"], 0) + 1
    assert attributes["closed"] is True, "it is not closed"
    assert steps >= needed, f"{steps} steps, {needed} were acknowledged"
    assert attributes["complete"] is not bool(attributes["missing"]), "complete and missing contradict each other"
    assert attributes["complete"] is False or attributes["status"] != "interrupted", "complete, though interrupted"
    if attributes["status"] == "ok" and not attributes["complete"]:
        # The starts were still in the API process's ring: the new exporter met the worker's steps before them.
        assert not needed, f"acknowledged steps are missing: {attributes['missing']}"
        assert attributes["missing"][0]["reason"] == "not received"
        return 0
    if steps:
        np.testing.assert_array_equal(group["logits"][:], generation.logits[:steps])
        attention = group["attention"][:]
        for step in range(steps):
            keys = generation.prompt + step
            np.testing.assert_array_equal(attention[step, ..., :keys], generation.rows[step])
        np.testing.assert_array_equal(group["attention_summary"][:], generation.summaries[:steps])
    np.testing.assert_array_equal(group["token_id"][:], np.arange(steps))
    if generation.spec is FULL and needed:
        found = group["attention_prefill"][..., : generation.prompt]
        there = found.any(axis=(1, 3))[:, None, :, None]
        np.testing.assert_array_equal(found, np.where(there, generation.prefill, 0))
        assert there.all(), "rows of the prompt's map are gone"
    return steps


def main() -> None:
    """Be one of the two processes."""
    role, root, ring, log = sys.argv[1:]
    (api if role == "api" else worker)(Producer(role, Path(root), int(ring), int(log)))


if __name__ == "__main__":
    main()
