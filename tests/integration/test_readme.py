"""Every command and every program in the README, run as it stands there (with this machine's model, port and IDs)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import pytest

from deploy.model import demo_model
from tests.exporters.seaweed import Seaweed
from tests.integration.server import Server, free_port, server_environment
from tracer import config, find_captures, open_capture, remote

pytestmark = pytest.mark.engine

ROOT: Final = Path(__file__).resolve().parents[2]
FENCE: Final = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
BLOCKS: Final[list[tuple[str, str]]] = FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
COMMANDS: Final = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
PROGRAMS: Final = [text for kind, text in BLOCKS if kind == "python"]
QUICK: Final = ("--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", "268435456")
"""Options that only make the engine start sooner."""


def command(start: str) -> str:
    """The one README command that starts so."""
    [found] = [line for line in COMMANDS if line.startswith(start)]
    return found


def program(words: str) -> str:
    """The one README program that contains these words."""
    [found] = [text for text in PROGRAMS if words in text]
    return found


def serve(line: str, folder: Path, **extra: str) -> Server:
    """A README command that serves, in a folder of its own."""
    port = free_port()
    words = shlex.split(line.replace("MODEL", str(demo_model())))
    assignments = [word for word in words if re.match(r"[A-Z_]+=", word)]
    words = words[len(assignments) :]
    words[0] = str(Path(sys.executable).with_name(words[0]))
    name = ("--served-model-name", "MODEL", "--port", str(port))
    environment = server_environment(**dict(word.split("=", 1) for word in assignments), **extra)
    return Server([*words, *name, *QUICK], folder / "log", port, environment, folder)


def run_python(text: str, folder: Path, **replaced: str) -> str:
    """What a README program prints, run as a script of its own."""
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    script = folder / "program.py"
    script.write_text(text, encoding="utf-8")
    environment = server_environment(VLLM_LOGGING_LEVEL="WARNING")
    result = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def asked(folder: Path) -> str:
    """`tensorspan serve`, asked by the README's client: the reference of the capture."""
    server = serve(command("tensorspan serve MODEL --store ./captures"), folder)
    try:
        url = f"{server.url}/v1"
        printed = run_python(program("from openai"), folder, **{"http://127.0.0.1:8000/v1": url})
    finally:
        server.stop()
    status, ref = printed.split()
    assert status == "recording"
    return ref


def test_every_command_has_a_test() -> None:
    known = (
        "make demo", "make test", "tensorspan ", "TENSORSPAN_STORE=", "export OTEL_EXPORTER_OTLP_ENDPOINT=",
        "export AWS_",
    )  # fmt: skip
    assert [line for line in COMMANDS if not line.startswith(known)] == []
    assert len(PROGRAMS) == 4


def test_make_demo() -> None:
    """As `make demo` in the checkout's own environment; elsewhere the program that it runs."""
    own = Path(sys.prefix) == ROOT / ".venv"
    words = ["make", "demo"] if own else [sys.executable, str(ROOT / "deploy" / "demo.py")]
    result = subprocess.run(
        words, cwd=ROOT, env=server_environment(), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for words_shown in ("Trace-Capture-Ref", "The least certain tokens", "Where the answer looked", "open_capture"):
        assert words_shown in result.stdout


def test_ci_runs_make_test() -> None:
    assert command("make test") in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_command_looks_at_what_was_captured(asked: str, folder: Path) -> None:
    for line in [line for line in COMMANDS if line.startswith("tensorspan ") and "serve" not in line]:
        name, *arguments = shlex.split(line)
        path = str(Path(sys.executable).with_name(name))
        result = subprocess.run([path, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert result.returncode == 0, line + result.stderr
        assert result.stdout


def test_the_readers_lines(asked: str, folder: Path) -> None:
    _, span_id = asked.split("/")
    run_python(program('open_capture("captures"'), folder, b7ad6b7169203331=span_id)


def test_plain_zarr_and_xarray(asked: str, folder: Path) -> None:
    trace_id, span_id = asked.split("/")
    run_python(program("open_zarr"), folder, TRACE_ID=trace_id, SPAN_ID=span_id)


def test_vllm_without_our_launcher(tmp_path: Path) -> None:
    # A collector that nobody listens for: it may cost spans, but no answer, no capture and no time at the end.
    server = serve(command("TENSORSPAN_STORE="), tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    try:
        body = {"model": "MODEL", "prompt": "Once", "max_tokens": 4}
        status, headers, _ = server.post("/v1/completions", body, {"Trace-Capture": "logits, attention"})
    finally:
        server.stop()
    assert (status, headers["trace-capture-status"]) == (200, "recording")
    [entry] = find_captures(tmp_path / "captures")
    assert entry.complete


def test_a_bucket(seaweed: Seaweed, tmp_path: Path) -> None:
    variables = seaweed.environment()
    remote.locate("s3://bucket").bucket.put("made", b"")  # This server makes a bucket for its first object.
    assert re.findall(r"(\w+)=", command("export AWS_")) == list(variables)
    server = serve(
        command("tensorspan serve MODEL --store s3:"), tmp_path, TENSORSPAN_SPOOL=str(tmp_path / "spool"), **variables
    )
    try:
        body = {"model": "MODEL", "prompt": "Once", "max_tokens": 4}
        status, headers, _ = server.post("/v1/completions", body, {"Trace-Capture": "logits, attention"})
        assert (status, headers["trace-capture-status"]) == (200, "recording")
        deadline, pause = time.monotonic() + 30, threading.Event()
        while not (found := find_captures("s3://bucket/captures")):
            assert time.monotonic() < deadline, "the capture is not in the bucket"
            pause.wait(0.1)
    finally:
        server.stop()
    assert f"{found[0].trace_id}/{found[0].span_id}" == headers["trace-capture-ref"]
    assert open_capture("s3://bucket/captures", found[0].span_id).complete
    assert not list(tmp_path.glob("s3*"))


def test_offline(tmp_path: Path) -> None:
    quick = f'LLM("{demo_model()}", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 28)'
    printed = run_python(program("from vllm import LLM"), tmp_path, **{'LLM("MODEL")': quick})
    [entry] = find_captures(tmp_path / "captures")
    assert entry.complete
    assert entry.span_id in printed


def test_the_collector_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = command("export OTEL_").removeprefix("export ").split("=")
    monkeypatch.setattr(os, "environ", {name: value})
    assert config.otlp_protocol() == "grpc"
