"""Does memory grow over 2,000 captured requests? `python -m tests.benchmarks.soak [REQUESTS] [--publish]`.

A tiny random model, so that the requests are many and short; every one stores its logits and attention. Memory of the
API process, the worker and the exporter is read at 20 moments when the exporter has nothing to do; the slope is that of
the second half, beside the slope of plain vLLM under the same requests. `--publish` puts the table into the docs.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from deploy.model import demo_model
from tests.benchmarks.load import Load, run_batch
from tests.benchmarks.machine import ROOT, conditions
from tests.benchmarks.measure import await_closed
from tests.benchmarks.report import publish
from tests.benchmarks.servers import Engine, open_files
from tests.integration.models import VOCAB, make_model
from tracer import find_captures

__all__ = ["Moment", "main", "slope", "soak"]

LOAD: Final = Load(8, 32, 16, (3, VOCAB))
CAPTURE: Final = {"Trace-Capture": "logits, attention"}
MOMENTS: Final = 20
SHAPE: Final = f"{LOAD.streams} streams, {LOAD.prompt} prompt tokens, {LOAD.output} new tokens, logits and attention"
OPTIONS: Final = ("--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", "268435456")


@dataclass(frozen=True, slots=True)
class Moment:
    """What the processes held after so many requests."""

    requests: int
    own: Mapping[str, float]
    """MB of anonymous memory by role."""
    files: Mapping[str, int]
    """Open file descriptors by role."""
    incomplete: int
    """Captures since the last moment that are not complete."""


def model(folder: Path) -> Path:
    """A tiny Llama with random weights and the demo model's tokenizer."""
    path = make_model("llama", folder)
    for file in demo_model().glob("*token*"):
        shutil.copy(file, path)
    return path


def soak(engine: Engine, requests: int) -> list[Moment]:
    """Send the requests, eight at a time; captures are counted and removed at each moment."""
    batches = max(MOMENTS, requests // LOAD.streams)
    looks = {batches * (number + 1) // MOMENTS for number in range(MOMENTS)}
    moments = []
    refs: list[str] = []
    for number in range(1, batches + 1):
        refs += run_batch(engine.url, LOAD, number, lambda _: CAPTURE).refs
        if number in looks:
            await_closed(engine.store, refs)
            engine.settle()
            moments.append(_moment(engine, number * LOAD.streams, refs))
            refs = []
    return moments


def _moment(engine: Engine, requests: int, refs: Sequence[str]) -> Moment:
    whole = {f"{entry.trace_id}/{entry.span_id}" for entry in find_captures(engine.store) if entry.complete}
    for ref in refs:
        shutil.rmtree(engine.store / ref.split("/")[0], ignore_errors=True)
    own = {role: found.anonymous for role, found in engine.resident().items()}
    return Moment(requests, own, open_files(engine), len(set(refs) - whole))


def slope(moments: Sequence[Moment], role: str) -> float:
    """MB per 1,000 requests over the second half of the moments, by least squares."""
    half = moments[len(moments) // 2 :]
    line = np.polyfit([moment.requests / 1000 for moment in half], [moment.own[role] for moment in half], 1)
    return float(line[0])


def table(moments: Sequence[Moment], plain: Sequence[Moment]) -> str:
    """Markdown: the moments, and the slopes."""
    roles = list(moments[-1].own)
    lines = ["| requests | " + " | ".join(f"{role}, MB | {role}, files" for role in roles) + " |"]
    lines.append("|---" * (1 + 2 * len(roles)) + "|")
    for moment in moments[1::2]:
        cells = " | ".join(f"{moment.own[role]:.1f} | {moment.files[role]}" for role in roles)
        lines.append(f"| {moment.requests} | {cells} |")
    lines.append("")
    for role in roles:
        beside = f", plain vLLM {slope(plain, role):+.2f}" if plain and role in plain[-1].own else ""
        lines.append(f"- {role}: {slope(moments, role):+.2f} MB per 1,000 requests in the second half{beside}")
    bad = sum(moment.incomplete for moment in moments)
    lines.append(f"- captures that were not complete: {bad} of {moments[-1].requests}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Traced, then plain, and the table."""
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    requests = numbers[0] if numbers else 2000
    found: dict[str, list[Moment]] = {}
    with tempfile.TemporaryDirectory(prefix="tensorspan-soak-") as name:
        folder = Path(name)
        path = model(folder)
        for start in (Engine.traced, Engine.plain):
            engine = start(path, folder / start.__name__, OPTIONS)
            try:
                found[start.__name__] = soak(engine, requests)
            finally:
                engine.stop()
        command = shlex.join(["python", "-m", "tests.benchmarks.soak", *sys.argv[1:]])
        head = conditions(command, f"tiny random Llama, eager, {SHAPE}", folder.resolve())
    text = "\n".join([*(f"- {line}" for line in head), "", table(found["traced"], found["plain"])])
    sys.stdout.write(text)
    if "--publish" in sys.argv:
        publish(ROOT / "docs" / "benchmarks.md", "soak", text)


if __name__ == "__main__":
    main()
