"""`prove.sh` as far as it goes without a GPU: its commands are ones that exist, and its judge tells good from bad."""

from __future__ import annotations

import importlib
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from tests.gpu import graphs
from tests.gpu.graphs import CAPTURED_TOKENS, TOKENS, Counted, judge

ROOT: Final = Path(__file__).resolve().parents[2]
SCRIPT: Final = ROOT / "tests" / "gpu" / "prove.sh"
PARTS: Final = ["machine", "units", "kernels", "families", "engine", "graphs", "bandwidth", "bench"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, check=False)


def commands(*words: str) -> dict[str, list[str]]:
    done = run("--dry-run", *words)
    assert done.returncode == 0, done.stderr
    lines = [line.partition(":") for line in done.stdout.splitlines()]
    return {name: shlex.split(command) for name, _, command in lines}


@pytest.mark.parametrize("words", [(), ("--cpu",), ("--quick",), ("--cpu", "--quick", "--out", "/tmp/a b")])
def test_every_command_names_files_and_options_that_exist(words: tuple[str, ...]) -> None:
    found = commands(*words)
    assert list(found) == PARTS
    for command in found.values():
        files = [word for word in command if word.endswith(".py")]
        assert all((ROOT / word).is_file() for word in files), command
        if "-m" in command:
            module, *options = command[command.index("-m") + 1 :]
            if module != "pytest":
                importlib.import_module(module).arguments(options)


def test_parts_can_be_chosen_and_what_is_not_known_is_refused() -> None:
    assert list(commands("--parts", "graphs,bench")) == ["graphs", "bench"]
    assert commands("--parts", "bench")["bench"][-4:-2] == ["--serve", "--gpu-memory-utilization 0.2"]
    assert run("--help").stdout.startswith("usage: ")
    assert run("--fast").returncode == 2


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("bash", "env", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("--out", str(tmp_path / "proof"))
    assert (done.returncode, "no nvidia-smi" in done.stderr) == (1, True)
    assert not (tmp_path / "proof").exists()


DECODES: Final = TOKENS - 1
PLAIN: Final = {name: Counted({"FULL": DECODES, "PIECEWISE": 2}) for name in ("even", "one")}
MOVED: Final = CAPTURED_TOKENS - 1
TRACED: Final = {
    "even": PLAIN["even"],
    "logits": PLAIN["even"],
    "one": Counted(
        {"FULL": DECODES - MOVED, "PIECEWISE": 2 + MOVED}, ["PIECEWISE"] * MOVED, ["FULL"] * (DECODES - MOVED)
    ),
}


def test_good_counts_are_found_good() -> None:
    assert [holds for holds, _ in judge(PLAIN, TRACED)] == [True] * 6


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda t: t | {"even": Counted({"PIECEWISE": DECODES + 2})}, 1),
        (lambda t: t | {"logits": Counted({"NONE": DECODES, "PIECEWISE": 2})}, 2),
        (lambda t: t | {"one": replace(t["one"], modes=PLAIN["one"].modes)}, 3),
        (lambda t: t | {"one": replace(t["one"], captured=["PIECEWISE", "FULL"])}, 4),
        (lambda t: t | {"one": replace(t["one"], captured=[])}, 4),
        (lambda t: t | {"one": replace(t["one"], after=["FULL", "PIECEWISE"])}, 5),
    ],
)
def test_bad_counts_are_found_bad(change: Callable[[dict[str, Counted]], dict[str, Counted]], wrong: int) -> None:
    claims = [holds for holds, _ in judge(PLAIN, change(TRACED))]
    assert claims == [index != wrong for index in range(6)]


def test_an_engine_without_graphs_proves_nothing() -> None:
    eager = {name: Counted({"NONE": DECODES + 2}, ["NONE"], ["NONE"]) for name in ("even", "logits", "one")}
    assert not judge(eager, eager)[0][0]
    assert all(holds for holds, _ in judge(eager, eager, "NONE"))
    assert graphs.SCENARIOS["even"] == ""
