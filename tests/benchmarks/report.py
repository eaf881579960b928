"""What a run found: ratios with their spread, the tables, and `bench.json`. Nothing here measures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.context import Fit, Point
from tests.benchmarks.load import Load
from tests.benchmarks.measure import Captured, Sample
from tests.benchmarks.servers import Memory

__all__ = ["NAMES", "TARGETS", "Names", "Report", "Row", "Target", "add_samples", "bench_json", "markdown", "publish"]

P99: Final = ": p99 time between tokens"
STORED: Final = ": until stored"


@dataclass(frozen=True, slots=True)
class Names:
    """What the rows are called, in the tables and in `bench.json`."""

    noise: str = "plain vLLM against itself (the noise of one ratio)"
    off: str = "plugin and middleware installed, tracing off"
    untraced: str = "tracing on, request not sampled"
    spans: str = "step spans with logit statistics"
    logits: str = "+ full logits"
    full: str = "+ attention of all layers and heads, decode rows"
    attention: str = "attention without logits"
    summary: str = "attention summaries"
    qk: str = "Q and K of all layers (qk)"
    others: str = "1 full capture among 8: the other 7"
    transformers: str = "full capture over Transformers generate"
    lens: str = "full capture over vllm-lens"
    lens_qk: str = "qk over vllm-lens"


NAMES: Final = Names()


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a median."""

    bound: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        """True if `value` is on the right side."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:.2f}"


TARGETS: Final[Mapping[str, Target]] = {
    NAMES.off: Target(0.99),
    NAMES.off + P99: Target(1.02, at_least=False),
    NAMES.spans: Target(0.98),
    NAMES.logits: Target(0.96),
    NAMES.full: Target(0.90),
    NAMES.others: Target(0.97),
    NAMES.others + P99: Target(1.10, at_least=False),
    NAMES.transformers: Target(2.3),
    NAMES.lens: Target(1.35),
}
"""Bounds at 8 streams, 256 prompt tokens and 128 new tokens."""
TARGET_LOAD: Final = Load(8, 256, 128)


@dataclass(frozen=True, slots=True)
class Row:
    """A ratio in each round."""

    name: str
    load: Load
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def target(self) -> Target | None:
        """The bound on the median, where there is one."""
        return TARGETS.get(self.name) if self.load == TARGET_LOAD else None

    def record(self) -> dict[str, str | int | float]:
        """The row's entry in `bench.json`."""
        return {
            "name": self.name,
            "streams": self.load.streams,
            "prompt": self.load.prompt,
            "output": self.load.output,
            "ratio_median": round(self.median, 4),
            "ratio_min": round(min(self.values), 4),
            "ratio_max": round(max(self.values), 4),
            "n": len(self.values),
        }


@dataclass
class Report:
    """Everything that one run has found so far."""

    conditions: list[str]
    """Date, machine, command, versions: a line each."""
    rows: list[Row] = field(default_factory=list)
    captured: dict[tuple[str, Load], list[Captured]] = field(default_factory=dict)
    memory: dict[str, tuple[Mapping[str, Memory], Mapping[str, Memory]]] = field(default_factory=dict)
    """By server: its processes' memory after the warm-up and after all rounds."""
    points: list[Point] = field(default_factory=list)
    fit: Fit | None = None
    lines: list[str] = field(default_factory=list)
    """Single facts, a line each."""
    problems: list[str] = field(default_factory=list)
    """What could not be measured or must not be believed."""


def add_samples(
    report: Report, load: Load, samples: Iterable[tuple[str, Sample]], plain: Sequence[Sequence[float]] = ()
) -> None:
    """Turn the samples of all rounds of one load into rows; a batch that lost arrays is named as a problem.

    plain: tokens per second of each round's plain batches, in their order.
    """
    by_name: dict[str, list[Sample]] = {}
    for name, sample in samples:
        by_name.setdefault(name, []).append(sample)
    if plain:
        noise = tuple(after / before for speeds in plain for before, after in pairwise(speeds))
        report.rows.append(Row(NAMES.noise, load, noise))
        speed = statistics.median(chain.from_iterable(plain))
        report.lines.append(f"Plain vLLM made {speed:.0f} tokens/s at {_shape(load)}")
    for name, found in by_name.items():
        report.rows.append(Row(name, load, tuple(sample.throughput for sample in found)))
        report.rows.append(Row(name + P99, load, tuple(sample.p99 for sample in found)))
        stored = tuple(sample.stored for sample in found if sample.stored is not None)
        captured = [sample.captured for sample in found if sample.captured is not None]
        if stored:
            report.rows.append(Row(name + STORED, load, stored))
            report.captured[name, load] = captured
        for faults in (entry.faults for entry in captured if entry.faults):
            report.problems.append(
                f"no result: {name} at {_shape(load)}: {len(faults)} captures incomplete ({faults[0]})"
            )


