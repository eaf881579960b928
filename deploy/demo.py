"""`make demo`: serve a small model, ask it something with a header, and look at what was recorded.

Nothing here is a stand-in: the real vLLM, the official OpenAI client, the spans and the captures that any user gets.
`KEEP=1` leaves the server running; `DEMO_MODEL=FOLDER` serves another model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from rich.text import Text

from tracer import Capture, config, open_capture
from tracer.errors import TensorspanError
from tracer.show import emit, readable_bytes, token_texts, trace_table
from tracer.show_capture import (
    array_facts,
    array_table,
    least_certain,
    load_lines,
    look_table,
    looked_at,
    uncertain_table,
)
from tracer.spans_file import Trace, read_trace

QUESTION: Final = "The red key is in the kitchen and the blue key is in the garage. Where is the blue key?"
WANTED: Final = "logits, attention"
STORE: Final = Path("captures")
NAME: Final = "smollm2-135m-instruct"
KV_CACHE_BYTES: Final = 256 << 20
"""11,000 tokens of the demo model; vLLM would take far more memory by default."""

START_SECONDS: Final = 600
"""The first start on a machine compiles the model."""
CAPTURE_SECONDS: Final = 30
SPANS_SECONDS: Final = 15
STOP_SECONDS: Final = 30
HURRY_SECONDS: Final = 5
"""The same for a server that has answered nothing yet: it has nothing to finish."""
LOOK_SECONDS: Final = 0.2
HEARTBEAT_SECONDS: Final = 10
"""A line of progress at least this often where the output is not a terminal."""
PHASES: Final = (
    ("Application startup complete", "ready"),
    ("Starting vLLM server", "starting the HTTP server"),
    ("tensorspan", "hooking the workers"),
    ("Graph capturing", "capturing graphs"),
    ("torch.compile", "compiling the model (once per machine)"),
    ("Loading weights took", "compiling the model (once per machine)"),
    ("Starting to load model", "loading weights"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("non-default args", "reading the model's configuration"),
)
"""What the newest of these lines of vLLM's log means."""
ADVICE: Final = (
    ("Failed to infer device type", "this build of vLLM does not fit this machine: make demo ENGINE=cpu (or gpu)"),
    ("No space left on device", "the disk is full: free some space and repeat"),
    ("Address already in use", "another program took the port meanwhile: repeat"),
    ("KV cache", "the machine has too little free memory: close other programs and repeat"),
    ("out of memory", "the GPU's memory is in use: stop what uses it (nvidia-smi), or set CUDA_VISIBLE_DEVICES"),
    ("Killed", "the machine has too little free memory: close other programs and repeat"),
    ("Python.h", "torch.compile needs Python's headers: sudo apt install python3-dev"),
)


class DemoError(Exception):
    """What went wrong and the repair."""


