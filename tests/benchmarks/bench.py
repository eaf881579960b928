"""tensorspan beside plain vLLM in one run: `python -m tests.benchmarks.bench [--quick] [--rounds N] [--publish]`.

docs/benchmarks.md says what is measured and how. Prints the tables and writes `bench.json` and `bench.svg`;
`--publish` puts both tables and figure into docs/ instead of the figure alone.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.model import demo_model
from tests.benchmarks import context, figure, peers, report
from tests.benchmarks.load import Load
from tests.benchmarks.machine import ROOT, conditions
from tests.benchmarks.measure import Fleet, Sample, Variant, measure_round
from tests.benchmarks.report import NAMES, Report, Row
from tests.benchmarks.servers import Engine
from tracer import open_capture

__all__ = ["Plan", "main"]

FULL: Final = "logits, attention"
UNSAMPLED: Final = (("traceparent", "00-" + "5a" * 16 + "-" + "5a" * 8 + "-00"),)
OFF: Final = Variant(NAMES.off, "off")
SPANS: Final = Variant(NAMES.spans, "traced")
LOGITS: Final = Variant(NAMES.logits, "traced", "logits")
CAPTURE: Final = Variant(NAMES.full, "traced", FULL)
QK: Final = Variant(NAMES.qk, "traced", "qk")
OTHERS: Final = Variant(NAMES.others, "traced", FULL, capturing=(0,), measured=tuple(range(1, 8)))
EXTRA: Final = (
    Variant(NAMES.untraced, "traced", headers=UNSAMPLED),
    Variant(NAMES.attention, "traced", "attention"),
    Variant(NAMES.summary, "traced", "summary"),
)
EIGHT: Final = Load(8, 256, 128)
ONE: Final = Load(1, 256, 128)
LONG: Final = Load(8, 1500, 128)
LONG_ONE: Final = Load(1, 1500, 128)
WARM: Final = Load(8, 256, 16)
PARTS: Final = ("eight", "one", "long", "context", "transformers", "lens")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    rounds: int
    parts: tuple[str, ...] = PARTS
    quick: bool = False
    options: tuple[str, ...] = ()
    """Options of every server."""
    starts: int = 1
    """How often the servers are started anew: two processes of one program differ by luck, too."""

    def share(self, rounds: int, start: int) -> range:
        """Which of so many rounds belong to this start of the servers."""
        return range(rounds * start // self.starts, rounds * (start + 1) // self.starts)

    def loads(self) -> list[tuple[Load, int, list[Variant]]]:
        """Loads with their rounds and variants."""
        few = max(1, self.rounds // 2)
        if self.quick:
            found = [
                (EIGHT, self.rounds, [OFF, SPANS, LOGITS, CAPTURE, QK, OTHERS]),
                (ONE, few, [OFF, SPANS, CAPTURE]),
                (LONG_ONE, few, [CAPTURE]),
            ]
        else:
            found = [
                (EIGHT, self.rounds, [OFF, SPANS, LOGITS, CAPTURE, QK, OTHERS, *EXTRA]),
                (ONE, self.rounds, [OFF, SPANS, LOGITS, CAPTURE, QK]),
                (LONG, few, [SPANS, LOGITS, CAPTURE, QK]),
                (LONG_ONE, few, [SPANS, LOGITS, CAPTURE, QK]),
            ]
        part = {EIGHT: "eight", ONE: "one", LONG: "long", LONG_ONE: "long"}
        return [entry for entry in found if part[entry[0]] in self.parts]

    @property
    def grid(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Contexts and captured rows of the figure."""
        return ((128, 1024), (1, 8)) if self.quick else ((128, 512, 1024, 2048), (1, 2, 4, 8))


Samples = dict[Load, tuple[list[tuple[str, Sample]], list[list[float]]]]
"""By load: (variant's name, sample) of each round, and plain vLLM's tokens per second of each round."""


def say(line: str) -> None:
    """Progress, with the time since the start of this process."""
    sys.stderr.write(f"{time.perf_counter() - BEGIN:6.0f} s {line}\n")
    sys.stderr.flush()


BEGIN: Final = time.perf_counter()


