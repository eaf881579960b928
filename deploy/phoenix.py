"""`make phoenix`: Arize Phoenix, a trace backend with a UI, on this machine's loopback.

Phoenix's gRPC port listens on every interface whatever PHOENIX_HOST says (20.26.1), and Phoenix asks nobody for a key:
so it runs in a network namespace, from which only 127.0.0.1 is led to it (deploy/isolated.py). It is installed on the
first call, into the user's cache (`$XDG_CACHE_HOME/tensorspan/phoenix-...`, 650 MB), never into `.venv`. Its own
telemetry, agents, shell and requests to the outside are switched off; the namespace has no outside anyhow.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Final

from deploy import bootstrap, isolated
from deploy.bootstrap import SetupError, say

__all__ = ["install", "installed"]

LOCK: Final = Path(__file__).with_name("requirements-phoenix.lock")
DONE: Final = "tensorspan-done"
FREE_GB: Final = 2
START_SECONDS: Final = 180
STOP_SECONDS: Final = 10
QUIET: Final = {
    "PHOENIX_HOST": "127.0.0.1",
    "PHOENIX_TELEMETRY_ENABLED": "false",
    "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
    "PHOENIX_DISABLE_AGENT_ASSISTANT": "true",
    "PHOENIX_AGENTS_DISABLE_BASH": "true",
    "PHOENIX_AGENTS_DISABLE_WEB_ACCESS": "true",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="phoenix.py", description="Arize Phoenix on 127.0.0.1, installed on the way.")
    parser.add_argument("--install", action="store_true", help="install, and do not start")
    parser.add_argument("--port", type=int, default=6006, help="UI, API and OTLP over HTTP")
    parser.add_argument("--grpc-port", type=int, default=4317, help="OTLP over gRPC")
    parser.add_argument("--data", type=Path, default=_cache() / "phoenix-data", help="folder of its database")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    ports = (chosen.port, chosen.grpc_port)
    try:
        if chosen.inside is not None:
            return asyncio.run(_inside(chosen.inside, ports, chosen.data))
        install()
        return 0 if chosen.install else _serve(ports, chosen.data)
    except (SetupError, OSError) as error:
        print(f"tensorspan: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def installed() -> Path | None:
    """The environment that the lock asks for; None if it is not there or not whole."""
    venv = _venv()
    return venv if (venv / DONE).exists() else None


def install() -> Path:
    """Install Phoenix if it is not there (1 to 3 minutes); its environment. SetupError with the repair."""
    venv = _venv()
    if (venv / DONE).exists():
        return venv
    pinned = bootstrap.requirements(LOCK)
    venv.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(venv.parent).free / 1e9) < FREE_GB:
        raise SetupError(f"{venv.parent} has {free:.1f} GB free, Phoenix needs {FREE_GB}; free some space and repeat")
    for old in venv.parent.glob("phoenix-*-*"):
        shutil.rmtree(old)
    say(f"{pinned[0]} in {venv} (650 MB, 1 to 3 minutes the first time)")
    bootstrap.create_venv(venv, "--without-pip")
    bootstrap.pip("install", "--no-deps", "--requirement", str(LOCK), what=LOCK.name, total=len(pinned), into=venv)
    (venv / DONE).touch()
    return venv


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensorspan"


def _venv() -> Path:
    """Another lock or another Python is another environment."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return _cache() / f"phoenix-{version}-{bootstrap.digest([LOCK])[:12]}"


def _serve(ports: tuple[int, int], data: Path) -> int:
    """Run Phoenix until it ends or this process is asked to."""
    if (problem := isolated.why_not()) is not None:
        raise SetupError(f"Phoenix would listen on every interface, and {problem}")
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tensorspan-") as folder:
        options = ["--inside", folder, "--port", str(ports[0]), "--grpc-port", str(ports[1]), "--data", str(data)]
        # Its standard input stays open as long as this process lives: that is how it notices the end.
        command = [*isolated.UNSHARE, sys.executable, "-m", "deploy.phoenix", *options]
        with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=bootstrap.ROOT, start_new_session=True) as child:
            try:
                return asyncio.run(_outside(Path(folder), ports, child))
            finally:
                assert child.stdin is not None
                child.stdin.close()


async def _outside(folder: Path, ports: tuple[int, int], child: subprocess.Popen[bytes]) -> int:
    """Carry the two ports out, say when Phoenix answers, and wait."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    servers = await isolated.carry_out(folder, ports)
    waiting = asyncio.create_task(asyncio.to_thread(child.wait))
    asking = asyncio.create_task(_say_when_up(ports))
    await asyncio.wait({waiting, asyncio.create_task(stopped.wait())}, return_when=asyncio.FIRST_COMPLETED)
    asking.cancel()
    for server in servers:
        server.close()
    if stopped.is_set():
        assert child.stdin is not None
        child.stdin.close()
        await waiting
        return 0
    return child.returncode or 1


async def _say_when_up(ports: tuple[int, int]) -> None:
    for _ in range(START_SECONDS * 2):
        if await asyncio.to_thread(_answers, ports[0]):
            say(f"Phoenix: http://127.0.0.1:{ports[0]} (Ctrl-C ends it). Send spans with")
            print(
                f"    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://127.0.0.1:{ports[1]} tensorspan serve MODEL", flush=True
            )
            return
        await asyncio.sleep(0.5)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
            return True
    except OSError:
        return False


async def _inside(folder: Path, ports: tuple[int, int], data: Path) -> int:
    """In the namespace: loopback, sockets, Phoenix; until standard input ends."""
    isolated.raise_loopback()
    await isolated.carry_in(folder, ports)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PHOENIX_", "OTEL_", "PYTHON"))}
    own = {"PHOENIX_PORT": str(ports[0]), "PHOENIX_GRPC_PORT": str(ports[1]), "PHOENIX_WORKING_DIR": str(data)}
    command = _venv() / "bin" / "phoenix"
    quiet = subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(command, "serve", env=clean | QUIET | own, stdin=quiet, stdout=quiet)
    ended = asyncio.create_task(process.wait())
    orphaned = asyncio.create_task(asyncio.to_thread(sys.stdin.buffer.read))
    await asyncio.wait({ended, orphaned}, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        process.terminate()
        try:
            await asyncio.wait_for(ended, STOP_SECONDS)
        except TimeoutError:
            process.kill()
    # The thread that reads standard input would be waited for.
    os._exit(0 if orphaned.done() else 1)


if __name__ == "__main__":
    sys.exit(main())