def main() -> int:
    """The whole demo; 0 if everything was shown."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        folder = _model()
        with _server(folder) as (url, process):
            capture, headers = _ask(url)
            trace = _trace(headers["trace-capture-ref"].partition("/")[0])
            _show(capture, trace, folder)
            _farewell(capture, url, process)
    except KeyboardInterrupt:
        print("\ntensorspan: demo interrupted", file=sys.stderr)
        return 130
    except (DemoError, TensorspanError, OSError) as error:
        print(f"tensorspan: {error}", file=sys.stderr)
        return 1
    return 0


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _model() -> Path:
    """The demo model, converted on the first call; or the folder that DEMO_MODEL names."""
    if chosen := os.environ.get("DEMO_MODEL"):
        return Path(chosen)
    spec = importlib.util.spec_from_file_location("demo_model", Path(__file__).with_name("model.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not module.model_folder("bfloat16").is_dir():
        _say("converting SmolLM2-135M-Instruct (once, about 20 s)")
    try:
        return Path(module.demo_model())
    except (RuntimeError, ModuleNotFoundError) as error:
        raise DemoError(error) from error


# -- the server ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`tensorspan serve`, until the block ends; with KEEP=1 it stays if all went well."""
    port = _free_port()
    options = ["--store", str(STORE), "--content", "1", "--port", str(port), "--served-model-name", NAME]
    options += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    _say(shlex.join(["tensorspan", "serve", str(folder), *options]))
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    descriptor, log = tempfile.mkstemp(prefix="tensorspan-demo-", suffix=".log")
    command = [sys.executable, "-m", "tracer.cli", "serve", str(folder), *options]
    with os.fdopen(descriptor, "wb") as out:
        # A session of its own: Ctrl-C reaches this script, which then ends the server in order.
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=os.environ | quiet, start_new_session=True
        )
    patience: int | None = HURRY_SECONDS
    keep_log = False
    try:
        _await_server(process, port, Path(log))
        patience = STOP_SECONDS
        yield f"http://127.0.0.1:{port}", process
        if os.environ.get("KEEP"):
            patience, keep_log = None, True
    except DemoError:
        keep_log = True  # Its end was shown and its path named.
        raise
    finally:
        if patience is not None:
            _stop(process, patience)
        if not keep_log:
            Path(log).unlink()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_server(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until it answers, saying what it is doing; DemoError with the end of its log if it does not come up."""

    def ready() -> bool:
        if process.poll() is not None:
            raise DemoError(_failure(f"the server ended with code {process.returncode}", log))
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    if not _wait_for(ready, START_SECONDS, lambda: f"waiting for vLLM: {_phase(log)}", process.pid):
        raise DemoError(_failure(f"the server did not answer within {START_SECONDS} s", log))


def _phase(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    return max(((text.rfind(mark), meaning) for mark, meaning in PHASES), default=(-1, ""))[1] if text else "starting"


def _failure(what: str, log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    advice = next((hint for mark, hint in ADVICE if mark in text), "`.venv/bin/tensorspan doctor` says what is missing")
    return "\n".join([f"{what}; the end of its log:", *text.splitlines()[-30:], f"tensorspan: {advice} (log: {log})"])


def _stop(process: subprocess.Popen[bytes], patience: int) -> None:
    """Interrupt as Ctrl-C does, wait, end what is left of its process group; then wait for the exporter process."""
    if process.poll() is None:
        _say("stopping the server")
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # `tensorspan serve` becomes vLLM, so its PID names the exporter's socket, which goes when the exporter does.
    sockets = config.runtime_directory()
    _wait_for(lambda: not any(sockets.glob(f"{process.pid}-*.sock")), STOP_SECONDS, lambda: "waiting for the exporter")


def _wait_for(done: Callable[[], bool], seconds: float, doing: Callable[[], str], pid: int | None = None) -> bool:
    """Look again and again until `done` or the time is over, with progress; wakes at once when process `pid` ends."""
    terminal, started = sys.stdout.isatty(), time.monotonic()
    said = started
    watched = [] if pid is None else [os.pidfd_open(pid)]
    try:
        while not done():
            now = time.monotonic()
            if now - started > seconds:
                return False
            line = f"    {now - started:4.0f} s  {doing()}"
            if terminal:
                print(f"\r{line:<78.78}", end="", flush=True)
            elif now - said >= HEARTBEAT_SECONDS:
                said = now
                print(line, flush=True)
            select.select(watched, [], [], LOOK_SECONDS)
    finally:
        for descriptor in watched:
            os.close(descriptor)
        if terminal:
            print(f"\r{'':<78}\r", end="", flush=True)
    return True


# -- the question --------------------------------------------------------------------------------------------------


def _ask(url: str) -> tuple[Capture, dict[str, str]]:
    """Ask through the official client; the finished capture and the response's headers."""
    from openai import OpenAI, OpenAIError

    _title("Ask, through the official OpenAI client", f"Trace-Capture: {WANTED}")
    print(f"Q  {QUESTION}\nA  ", end="", flush=True)
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    try:
        raw = client.chat.completions.with_raw_response.create(
            model=NAME,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=48,
            stream=True,
            extra_headers={"Trace-Capture": WANTED},
        )
        for chunk in raw.parse():
            print((chunk.choices[0].delta.content or "") if chunk.choices else "", end="", flush=True)
    except OpenAIError as error:
        raise DemoError(
            f"the server refused: {error}; `.venv/bin/tensorspan doctor` says what it can capture"
        ) from error
    print("\n")
    headers = {name.lower(): value for name, value in raw.headers.items()}
    for name in ("traceresponse", "Trace-Capture-Status", "Trace-Capture-Ref"):
        print(f"{name}: {headers.get(name.lower(), '(missing)')}")
    if "trace-capture-ref" not in headers:
        raise DemoError("the answer names no capture; `.venv/bin/tensorspan doctor` says why not")
    return _finished(headers["trace-capture-ref"]), headers


def _finished(ref: str) -> Capture:
    """The capture, once it is closed: the writer is a process of its own, a moment behind the answer."""
    found: list[Capture] = []

    def closed() -> bool:
        try:
            found[:] = [open_capture(STORE, ref)]
        except TensorspanError:
            return False
        return found[0].closed

    if not _wait_for(closed, CAPTURE_SECONDS, lambda: "waiting for the capture to be closed"):
        raise DemoError(f"{STORE}/{ref} was not finished within {CAPTURE_SECONDS} s; is the disk full or very slow?")
    return found[0]


def _trace(trace_id: str) -> Trace:
    """The trace from the spans file; with a collector, where the spans went there, rebuilt from the capture."""
    if config.otlp_protocol() is None and not config.spans_disabled():
        _wait_for(lambda: _has_request(trace_id), SPANS_SECONDS, lambda: "waiting for the spans")
    return read_trace(str(STORE), trace_id)


def _has_request(trace_id: str) -> bool:
    trace = read_trace(str(STORE), trace_id)
    return trace.source == "spans" and not any(root.is_generation for root in trace.roots)


# -- what was recorded ---------------------------------------------------------------------------------------------


def _show(capture: Capture, trace: Trace, folder: Path) -> None:
    _title(
        "The spans: one per engine step", "p: of the chosen token · entropy, margin: nats · attention: means, 0 to 1"
    )
    emit(trace_table(trace, token_texts([capture])))
    _title("The least certain tokens", "and what else they could have been")
    emit(uncertain_table(least_certain(capture, text_of=_texts(folder))))
    _title(
        "Where the answer looked", "attention on the prompt, mean of all steps, layers and heads; dim: chat template"
    )
    emit(look_table(looked_at(capture)))
    facts = array_facts(capture)
    stored = sum(fact["bytes_on_disk"] or 0 for fact in facts)
    _title("The capture", f"{readable_bytes(stored)}, {'complete' if capture.complete else 'incomplete'}")
    print(Path(capture.location).resolve())
    emit(array_table(facts))
    for entry in capture.missing:
        print(f"missing {entry['array']}: {entry['what']}: {entry['reason']}")
    lines = load_lines(capture)
    _title("Load it", "these lines, run now:")
    print("\n".join(f"    {line}" for line in lines))
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    print((run.stdout or run.stderr).rstrip())


def _texts(folder: Path) -> Callable[[int], str | None]:
    """Texts of tokens that the capture does not contain, from the model's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda token: str(tokenizer.decode([token], skip_special_tokens=False))


def _farewell(capture: Capture, url: str, process: subprocess.Popen[bytes]) -> None:
    bin_ = Path(sys.executable).parent
    command = os.path.relpath(bin_ / "tensorspan") if bin_.is_relative_to(Path.cwd()) else "tensorspan"
    step = capture.steps[-1].span_id
    _title("Go on")
    print(f"""\
{command} list                        the captures in {STORE}
{command} tree                        the newest trace again
{command} show {capture.span_id}       this capture; a step's span ID opens its row:
{command} show {step}
{command} doctor                      what this machine can capture

Spans in a UI:    make phoenix, or make jaeger where there is Docker
                  OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://127.0.0.1:4317 {command} serve MODEL
                  or upload {STORE}/spans/*.jsonl on Jaeger's search page""")
    if os.environ.get("KEEP"):
        print(f"\nThe server stays at {url}/v1 (model {NAME}). Stop it with: kill {process.pid}")


def _title(text: str, note: str = "") -> None:
    print()
    emit(Text.assemble((text, "bold cyan"), (f"  {note}" if note else "", "dim")))


def _say(text: str) -> None:
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