@contextlib.contextmanager
def running(folder: Path, model: Path, plan: Plan) -> Iterator[Fleet]:
    """The three servers, started two at a time (one imports while the other compiles), asleep."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:

        def start(name: str) -> Engine:
            say(f"starting server {name}")
            engine: Engine = getattr(Engine, name)(model, folder / name, plan.options)
            stack.callback(engine.stop)
            engine.sleep()
            return engine

        names = ("plain", "off", "traced")
        yield Fleet(dict(zip(names, pool.map(start, names), strict=True)))


def warm_up(fleet: Fleet, plan: Plan, found: Report) -> set[str]:
    """One short batch of each kind, away from every measurement; returns the captures that this server refuses."""
    refused = set()
    fleet.plain(WARM)
    for variant in {v.name: v for _, _, variants in plan.loads() for v in variants}.values():
        try:
            fleet.run(variant, WARM)
        except RuntimeError as error:
            refused.add(variant.capture)
            detail = re.search(r'"detail": "(.*?)"', str(error))
            problem = f"not measured: {variant.name}: {detail[1] if detail else str(error)[:300]}"
            found.problems += [problem] if problem not in found.problems else []
    return refused


def measure_loads(fleet: Fleet, plan: Plan, found: Samples, start: int, refused: set[str]) -> None:
    """The rounds of all loads that belong to the servers' start number `start`."""
    for load, rounds, variants in plan.loads():
        usable = [variant for variant in variants if variant.capture not in refused or not variant.capture]
        samples, plain = found.setdefault(load, ([], []))
        for number in plan.share(rounds, start):
            say(f"{load.streams} streams, {load.prompt} tokens, round {number + 1} of {rounds}")
            order = usable[::-1] if number % 2 else usable
            batch, speeds = measure_round(fleet, order, load, say)
            samples += [(variant.name, sample) for variant, sample in batch]
            plain.append(speeds)


def add_loads(plan: Plan, samples: Samples, found: Report) -> None:
    """All samples as rows, in the plan's order."""
    for load, _, variants in plan.loads():
        names = [variant.name for variant in variants]
        mine, plain = samples.get(load, ([], []))
        report.add_samples(found, load, sorted(mine, key=lambda sample: names.index(sample[0])), plain)


