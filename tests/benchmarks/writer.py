"""What the Zarr writer costs: `python -m tests.benchmarks.writer [ROUNDS]`.

CPU (user and system) of `ZarrExporter` per MB of arrays, against `os.write` of the same arrays to one file per request:
8 requests of 256 prompt tokens and 128 steps, in turn, one step of each: a logits row of 49,152 float16, an attention
row of 30 layers and 9 heads, its summary. The values are shaped like real ones: logits that bfloat16 holds, attention
from a softmax with a sink. Everything from the first record to the closed capture counts, the journal included; each
row of the table is a ratio to the appends of its own round, on memory (/dev/shm) and on the disk of the working
directory; `steps` leaves out the first and the last record of a capture. The order within a round changes, and a first
round only warms up. Between runs files are emptied, so that all use the same memory, but not removed: ext4 walks past
every inode that was freed less than a minute ago, and making a file after removing many is 20 times dearer.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporters.zarr_writer import ZarrExporter
from tests.exporters.synthetic import DECODE, NOTHING, TRACE, engine, pack
from tracer.config import Settings
from tracer.records import GenerationEnd, GenerationStart, LogitsSummary, Record, StepRecord

REQUESTS: Final = 8
PROMPT: Final = 256
STEPS: Final = 128
LAYERS: Final = 30
HEADS: Final = 9
VOCAB: Final = 49_152
MB: Final = 1_000_000
PLACES: Final = ("/dev/shm", ".")
CODECS: Final = ("none", "blosc")

Step = tuple[StepRecord, memoryview]
Work = list[tuple[Record, memoryview]]
Run = Callable[[Path, Work], float]
"""Returns the CPU seconds of the steps alone."""


def logits(random: np.random.Generator) -> Any:
    """float16 [vocab] holding bfloat16 values, as a bfloat16 model gives."""
    row = random.normal(-2, 3, VOCAB).astype(np.float32)
    return (row.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32).astype(np.float16)


def attention(random: np.random.Generator, keys: int) -> Any:
    """float16 [layer, head, keys]: a softmax with a sink on position 0 and some weight on what is near."""
    scores = random.normal(0, 1.5, (LAYERS, HEADS, keys)) + np.linspace(-1, 1, keys)
    scores[..., 0] += 7
    weights = np.exp(scores)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float16)


def steps() -> list[Step]:
    """One request's steps; all requests send the same values under other IDs."""
    random, out = np.random.default_rng(0), []
    for step in range(STEPS):
        keys = PROMPT + step
        arrays = {
            "logits": logits(random),
            "attention": attention(random, keys),
            "attention_summary": random.random((LAYERS, HEADS, 4), np.float32),
        }
        slices, payload = pack(arrays)
        record = StepRecord(
            TRACE, "", f"{step + 1:016x}", step, "decode", 1, keys - 1, 1, keys, 10 + step, 11 + step, token_id=step,
            logits=LogitsSummary(2.5, 1.5, 0.5, -0.25, 0), capture=True, arrays=slices,
        )  # fmt: skip
        out.append((record, payload))
    return out


def append(root: Path, work: Work) -> float:
    """The floor: the same arrays at the end of one file per request."""
    files: dict[str, int] = {}
    begin = time.process_time()
    for record, payload in work:
        if isinstance(record, GenerationStart):
            files[record.span_id] = os.open(root / record.span_id, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        elif isinstance(record, StepRecord):
            edges = [*(item.offset for item in record.arrays), payload.nbytes]
            for low, high in pairwise(edges):
                os.write(files[record.span_id], payload[low:high])
    for file in files.values():
        os.close(file)
    return time.process_time() - begin


def records() -> list[tuple[Record, memoryview]]:
    """What the exporter process hands over for all requests, made beforehand: decoding is not the writer's."""
    spans = [f"{number + 1:016x}" for number in range(REQUESTS)]
    out: list[tuple[Record, memoryview]] = [(engine(LAYERS, HEADS, max_model_len=8192), NOTHING)]
    for span in spans:
        start = GenerationStart(
            TRACE, span, None, True, 1, "r", "m", "chat", prompt_tokens=PROMPT, max_tokens=STEPS, capture=DECODE,
            prompt_token_ids=tuple(range(PROMPT)), prompt_token_bytes=(b" token",) * PROMPT,
        )  # fmt: skip
        out.append((start, NOTHING))
    out += [(replace(record, span_id=span), payload) for record, payload in steps() for span in spans]
    ids, texts = tuple(range(STEPS)), (b" token",) * STEPS
    for span in spans:
        end = GenerationEnd(TRACE, span, 9, "ok", "stop", STEPS, output_token_ids=ids, output_token_bytes=texts)
        out.append((end, NOTHING))
    return out


def export(codec: str) -> Run:
    """The writer with that codec, from the first start to the last end."""

    def run(root: Path, work: Work) -> float:
        out = ZarrExporter(Settings(store=str(root / "store"), codec=codec))
        marks = []
        for part in (work[: REQUESTS + 1], work[REQUESTS + 1 : -REQUESTS], work[-REQUESTS:]):
            for record, payload in part:
                out.export(record, payload)
            marks.append(time.process_time())
        assert out.problem is None, out.problem
        return marks[1] - marks[0]

    return run


def cpu(run: Run, root: Path, work: Work) -> tuple[float, float]:
    """CPU seconds of one run in a fresh directory: all of it, and the steps alone."""
    place = Path(tempfile.mkdtemp(dir=root))
    before = time.process_time()
    steps_alone = run(place, work)
    seconds = time.process_time() - before
    for path in place.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    return seconds, steps_alone


def measure(root: Path, work: Work, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """CPU seconds of each kind and round."""
    runs = {"append": append} | {codec: export(codec) for codec in CODECS}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            seconds[name].append(cpu(runs[name], root, work))
    return {name: values[1:] for name, values in seconds.items()}


def line(name: str, values: list[float], unit: str) -> str:
    """Median and range."""
    return f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) {unit} |\n"


def main() -> None:
    """Print a table: CPU per MB of plain appends, and the writer's ratio to it for each codec."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    work = records()
    size = sum(payload.nbytes for _, payload in work) / MB
    sys.stdout.write(f"{size:.0f} MB a run, {rounds} rounds; median (range)\n\n| | CPU |\n|---|---|\n")
    for place in PLACES:
        root = Path(tempfile.mkdtemp(prefix="writer-", dir=place))
        try:
            seconds = measure(root, work, rounds)
        finally:
            shutil.rmtree(root)
        sys.stdout.write(line(f"{place}: plain appends", [1000 * s / size for s, _ in seconds["append"]], "ms/MB"))
        for codec in CODECS:
            pairs = list(zip(seconds[codec], seconds["append"], strict=True))
            whole, alone = [a / base for (a, _), (base, _) in pairs], [b / base for (_, b), (base, _) in pairs]
            fixed = [1000 * (a - b) / REQUESTS for a, b in seconds[codec]]
            sys.stdout.write(line(f"{place}: {codec}", whole, "times"))
            sys.stdout.write(line(f"{place}: {codec}, steps", alone, "times"))
            sys.stdout.write(line(f"{place}: {codec}, to begin and close a capture", fixed, "ms"))


if __name__ == "__main__":
    main()
