"""`kill -9` of the exporter, and of the whole server, in the middle of a real capture."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from exporters import journal
from exporters.journal import FOLDER, StepEntry
from tests.integration.oracle import oracle
from tests.integration.server import Server, await_true, server_environment
from tests.integration.test_server import TOLERANCE, chat
from tests.processes import exporter_of_store, parent_of
from tracer import Capture, open_capture

pytestmark = pytest.mark.engine

ASKED: Final = {"Trace-Capture": "logits;dtype=f32, attention;dtype=f32"}
ENOUGH: Final = 20
"""Steps to wait for before the kill."""


def journalled(path: Path) -> int:
    """How many steps the journal of an open capture names."""
    try:
        found = list(journal.entries(path.read_bytes()))
    except FileNotFoundError:
        return 0
    return sum(isinstance(content, StepEntry) and content.step >= 0 for _, content in found)


def ask(server: Server, answers: list[Any]) -> threading.Thread:
    """A long request that captures, in a thread of its own."""

    def post() -> None:
        try:
            answers.append(server.post("/v1/chat/completions", chat(max_tokens=200, ignore_eos=True), ASKED))
        except OSError as error:
            answers.append(error)

    thread = threading.Thread(target=post)
    thread.start()
    return thread


def await_steps(store: Path) -> Path:
    """The journal of the one open capture, once it names enough steps."""
    for _ in range(2400):
        found = [path for path, _, _ in journal.leftovers(store) if journalled(path) >= ENOUGH]
        if found:
            return found[0]
        threading.Event().wait(0.05)
    raise AssertionError("no capture was begun")


def check(cap: Capture, acknowledged: int, model: Path) -> None:
    """Every acknowledged step is there and equal to what the model computes without us."""
    assert cap.closed
    assert not cap.complete
    assert cap.attrs["status"] == "interrupted"
    assert [entry["reason"] for entry in cap.missing] == ["the exporter process was killed"]
    assert cap.num_steps == acknowledged
    tokens = [token.id for token in cap.tokens]
    assert len(tokens) == cap.prompt_tokens + acknowledged
    last = cap.prompt_tokens - 1
    want = oracle(model, tokens)
    logits = np.asarray(cap.logits)
    assert logits.argmax(axis=1).tolist() == tokens[cap.prompt_tokens :]
    np.testing.assert_allclose(logits, want.logits[last : last + acknowledged], rtol=0, atol=5e-3)
    for layer in cap.attention:
        rows = np.asarray(cap.attention[layer])
        for step in range(acknowledged):
            keys = last + 1 + step
            np.testing.assert_allclose(
                rows[step, :, :keys], want.attention[layer, :, last + step, :keys], rtol=0, atol=TOLERANCE
            )


def check_clean(store: Path) -> None:
    assert not (store / FOLDER).exists()
    assert not list(store.rglob("*.part"))


def test_the_exporter_is_killed_in_the_middle_of_a_capture(server: Server, server_store: Path, demo: Path) -> None:
    answers: list[Any] = []
    thread = ask(server, answers)
    left = await_steps(server_store)
    victim = exporter_of_store(server_store)
    os.kill(victim, signal.SIGSTOP)
    acknowledged = journalled(left)
    os.kill(victim, signal.SIGKILL)
    thread.join()
    status, headers, answer = answers[0]
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 200
    await_true(lambda: not left.exists())
    check(open_capture(server_store, headers["trace-capture-ref"]), acknowledged, demo)
    check_clean(server_store)
    status, headers, _ = server.post("/v1/chat/completions", chat(max_tokens=4), ASKED)
    ref = headers["trace-capture-ref"]
    await_true(lambda: (server_store / ref / "zarr.json").exists() and open_capture(server_store, ref).closed)
    assert open_capture(server_store, ref).complete


def test_the_whole_server_is_killed_and_the_command_recovers(demo: Path, tmp_path: Path) -> None:
    store = tmp_path / "captures"
    environment = server_environment(TENSORSPAN_STORE=str(store), OTEL_TRACES_EXPORTER="none")
    options = (
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        "268435456",
    )
    server = Server.vllm(demo, tmp_path / "log", environment, *options)
    answers: list[Any] = []
    try:
        thread = ask(server, answers)
        left = await_steps(store)
        victim = exporter_of_store(store)
        os.kill(parent_of(victim), signal.SIGKILL)  # Or the keeper would make another one.
        os.kill(victim, signal.SIGSTOP)  # Or it might still learn that the others are gone, and end the capture.
        os.killpg(server.process.pid, signal.SIGKILL)
        os.kill(victim, signal.SIGKILL)
        thread.join()
    finally:
        server.stop()
    assert isinstance(answers[0], OSError)
    acknowledged = journalled(left)
    assert acknowledged >= ENOUGH
    trace_id, _, span_id = left.name.partition("-")
    path = store / trace_id / span_id
    assert not open_capture(path).closed
    command = [str(Path(sys.executable).with_name("tensorspan")), "recover", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(path), f"1 closed in {store}"]
    check(open_capture(path), acknowledged, demo)
    check_clean(store)
