"""The C kernels: built for this machine at a worker's start, loaded with ctypes.

Built here and not shipped as a binary, because they gain most from the instructions of the very CPU they run on, and
because a machine that runs vLLM's compiled mode has a C compiler anyway. Without one the torch versions do the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from tracer import config

__all__ = ["LayerStruct", "NativeError", "load"]

SOURCE: Final = Path(__file__).with_name("kernels.c")
FLAGS: Final = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-w")
CANDIDATES: Final = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())
"""Tried in this order: `-march=native` is x86's, `-mcpu=native` ARM's; clang may lack OpenMP's library."""
BUILD_SECONDS: Final = 60.0


class NativeError(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why."""


class LayerStruct(ctypes.Structure):
    """`Layer` of kernels.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dtype", "heads", "kv_heads", "head_size", "block_size")),
        *((name, ctypes.c_int64) for name in ("block_stride", "head_stride", "first", "per_token", "per_dim")),
        *((name, ctypes.c_void_p) for name in ("offsets", "slopes", "sinks")),
        *((name, ctypes.c_int64) for name in ("window", "query_dtype")),
        *((name, ctypes.c_float) for name in ("scale", "soft_cap", "key_scale")),
    )


_PTR: Final = ctypes.c_void_p
_INT: Final = ctypes.c_int64
SIGNATURES: Final[dict[str, tuple[Sequence[Any], Any]]] = {
    "scratch_floats": ((_INT, _INT, _INT), _INT),
    "prompt_floats": ((_INT, _INT, _INT), _INT),
    "threads": ((), _INT),
    "team": ((_INT,), _INT),
    "attend": ((_PTR, _PTR, _INT, _PTR, _PTR, _PTR, _PTR, _INT, _INT, _PTR, _PTR, _INT, _PTR, _INT, _INT), None),
    "attend_prompt": ((_PTR, _PTR, _INT, _INT, _PTR, _PTR, _INT, _INT, _PTR, _PTR, _PTR, _INT, _INT), None),
    "collect": ((_PTR, _PTR, _INT, _PTR, _PTR, _PTR, _INT, _INT, _PTR, _PTR, _INT), None),
    "summarise": ((_PTR, _PTR, _INT, _PTR), None),
    "logits": ((_PTR, _INT, _INT, _INT, _INT, _INT, _PTR, _PTR, _PTR, _PTR, _PTR), None),
    "ranks": ((_PTR, _INT, _INT, _INT, _INT, _PTR, _PTR, _PTR), None),
}


@cache
def load() -> ctypes.PyDLL:
    """The library of this machine, built if its cache has none; raises NativeError.

    A PyDLL keeps the GIL: a call takes tens of microseconds, and getting the GIL back next to a busy Python thread
    may take the interpreter's switch interval of 5 ms.
    """
    path = _built()
    try:
        library = ctypes.PyDLL(str(path))
    except OSError as error:
        raise NativeError(f"{path} cannot be loaded: {error}; remove it to have it built again") from error
    for name, (arguments, result) in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = list(arguments), result
    return library


def _built() -> Path:
    compiler = _compiler()
    folder = config.cache_directory() / "kernels"
    path = folder / f"{_fingerprint(compiler)}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(folder)
        if not path.exists():
            _build(compiler, path)
        _require_private(path)
    except OSError as error:
        raise NativeError(f"the C kernels cannot be built in {folder}: {error}") from error
    return path


def _require_private(path: Path) -> None:
    """What lies there is run: nobody else may write it."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeError(f"{path} is not this user's alone; remove it, or set XDG_CACHE_HOME to a private directory")


def _compiler() -> list[str]:
    """The C compiler's command; raises NativeError if there is none."""
    for command in (config.c_compiler(), "cc", "gcc", "clang"):
        parts = shlex.split(command or "")
        if parts and shutil.which(parts[0]):
            return parts
    raise NativeError("there is no C compiler (cc, gcc, clang or $CC); install one, e.g. apt install gcc")


def _fingerprint(compiler: Sequence[str]) -> str:
    """What the binary depends on: source, flags, compiler, and the CPU's instructions."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False, timeout=BUILD_SECONDS).stdout
    cpu = next((line for line in _cpu_lines() if line.startswith(("flags", "Features"))), "")
    text = "\0".join((shlex.join(compiler), *FLAGS, cpu)).encode()
    return hashlib.sha256(SOURCE.read_bytes() + version + text).hexdigest()[:24]


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _build(compiler: Sequence[str], path: Path) -> None:
    """Compile beside `path` and rename: workers that start at once do not see each other's halves."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    made = Path(name)
    try:
        for extra in CANDIDATES:
            command = [*compiler, *FLAGS, *extra, "-o", name, str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS)
            if done.returncode == 0:
                made.chmod(0o700)
                made.replace(path)
                return
        raise NativeError(f"`{shlex.join(command)}` failed: {done.stderr.strip()[-400:]}")
    except subprocess.TimeoutExpired as error:
        raise NativeError(f"{compiler[0]} did not finish within {BUILD_SECONDS:.0f} s") from error
    finally:
        made.unlink(missing_ok=True)
