"""What the span-ID index costs and how fast it answers: `python -m tests.benchmarks.index [CAPTURES] [DIRECTORIES]`.

Fills an index with CAPTURES captures of 128 steps (default 100,000) as the exporter does, one transaction at the start
and one at the end of each, but without their directories; then asks for generation and step span IDs, each from a fresh
process, with the file in the page cache and without, and compares with the obvious design, one row per step span in one
B-tree of the same size. DIRECTORIES (default 2,000) real, tiny captures are then written and indexed again from their
files alone.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from tests.exporters.synthetic import Synthetic, write
from tracer.reader import open_capture
from tracer.records import CaptureSpec, LogitsSpec
from tracer.span_index import INDEX, SpanIndex, _create, _open_to_write, _transaction, rebuild
from tracer.span_runs import add_run

STEPS: Final = 128
LOOKUPS: Final = 100
ASK: Final = """
import sys, time
from tracer.span_index import find_span
begin = time.perf_counter()
found = find_span(sys.argv[1], sys.argv[2])
print(time.perf_counter() - begin)
assert len(found) == 1, found
"""


def fill(path: Path, captures: int) -> tuple[list[float], list[str], list[str]]:
    """(CPU seconds per capture, some generation span IDs, some step span IDs)."""
    db = _open_to_write(path, 1.0)
    random_ids = np.random.default_rng(1)
    costs, generations, steps = [], [], []
    picked = set(random.Random(2).sample(range(captures), min(LOOKUPS, captures)))
    for number in range(captures):
        spans = random_ids.integers(1, 2**64 - 1, STEPS, np.uint64)
        span, trace = os.urandom(8), os.urandom(16)
        begin = time.process_time()
        with _transaction(db):
            insert = "INSERT INTO capture (span, trace, start_ns) VALUES (?, ?, ?)"
            key = db.execute(insert, (span, trace, number)).lastrowid
            assert key is not None
        with _transaction(db):
            db.execute("UPDATE capture SET bytes = ?, steps = ? WHERE id = ?", (8_000_000, STEPS, key))
            add_run(db, key, spans.tobytes())
        costs.append(time.process_time() - begin)
        if number in picked:
            generations.append(span.hex())
            steps.append(f"{int(spans[number % STEPS]):016x}")
    db.close()
    return costs, generations, steps


def fill_tree(path: Path, captures: int) -> list[float]:
    """CPU seconds per capture at the end, of one row per step span: sorted first to be quick, then 300 as they come."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = OFF")
    _create(db)
    db.execute("CREATE TABLE step (span INTEGER PRIMARY KEY, capture INTEGER)")
    random_ids = np.random.default_rng(1)
    with _transaction(db):
        for low in range(0, 1 << 16, 1 << 10):  # A piece of the number line at a time: sorted, in little memory.
            piece = random_ids.integers(low << 47, (low + (1 << 10)) << 47, captures * STEPS >> 6, np.uint64)
            rows = ((int(span) - 2**62, 1) for span in np.sort(piece))
            db.executemany("INSERT OR IGNORE INTO step VALUES (?, ?)", rows)
    costs = []
    for _ in range(300):
        spans = (random_ids.integers(0, 2**63, STEPS, np.uint64) >> np.uint64(0)).tolist()
        begin = time.process_time()
        with _transaction(db):
            db.executemany("INSERT OR IGNORE INTO step VALUES (?, ?)", [(span - 2**62, 1) for span in spans])
        costs.append(time.process_time() - begin)
    db.close()
    return costs


def ask(root: Path, spans: Sequence[str], prepare: Callable[[], None]) -> str:
    """Median and 99th percentile of `find_span` in milliseconds, each in a fresh process, imports not counted."""
    seconds = []
    for span in spans:
        prepare()
        run = subprocess.run([sys.executable, "-c", ASK, root, span], check=True, capture_output=True, text=True)
        seconds.append(float(run.stdout))
    last = statistics.quantiles(seconds, n=100)[98]
    return f"median {1e3 * statistics.median(seconds):.2f} ms, p99 {1e3 * last:.2f} ms of {len(seconds)}"


def forget(path: Path) -> None:
    """Put the file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def show_costs(name: str, costs: Sequence[float]) -> None:
    """One line about CPU per capture."""
    ordered = sorted(costs)
    text = f"mean {1e3 * statistics.mean(costs):.3f}, median {1e3 * ordered[len(ordered) // 2]:.3f}"
    sys.stdout.write(f"{name}: {text}, worst {1e3 * ordered[-1]:.1f} ms of CPU per capture\n")
    sys.stdout.flush()


def directories(root: Path, count: int) -> None:
    """Write real captures; index them from their files, then as the exporter does; open some."""
    spec = CaptureSpec(LogitsSpec(top=1))
    made = [
        Synthetic(STEPS, 2, 4, 1, 1, spec, trace_id=f"{number // 2:032x}", span_id=f"{number:016x}")
        for number in range(count)
    ]
    for number, generation in enumerate(made):
        write(root, generation)
        spans = generation.path(root) / "span_id" / "c.0"
        spans.write_bytes(np.arange(number << 32 | 1, (number << 32) + STEPS + 1, dtype="<u8").tobytes())
    begin = time.perf_counter()
    counts = rebuild(root)
    seconds = time.perf_counter() - begin
    sys.stdout.write(f"made anew from {count} captures: {seconds:.2f} s, {json.dumps(counts._asdict())}\n")
    (root / INDEX).unlink()
    index, costs = SpanIndex(root), []
    for generation in made:
        start = time.process_time()
        index.begin(generation.trace_id, generation.span_id, 1)
        index.close(generation.trace_id, generation.span_id)
        costs.append(time.process_time() - start)
    index.stop()
    show_costs("the exporter's two calls", costs)
    open_capture(root, made[0].span_id)  # Imports and caches are not what is measured.
    opening = []
    for number in range(0, count, max(count // LOOKUPS, 1)):
        start = time.perf_counter()
        open_capture(root, f"{number << 32 | 7:016x}")
        opening.append(time.perf_counter() - start)
    sys.stdout.write(f"open_capture by step span: median {1e3 * statistics.median(opening):.2f} ms\n")


def main() -> None:
    """Print the lines that docs/store-format.md quotes."""
    captures = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        path = root / INDEX
        costs, generations, steps = fill(path, captures)
        show_costs(f"{captures} captures of {STEPS} steps", costs)
        show_costs("the last 1000 of them", costs[-1000:])
        sys.stdout.write(f"file: {path.stat().st_size / 1e6:.0f} MB\n")
        for name, spans in (("generation", generations), ("step", steps)):
            path.read_bytes()
            sys.stdout.write(f"find a {name}, warm: {ask(root, spans, lambda: None)}\n")
            sys.stdout.write(f"find a {name}, not in memory: {ask(root, spans, lambda: forget(path))}\n")
        tree = root / "tree.sqlite"
        show_costs("a B-tree with a row per step span", fill_tree(tree, captures))
        sys.stdout.write(f"its file: {tree.stat().st_size / 1e6:.0f} MB\n")
        directories(root / "store", int(sys.argv[2]) if len(sys.argv) > 2 else 2_000)


if __name__ == "__main__":
    main()