def measure_lookup(fleet: Fleet, found: Report) -> None:
    """How long one step's row takes by its span ID, in the store as it is."""
    fleet.run(CAPTURE, EIGHT)
    store = fleet.engines["traced"].store
    steps = [int(span) for ref in fleet.last_refs for span in open_capture(store, ref).to_xarray()["span_id"].values]
    times = []
    for span in steps[:: max(1, len(steps) // 40)]:
        begin = time.perf_counter()
        capture = open_capture(store, f"{span:016x}")
        capture.row(step=capture.step_index or 0, layer=12, head=3)
        times.append(1e3 * (time.perf_counter() - begin))
    slow = f"median {statistics.median(times):.1f} ms, slowest {max(times):.1f} ms"
    found.lines.append(
        f"A step's attention row by its span ID among {len(fleet.last_refs)} captures: {slow} (goal ≤ 10)"
    )


def measure_transformers(fleet: Fleet, plan: Plan, found: Report, model: Path) -> None:
    """Full capture over Transformers."""
    say("Transformers generate(output_attentions=True, output_logits=True), eager, bfloat16")
    peer = peers.TransformersPeer(model)
    try:
        peer.run(Load(8, 256, 4), fleet.seed())
        made: list[dict[str, float]] = []

        def one() -> float:
            made.append(peer.run(EIGHT, fleet.seed()))
            return made[-1]["tokens"] / made[-1]["seconds"]

        ratios = peers.against(fleet, [CAPTURE], one, EIGHT, max(1, plan.rounds // 2), say)
    finally:
        peer.stop()
    found.rows.append(Row(NAMES.transformers, EIGHT, tuple(ratios[CAPTURE.name])))
    found.lines.append(
        f"Transformers made {made[-1]['tokens'] / made[-1]['seconds']:.0f} tokens/s and held {made[-1]['mb']:.0f} MB "
        "of attention and logits in memory; it stores nothing"
    )


def measure_lens(fleet: Fleet, plan: Plan, found: Report, model: Path, folder: Path, refused: set[str]) -> None:
    """Full capture, and `qk` where there is one, over the plugin vllm-lens."""
    say("starting a server with vllm-lens")
    try:
        engine = peers.start_lens(model, folder / "lens", plan.options)
    except (RuntimeError, AssertionError, OSError) as error:
        found.problems.append(f"not measured: vllm-lens: {str(error)[-400:]}")
        return
    try:
        engine.sleep()
        peers.lens_batch(engine, WARM, fleet.seed())
        ours = [variant for variant in (CAPTURE, QK) if variant.capture not in refused]
        rounds = max(1, plan.rounds // 2)
        ratios = peers.against(fleet, ours, lambda: peers.lens_batch(engine, EIGHT, fleet.seed()), EIGHT, rounds, say)
    finally:
        engine.stop()
    for variant in ours:
        name = NAMES.lens if variant is CAPTURE else NAMES.lens_qk
        found.rows.append(Row(name, EIGHT, tuple(ratios[variant.name])))


def measure(plan: Plan, folder: Path, found: Report) -> None:
    """Everything; what is found is in `found` even if a later part fails."""
    model = demo_model()
    samples: Samples = {}
    try:
        for start in range(plan.starts):
            with running(folder / str(start), model, plan) as fleet:
                refused = warm_up(fleet, plan, found)
                warm = {name: engine.resident() for name, engine in fleet.engines.items()}
                measure_loads(fleet, plan, samples, start, refused)
                found.memory.update({name: (warm[name], e.resident()) for name, e in fleet.engines.items()})
                if start == plan.starts - 1:
                    measure_rest(fleet, plan, found, model, folder, refused)
    finally:
        add_loads(plan, samples, found)


def measure_rest(fleet: Fleet, plan: Plan, found: Report, model: Path, folder: Path, refused: set[str]) -> None:
    """What is measured once: the figure, a lookup, the peers."""
    if "context" in plan.parts:
        say("cost of a step by context and captured rows")
        found.points = context.sweep(fleet, *plan.grid, say)
        found.fit = context.fit(found.points)
    measure_lookup(fleet, found)
    if "transformers" in plan.parts:
        measure_transformers(fleet, plan, found, model)
    if "lens" in plan.parts:
        measure_lens(fleet, plan, found, model, folder, refused)


def write(found: Report, out: Path, *, docs: bool) -> None:
    """The tables to the terminal, the files to `out`, and into the docs if asked."""
    text = report.markdown(found)
    sys.stdout.write(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(report.bench_json(found), encoding="utf-8")
    drawing = figure.draw(found.points) if found.points else ""
    if drawing:
        (out / "bench.svg").write_text(drawing, encoding="utf-8")
    if docs:
        report.publish(ROOT / "docs" / "benchmarks.md", "results", text)
        if drawing:
            (ROOT / "docs" / "benchmarks.svg").write_text(drawing, encoding="utf-8")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about 8 minutes, one or two rounds of the main rows")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of the main table (default 6, quick 2)")
    parser.add_argument("--starts", type=int, default=None, help="starts of the servers (default 2, quick 1)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"only some of {','.join(PARTS)}")
    parser.add_argument("--publish", action="store_true", help="write results and figure into docs/")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of bench.json and bench.svg")
    parser.add_argument("--store", type=Path, default=None, help="folder for captures and logs (default: temporary)")
    parser.add_argument("--serve", default="", help="further options of all servers, as one word")
    return parser.parse_args(words)


def main() -> int:
    """Run, print, write."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Stopped servers must not be left behind.
    words = arguments(sys.argv[1:])
    rounds = words.rounds or (2 if words.quick else 6)
    starts = words.starts or (1 if words.quick else 2)
    plan = Plan(rounds, tuple(words.parts.split(",")), words.quick, tuple(shlex.split(words.serve)), starts)
    command = shlex.join(["python", "-m", "tests.benchmarks.bench", *sys.argv[1:]])
    setup = "SmolLM2-135M-Instruct, bfloat16, compiled, 128 new tokens; servers, client and exporter on the same cores"
    with tempfile.TemporaryDirectory(prefix="tensorspan-bench-", dir=words.store) as folder:
        found = Report(conditions(command, setup, Path(folder).resolve()))
        try:
            measure(plan, Path(folder), found)
        finally:
            found.conditions.append(f"took {(time.perf_counter() - BEGIN) / 60:.0f} minutes")
            write(found, words.out, docs=words.publish)
    return 1 if any(problem.startswith("no result") for problem in found.problems) else 0


if __name__ == "__main__":
    sys.exit(main())