def bench_json(report: Report) -> str:
    """All ratios, as one JSON list."""
    return json.dumps([row.record() for row in report.rows], indent=1) + "\n"


def markdown(report: Report) -> str:
    """The whole report."""
    parts = [*(f"- {line}" for line in report.conditions), ""]
    parts += [f"**{problem}**\n" for problem in report.problems]
    apart = (NAMES.transformers, NAMES.lens, NAMES.lens_qk)
    speed = [row for row in report.rows if not row.name.endswith((P99, STORED)) and row.name not in apart]
    parts += _table("throughput kept", speed, "")
    parts += _table("against others", [row for row in report.rows if row.name in apart], "")
    parts += _table("p99 time between tokens, of plain", [r for r in report.rows if r.name.endswith(P99)], P99)
    parts += _table("throughput until all is stored", [r for r in report.rows if r.name.endswith(STORED)], STORED)
    parts += _captures(report) + _memory(report)
    if report.fit is not None:
        parts += [f"Added to a decode step of 8 requests by attention capture: {report.fit}.", ""]
    parts += [f"- {line}" for line in report.lines]
    return "\n".join(parts).rstrip() + "\n"


def publish(page: Path, name: str, text: str) -> None:
    """Put `text` between the marks called `name` of a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no marks {begin} and {end}")
    page.write_text(f"{head}{begin}\n\n{text}\n{end}{tail}", encoding="utf-8")


def _table(title: str, rows: Sequence[Row], suffix: str) -> list[str]:
    if not rows:
        return []
    cells = [
        (
            row.name.removesuffix(suffix), row.load.streams, row.load.prompt, f"{row.median:.3f}",
            f"{min(row.values):.3f} to {max(row.values):.3f}", len(row.values), _verdict(row),
        )
        for row in rows
    ]  # fmt: skip
    return _grid((title, "streams", "prompt", "median", "range", "n", "goal"), cells)


def _verdict(row: Row) -> str:
    if row.target is None:
        return ""
    return f"{row.target}, {'met' if row.target.met(row.median) else 'missed'}"


def _captures(report: Report) -> list[str]:
    cells = [_capture_cells(name, load, found) for (name, load), found in report.captured.items()]
    head = (
        "captured", "streams", "prompt", "kB a step", "on disk, kB a step", "files a capture",
        "closed after, s", "writer CPU, ms a step", "writer CPU, ms a MB", "complete",
    )  # fmt: skip
    return _grid(head, cells) if cells else []


def _capture_cells(name: str, load: Load, found: Sequence[Captured]) -> tuple[Any, ...]:
    steps, count = sum(entry.steps for entry in found), sum(entry.captures for entry in found)
    raw, disk = sum(entry.raw_mb for entry in found), sum(entry.disk_mb for entry in found)
    cpu = sum(entry.writer_seconds for entry in found)
    bad = sum(len(entry.faults) for entry in found)
    return (
        name, load.streams, load.prompt, f"{1e3 * raw / steps:.0f}", f"{1e3 * disk / steps:.0f}",
        f"{sum(entry.files for entry in found) / count:.0f}",
        f"{statistics.median(entry.drain_seconds for entry in found):.2f}",
        f"{1e3 * cpu / steps:.2f}", f"{1e3 * cpu / raw:.2f}", f"{count - bad} of {count}",
    )  # fmt: skip


def _memory(report: Report) -> list[str]:
    cells = [
        (
            f"{server}: {role}", f"{start[role].anonymous:.0f}", f"{end[role].anonymous:.0f}",
            f"{start[role].shared:.0f}", f"{end[role].shared:.0f}", f"{end[role].peak:.0f}",
        )
        for server, (start, end) in report.memory.items()
        for role in start
        if role in end
    ]  # fmt: skip
    if not cells:
        return []
    head = ("MB resident", "own, warm", "own, at the end", "shared, warm", "shared, at the end", "peak of all")
    return _grid(head, cells) + _worker_growth(report)


def _worker_growth(report: Report) -> list[str]:
    """The goal's words: growth of the worker against plain vLLM's, the queue apart."""
    if not {"plain", "traced"} <= report.memory.keys():
        return []
    more = report.memory["traced"][1]["worker"].anonymous - report.memory["plain"][1]["worker"].anonymous
    peak = report.memory["traced"][1]["worker"].peak - report.memory["plain"][1]["worker"].peak
    verdict = "met" if more <= 64 else "missed"
    words = (
        f"The traced worker holds {more:+.0f} MB of its own over the plain one (goal ≤ 64, {verdict}); at its peak "
        f"{peak:+.0f} MB, the shared queue (at most 256 MB) included."
    )
    return [words, ""]


def _shape(load: Load) -> str:
    return f"{load.streams} stream{'s' * (load.streams != 1)}, {load.prompt} prompt tokens"


def _grid(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]
