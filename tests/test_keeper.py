"""The keeper, as a process: pytest's own has threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path


def keep(serve: str, path: Path) -> subprocess.Popen[str]:
    """A process that keeps `serve`, the body of a function of `path`."""
    program = f"""
import logging, os, signal, sys, time
from pathlib import Path
from tracer.keeper import keep
logging.basicConfig(format="%(message)s")
path = Path({str(path)!r})
def serve():
{textwrap.indent(textwrap.dedent(serve), "    ")}
keep(serve)
"""
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_another_child_follows_until_one_ends_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "lives"
    serve = """
        with path.open("a") as file:
            lives = file.tell() // 2
            file.write("x\\n")
        if lives == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if lives == 1:
            raise ValueError("bad luck")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    """
    process = keep(serve, path)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert path.read_text() == "x\n" * 3
    assert "the exporter process was killed by SIGKILL; another one goes on" in said
    assert "ValueError: bad luck" in said
    assert "the exporter process ended with exit code 1; another one goes on" in said


def test_a_signal_is_passed_on_and_is_the_end_of_both(tmp_path: Path) -> None:
    path = tmp_path / "lives"
    os.mkfifo(path)
    process = keep("path.write_text(str(os.getpid())); signal.pause()", path)
    child = int(path.read_text())  # Waits for the child.
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert not Path(f"/proc/{child}").exists()
