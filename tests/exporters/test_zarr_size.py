"""What the writer holds in memory, and how many files it makes."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.exporters.synthetic import DECODE, FULL, NOTHING, Array, Synthetic, engine, exporter, pack
from tracer.records import CaptureSpec, LogitsSpec


@pytest.mark.slow
def test_two_thousand_captures_leave_nothing_in_memory(tmp_path: Path) -> None:
    out = exporter(tmp_path)
    out.export(engine(), NOTHING)
    generation = Synthetic(steps=2, vocab=500, spec=CaptureSpec(LogitsSpec()))

    def capture(number: int) -> None:
        generation.span_id = f"{number + 1:016x}"
        out.export(generation.start(), NOTHING)
        for step in range(2):
            out.export(*generation.step(step))
        out.export(generation.end(), NOTHING)

    for number in range(100):
        capture(number)
    files = len(list(Path("/proc/self/fd").iterdir()))
    tracemalloc.start()
    for number in range(100, 2000):
        capture(number)
    gc.collect()
    # Python's table of path names grows once and stays; what else is left is ours.
    kept = tracemalloc.take_snapshot().filter_traces(
        [tracemalloc.Filter(inclusive=False, filename_pattern="*pathlib*")]
    )
    tracemalloc.stop()
    assert out.problem is None
    assert sum(trace.size for trace in kept.traces) < 200_000
    assert len(list(Path("/proc/self/fd").iterdir())) <= files


def test_an_open_capture_holds_numbers_and_no_rows(tmp_path: Path) -> None:
    out = exporter(tmp_path)
    generation = Synthetic(steps=1, vocab=50_000, layers=8, heads=4, prompt=200, max_tokens=4000, spec=DECODE)
    out.export(engine(8, 4), NOTHING)
    out.export(generation.start(), NOTHING)
    record, payload = generation.step(0)
    out.export(record, payload)
    sizes = []
    for steps in (range(1, 200), range(200, 1200)):
        tracemalloc.start()
        for step in steps:
            changed = type(record)(**{n: getattr(record, n) for n in record.__slots__} | {"step": step})
            out.export(changed, payload)
        sizes.append(tracemalloc.get_traced_memory())
        tracemalloc.stop()
    (_, _), (held, peak) = sizes
    assert held < 1000 * 1_500, "docs/store-format.md promises 1.5 kB a step"
    assert peak - held < 2_000_000, "a row or two of each array at a time"
    assert out.shutdown(1.0)


def test_a_waiting_prompt_holds_one_block_per_layer(tmp_path: Path) -> None:
    out = exporter(tmp_path)
    generation = Synthetic(steps=0, prompt=600, layers=6, heads=2, spec=FULL)
    out.export(engine(6, 2), NOTHING)
    out.export(generation.start(), NOTHING)
    tracemalloc.start()
    for first in range(0, 600, 40):
        for layer in range(6):
            out.export(*generation.block(layer, first, first + 40))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    block = 2 * 64 * 768 * 2
    assert held < 6 * block + 8 * block + 200_000, "a block of 64 rows of each layer, one buffer, the indices"


def test_a_thousand_steps_of_thirty_layers_are_tens_of_files(tmp_path: Path) -> None:
    out = exporter(tmp_path)
    generation = Synthetic(steps=0, prompt=256, vocab=49_152, layers=30, heads=9, max_tokens=1000, spec=DECODE)
    out.export(engine(30, 9, max_model_len=8192), NOTHING)
    out.export(generation.start(), NOTHING)
    zeros = np.zeros(49_152, np.float16)
    for step in range(1000):
        generation.steps = step + 1
        arrays: dict[str, Array] = {
            "logits": zeros,
            "attention": np.zeros((30, 9, 256 + step), np.float16),
            "attention_summary": np.zeros((30, 9, 4), np.float32),
        }
        slices, payload = pack(arrays)
        record, _ = Synthetic(steps=1, vocab=1, layers=1, heads=1, spec=CaptureSpec()).step(0)
        changed = {n: getattr(record, n) for n in record.__slots__} | {"step": step, "arrays": slices}
        out.export(type(record)(**changed), payload)
    out.export(generation.end(), NOTHING)
    path = generation.path(tmp_path)
    shards = {name: len(list((path / name).glob("c.*"))) for name in ("logits", "attention", "attention_summary")}
    assert shards == {"logits": 16, "attention": 16, "attention_summary": 16}
    assert sum(entry.is_file() for entry in path.rglob("*")) < 100
