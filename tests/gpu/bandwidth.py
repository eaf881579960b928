"""Time of the attention kernels against the device's copy bandwidth: `python -m tests.gpu.bandwidth [--cpu] [--quick]`.

A captured decode row reads every key of its context once and writes one weight per head and key: the least time is
that of moving these bytes, measured by copying a large tensor on the same device. Layers of Llama-3-8B's shape (32
heads, 8 KV heads, head size 128, bfloat16), 8 captured rows, several layers a step; median of several steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final

import torch

from tests.worker.cases import holding, make_layer, traced
from tracer.records import AttentionSpec, CaptureSpec
from tracer.worker.attention import LayerMath
from tracer.worker.batch import Row
from tracer.worker.layers import Layer
from tracer.worker.maths import Maths, choose
from tracer.worker.work import Work

__all__ = ["main"]

HEADS: Final = 32
GROUPS: Final = 8
SIZE: Final = 128
BLOCK: Final = 16
ROWS: Final = 8
LAYERS: Final = 8
ROUNDS: Final = 11


def seconds(device: torch.device, action: Callable[[], None]) -> float:
    """Median time of `action` on the device, after two runs to warm up."""
    times = []
    for _ in range(ROUNDS + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            action()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        else:
            started = time.perf_counter()
            action()
            times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second of a copy on the device: what is read plus what is written."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(device, lambda: _discard(target.copy_(source)))


def _discard(_: Any) -> None:
    """For actions whose value nobody needs."""


def make_layers(device: torch.device, keys: int) -> tuple[list[Layer], torch.Tensor]:
    """Layers over one random cache with room for all rows, and its block table [rows, blocks]."""
    per_row = -(-keys // BLOCK)
    shape = (per_row * ROWS, GROUPS, BLOCK, 2 * SIZE)
    cache = torch.randn(shape, dtype=torch.float32).to(torch.bfloat16).to(device)
    math = LayerMath(scale=SIZE**-0.5)
    made = [make_layer(index, "rows", BLOCK, SIZE, GROUPS, math, cache) for index in range(LAYERS)]
    layers = []
    for layer in made:
        assert layer.keys is not None
        info = replace(layer.info, num_heads=HEADS)
        layers.append(replace(layer, info=info, keys=replace(layer.keys, offsets=layer.keys.offsets.to(device))))
    table = torch.randperm(per_row * ROWS).view(ROWS, per_row).to(torch.int32).to(device)
    return layers, table


def one_step(maths: Maths, layers: list[Layer], table: torch.Tensor, query: torch.Tensor, keys: int) -> None:
    """The captured rows of one decode step in all layers, and the copy that takes them to the host."""
    spec = CaptureSpec(attention=AttentionSpec())
    request = traced(spec, list(range(HEADS)), tuple(range(LAYERS)))
    works = [Work(Row(str(row), row, row, 1, keys - 1, keys, samples=True), request) for row in range(ROWS)]
    step, metadata = holding(works), SimpleNamespace(block_table=table, causal=True)
    for layer in layers:
        maths.attention(step, layer, works, query, layer.module.kv_cache, metadata)
    maths.copy(step)
    maths.finish(step)
    maths.release(step)


def row(device: torch.device, keys: int, copied: float) -> str:
    """One line of the table."""
    layers, table = make_layers(device, keys)
    query = torch.randn(ROWS, HEADS, SIZE).to(torch.bfloat16).to(device)
    maths = choose(layers, device, 5)
    took = seconds(device, lambda: one_step(maths, layers, table, query, keys)) / LAYERS
    moved = ROWS * keys * (GROUPS * SIZE * 2 + HEADS * 2)
    return (
        f"| {maths.name} | {keys:,} | {1e6 * took:.0f} | {1e6 * moved / copied:.0f} | {moved / took / 1e9:.1f} "
        f"| {moved / took / copied:.2f} |\n"
    )


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bandwidth", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="on the CPU, where the C kernels are")
    parser.add_argument("--quick", action="store_true", help="one short context")
    return parser.parse_args(words)


def main() -> int:
    """Measure and print a table."""
    chosen = arguments(sys.argv[1:])
    device = torch.device("cpu" if chosen.cpu else "cuda")
    with torch.inference_mode():
        copied = copy_bandwidth(device, 1 << (26 if chosen.cpu else 30))
        sys.stdout.write(
            f"Copies on {device} move {copied / 1e9:.1f} GB/s, read and written; {ROWS} captured rows:\n\n"
        )
        sys.stdout.write("| kernels | keys | µs a layer | µs of a copy | GB/s | share of copy |\n" + "|---" * 6 + "|\n")
        for keys in (512,) if chosen.quick else (512, 4096, 16384):
            sys.stdout.write(row(device, keys, copied))
    return 0


if __name__ == "__main__":
    sys.exit(main())
