"""Pairs and rounds: each variant between two batches of plain vLLM, and what its captures took.

plain, variant, plain, variant, ..., plain: a ratio is a variant over the mean of its two neighbours, so that a machine
that slows down or speeds up meanwhile does so to both. Every other round runs the variants backwards.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import zarr

from tests.benchmarks.load import Batch, Load, percentile, run_batch
from tests.benchmarks.servers import Engine
from tracer import open_capture

__all__ = ["Captured", "Fleet", "Sample", "Variant", "await_closed", "measure_round", "raw_bytes"]

STORE_SECONDS: Final = 180.0
"""How long captures may take to be closed after the last token."""
POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table."""

    name: str
    engine: str
    capture: str = ""
    """Text of the Trace-Capture header."""
    capturing: tuple[int, ...] | None = None
    """Streams that carry the header; None for all."""
    measured: tuple[int, ...] | None = None
    """Streams whose speed counts; None for all."""
    headers: tuple[tuple[str, str], ...] = ()

    def headers_of(self, stream: int) -> Mapping[str, str]:
        """What this stream's request carries."""
        asks = self.capture and (self.capturing is None or stream in self.capturing)
        return dict(self.headers) | ({"Trace-Capture": self.capture} if asks else {})

    def view(self, batch: Batch) -> Batch:
        """The streams that count."""
        return batch if self.measured is None else batch.only(self.measured)


@dataclass(frozen=True, slots=True)
class Captured:
    """What one batch left in the store."""

    captures: int
    steps: int
    raw_mb: float
    """Of stored values before compression, padding left out."""
    disk_mb: float
    files: int
    drain_seconds: float
    """From the last token to the last capture closed."""
    writer_seconds: float
    """CPU of the exporter process, spans included."""
    faults: tuple[str, ...]
    """Why a capture is not complete. A ratio with faults is no result."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One variant in one round, over plain vLLM in the same round."""

    throughput: float
    p99: float
    """Of the time between tokens."""
    stored: float | None
    """Throughput if the time until all captures were closed counts too; None where nothing was captured."""
    tokens_per_second: float
    captured: Captured | None


class Fleet:
    """The servers, the next seed, and one way to run a batch on any of them."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines
        self._seeds: Iterator[int] = itertools.count(1)
        self.last_refs: list[str] = []
        """Captures of the newest captured batch, which stay in the store until the next one."""

    def plain(self, load: Load, seed: int | None = None) -> Batch:
        """A batch on plain vLLM."""
        with self.engines["plain"].awake():
            return run_batch(self.engines["plain"].url, load, self.seed(seed))

    def run(self, variant: Variant, load: Load, seed: int | None = None) -> tuple[Batch, Captured | None]:
        """A batch on the variant's server, up to the moment when its exporter has nothing left to do."""
        engine = self.engines[variant.engine]
        self.forget()
        with engine.awake():
            before = engine.writer_cpu()
            batch = run_batch(engine.url, load, self.seed(seed), variant.headers_of)
            await_closed(engine.store, batch.refs)
            drain = time.perf_counter() - max(stream.arrivals[-1] for stream in batch.streams)
            used = engine.settle() - before
        if not batch.refs:
            return batch, None
        self.last_refs = batch.refs
        return batch, _inspect(engine.store, batch.refs, drain, used)

    def seed(self, given: int | None = None) -> int:
        """`given`, or one that no batch has had."""
        return next(self._seeds) if given is None else given

    def forget(self) -> None:
        """Remove what the newest captured batch has left on disk."""
        for ref in self.last_refs:
            shutil.rmtree(self.engines["traced"].store / ref.split("/")[0], ignore_errors=True)
        self.last_refs = []


def measure_round(
    fleet: Fleet, variants: Sequence[Variant], load: Load, say: Callable[[str], None]
) -> tuple[list[tuple[Variant, Sample]], list[float]]:
    """One round: a sample of each variant, and the tokens per second of the plain batches around them."""
    out = []
    before = fleet.plain(load)
    speeds = [before.throughput]
    for variant in variants:
        batch, captured = fleet.run(variant, load)
        after = fleet.plain(load)
        sample = compare(variant, batch, captured, (before, after))
        speeds.append(after.throughput)
        say(f"  {variant.name}: {sample.tokens_per_second:.0f} tokens/s, {sample.throughput:.3f} of plain")
        out.append((variant, sample))
        before = after
    return out, speeds


def compare(variant: Variant, batch: Batch, captured: Captured | None, plain: Sequence[Batch]) -> Sample:
    """The variant's batch over the mean of its neighbours, for the streams that count."""
    seen, base = variant.view(batch), [variant.view(other) for other in plain]
    speed = float(np.mean([other.throughput for other in base]))
    gap = percentile([gap for other in base for gap in other.gaps], 0.99)
    stored = seen.tokens / (batch.seconds + captured.drain_seconds) / speed if captured is not None else None
    return Sample(
        throughput=seen.throughput / speed,
        p99=percentile(seen.gaps, 0.99) / gap,
        stored=stored,
        tokens_per_second=seen.throughput,
        captured=captured,
    )


def await_closed(store: Path, refs: Sequence[str]) -> None:
    """Wait until every one of these captures is closed, but no longer than STORE_SECONDS."""
    end = time.perf_counter() + STORE_SECONDS
    waiting = [store / ref / "zarr.json" for ref in refs]
    while waiting and time.perf_counter() < end:
        time.sleep(POLL_SECONDS)
        waiting = [path for path in waiting if not _closed(path)]


def _closed(path: Path) -> bool:
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["attributes"]["closed"])


def _inspect(store: Path, refs: Sequence[str], drain: float, writer: float) -> Captured:
    steps, raw, faults = 0, 0, []
    for ref in refs:
        capture = open_capture(store, ref)
        steps += capture.num_steps
        raw += raw_bytes(store / ref)
        if not capture.complete:
            faults.append(
                f"{ref}: {'; '.join(' '.join(entry.values()) for entry in capture.missing[:2]) or 'not complete'}"
            )
    paths = [path for ref in refs for path in (store / ref).rglob("*") if path.is_file()]
    disk = sum(path.stat().st_size for path in paths)
    return Captured(len(refs), steps, raw / 1e6, disk / 1e6, len(paths), drain, writer, tuple(faults))


def raw_bytes(path: Path) -> int:
    """Bytes of the big arrays of a capture before compression, without the padding behind `kv_len` keys."""
    group = zarr.open_group(path, mode="r")
    total = 0
    for name, array in group.arrays():
        if name == "attention":
            row = int(np.prod(array.shape[1:3])) * array.dtype.itemsize
            total += int(np.sum(np.asarray(group["kv_len"]))) * row
        elif array.ndim > 1:
            total += array.nbytes
    return total
