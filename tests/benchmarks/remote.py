"""What a store in a bucket costs: `python -m tests.benchmarks.remote [ROUNDS]`.

Eight captures of about 40 MB (150 steps, logits of 49,152 tokens, attention of 30 layers and 9 heads after 256 prompt
tokens) against SeaweedFS on this machine's loopback, so that the network costs nothing and the server takes its share
of the same cores. Sending is measured alone, from a full spool; writing record by record, into a directory and into a
spool that is being sent meanwhile; reading as open and one step, with the requests that it takes. Medians of rounds.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import obstore
from obstore.store import S3Store

from exporters.remote_store import RemoteStore
from exporters.zarr_writer import ZarrExporter
from tests.exporters.seaweed import Seaweed
from tests.exporters.synthetic import DECODE, Synthetic
from tracer import open_capture
from tracer.config import Settings, spool_directory

CAPTURES: Final = 8
MB: Final = 1e6
CALLS: Final = ("get_async", "get_range_async", "get_ranges_async", "head_async", "list")
METHODS: Final = ("get", "list_with_delimiter")


def write(settings: Settings, generation: Synthetic) -> list[float]:
    """All captures, as the exporter process writes them; the seconds that each record took."""
    out, taken = ZarrExporter(settings), []
    for number in range(CAPTURES):
        for record, payload in replace(generation, span_id=f"{number + 1:016x}").records():
            began = time.perf_counter()
            out.export(record, payload)
            taken.append(time.perf_counter() - began)
    assert out.shutdown(60.0)
    assert (out.lost, out.problem) == ({}, None)
    return taken


def send(settings: Settings) -> tuple[float, float]:
    """(seconds, CPU seconds of this process) from a full spool to an empty one."""
    began, cpu = time.perf_counter(), time.process_time()
    remote = RemoteStore(settings)
    while remote.uploaded < CAPTURES:
        assert remote.problem is None, remote.problem
        time.sleep(0.005)
    taken = time.perf_counter() - began, time.process_time() - cpu
    assert remote.shutdown(5.0)
    return taken


def counted() -> list[str]:
    """The requests of this process from now on."""
    seen: list[str] = []

    def count(place: Any, name: str) -> None:
        original = getattr(place, name)

        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            return original(*arguments, **options)

        setattr(place, name, call)

    for name in CALLS:
        count(obstore, name)
    for name in METHODS:
        count(S3Store, name)
    return seen


def timed(work: Callable[[], Any], requests: list[str]) -> tuple[float, int]:
    """(milliseconds, requests)."""
    requests.clear()
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began), len(requests)


def read(store: str, span_id: str, requests: list[str]) -> dict[str, tuple[float, int]]:
    """What a look at one step takes."""
    capture = open_capture(store, span_id)
    return {
        "open by generation span ID": timed(lambda: open_capture(store, span_id), requests),
        "open by step span ID": timed(lambda: open_capture(store, f"{0xF000000000000000 + 9:016x}"), requests),
        "all tokens and numbers": timed(lambda: capture.tokens, requests),
        "one step's logits": timed(lambda: np.asarray(capture.logits[70]), requests),
        "one step's attention, one layer": timed(lambda: np.asarray(capture.attention[12][70]), requests),
        "one step's attention, one layer, again": timed(lambda: np.asarray(capture.attention[12][71]), requests),
    }


def main(rounds: int) -> None:
    """Print one table for sending and one for reading."""
    generation = Synthetic(steps=150, prompt=256, vocab=49_152, layers=30, heads=9, spec=DECODE)
    sent: list[tuple[float, float]] = []
    written: dict[str, list[float]] = {"directory": [], "bucket": []}
    looks: dict[str, list[tuple[float, int]]] = {}
    requests = counted()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)):
        for number in range(rounds + 1):  # The first round makes the bucket and warms up: it is left out.
            local = Settings(store=f"{folder}/{number}")
            bucket = Settings(store=f"s3://captures/{number}", spool=f"{folder}/spool")
            spooled = Settings(store=str(spool_directory(bucket)))
            for settings in (local, spooled):
                taken = write(settings, generation)
            written["directory"] += taken if number else []
            size = sum(path.stat().st_size for path in Path(local.store).rglob("*") if path.is_file())
            sent.append(send(bucket))
            taken = write(replace(bucket, store=f"{bucket.store}-again"), generation)
            written["bucket"] += taken if number else []
            for place, store in (("directory", local.store), ("bucket", bucket.store)):
                for what, look in read(store, f"{3:016x}", requests).items():
                    looks.setdefault(f"{what:40} {place}", []).append(look)
            shutil.rmtree(local.store)
    seconds, cpu = (statistics.median(column) for column in zip(*sent[1:], strict=True))
    mb = size / MB
    say(f"sending {CAPTURES} captures, {mb:.0f} MB: {seconds:.2f} s, {1000 * cpu / mb:.1f} ms CPU/MB")
    for place, records in written.items():
        low, high = statistics.median(records), statistics.quantiles(records, n=1000)[-1]
        say(f"writing to a {place}: median {1e6 * low:.0f} us a record, 999 of 1000 below {1e3 * high:.1f} ms")
    for name, rows in sorted(looks.items()):
        say(f"{name:52} {statistics.median(ms for ms, _ in rows[1:]):7.1f} ms, {rows[-1][1]} requests")


@contextmanager
def serving(folder: Path) -> Iterator[None]:
    """A server, and its credentials in this process's environment."""
    server = Seaweed(folder / "seaweed")
    server.start()
    os.environ.update(server.environment())
    try:
        yield
    finally:
        server.stop()


def say(line: str) -> None:
    """One line of the result."""
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
