"""What prompt logits and hidden states cost beside plain vLLM: `python -m tests.benchmarks.members [ROUNDS]`.

Three servers of SmolLM2-135M-Instruct, bfloat16, compiled: plain, traced without taps, traced with them. As in `bench`
each batch stands between two of plain vLLM.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Final

from deploy.model import demo_model
from tests.benchmarks.load import Load
from tests.benchmarks.measure import Fleet, Sample, Variant, measure_round
from tests.benchmarks.servers import Engine

__all__ = ["main"]

VARIANTS: Final = (
    Variant("step spans", "untapped"),
    Variant("step spans, taps in the graph", "traced"),
    Variant("prompt_logits", "traced", "prompt_logits"),
    Variant("prompt_logits;top=20", "traced", "prompt_logits;top=20"),
    Variant("hidden_states=(0 15 30)", "traced", "hidden_states=(0 15 30)"),
    Variant("hidden_states", "traced", "hidden_states"),
    Variant("hidden_states;rows=all", "traced", "hidden_states;rows=all"),
)
EIGHT: Final = Load(8, 256, 128)
WARM: Final = Load(8, 256, 16)


def main() -> int:
    """Measure and print a table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Stopped servers must not be left behind.
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    samples: dict[str, list[Sample]] = {variant.name: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="tensorspan-bench-") as name, contextlib.ExitStack() as stack:
        model, folder = demo_model(), Path(name)
        engines: dict[str, Engine] = {}
        for kind in ("plain", "untapped", "traced"):
            if kind == "plain":
                engine = Engine.plain(model, folder / kind, ())
            else:
                taps = {"TENSORSPAN_TAPS": "hidden_states"} if kind == "traced" else {}
                engine = Engine.traced(model, folder / kind, (), **taps)
            stack.callback(engine.stop)
            engine.sleep()
            engines[kind] = engine
        fleet = Fleet(engines)
        fleet.plain(WARM)
        for variant in VARIANTS:
            fleet.run(variant, WARM)
        for number in range(rounds):
            order = VARIANTS[::-1] if number % 2 else VARIANTS
            for variant, sample in measure_round(fleet, order, EIGHT, _say)[0]:
                samples[variant.name].append(sample)
    _print(samples)
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _print(samples: dict[str, list[Sample]]) -> None:
    sys.stdout.write("| throughput kept | median | range | n | kB a step | complete |\n|---|---|---|---|---|---|\n")
    for name, found in samples.items():
        kept = [sample.throughput for sample in found]
        stored = [sample.captured for sample in found if sample.captured is not None]
        size = f"{1e3 * sum(c.raw_mb for c in stored) / sum(c.steps for c in stored):.0f}" if stored else ""
        whole = sum(c.captures - len(c.faults) for c in stored)
        count = f"{whole} of {sum(c.captures for c in stored)}" if stored else ""
        middle, low, high = statistics.median(kept), min(kept), max(kept)
        sys.stdout.write(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {len(kept)} | {size} | {count} |\n")


if __name__ == "__main__":
    sys.exit(main())
