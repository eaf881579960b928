"""Which steps leave FULL CUDA graphs, by vLLM's own counters: `python -m tests.gpu.graphs [--cpu] [--out FILE]`.

Two engines in processes of their own, plain vLLM and vLLM with tensorspan, answer the same prompts. vLLM counts the
mode of every step (`--cudagraph-metrics`, what its log's table is made of); the step spans say it too. Spans and stored
logits must not change the counts; a request with captured attention must move its own decode steps, and only those.
`--cpu` rehearses this where no graphs are: every step's mode is NONE then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from deploy.model import demo_model
from tests.benchmarks.servers import other_plugins
from tests.integration.runs import GREEDY, prompt, watched
from tests.integration.server import server_environment

__all__ = ["Counted", "judge", "main"]

REQUESTS: Final = 8
TOKENS: Final = 24
CAPTURED_TOKENS: Final = 8
SLACK: Final = 2
"""Steps by which two runs may differ: a surplus step of asynchronous scheduling, a prefill that came in two."""
SCENARIOS: Final = {"even": "", "logits": "logits", "one": "attention"}
"""What is captured; in `one` by the first request alone, which ends before the others."""


@dataclass(frozen=True, slots=True)
class Counted:
    """One scenario on one engine."""

    modes: dict[str, int]
    """Steps by CUDA graph mode, as vLLM counted them."""
    captured: list[str] = field(default_factory=list)
    """Modes of the decode steps of the first request, as its spans say."""
    after: list[str] = field(default_factory=list)
    """Modes of the others' decode steps once the first request has ended."""


def judge(plain: dict[str, Counted], traced: dict[str, Counted], full: str = "FULL") -> list[tuple[bool, str]]:
    """(holds, what) for each claim; full: the mode of a decode step that nothing holds back."""
    claims = []

    def claim(holds: bool, what: str) -> None:
        claims.append((holds, what))

    def off(ours: Counted, theirs: Counted) -> int:
        return max(abs(ours.modes.get(m, 0) - theirs.modes.get(m, 0)) for m in {*ours.modes, *theirs.modes, full})

    usual = plain["even"].modes
    claim(usual.get(full, 0) >= TOKENS - 1 - SLACK, f"plain vLLM decodes in {full}: {usual}")
    claim(off(traced["even"], plain["even"]) <= SLACK, f"spans of every request change nothing: {traced['even'].modes}")
    claim(off(traced["logits"], plain["even"]) <= SLACK, f"nor do stored logits: {traced['logits'].modes}")
    one = traced["one"]
    left = plain["one"].modes.get(full, 0) - one.modes.get(full, 0)
    wanted = CAPTURED_TOKENS - 1 if full != "NONE" else 0
    claim(abs(left - wanted) <= SLACK, f"captured attention of one request moved {left} steps: {one.modes}")
    moved = bool(one.captured) and (full == "NONE" or full not in one.captured)
    claim(moved, f"they are its own decode steps: {dict(Counter(one.captured))}")
    claim(bool(one.after) and set(one.after) == {full}, f"the steps after it are back: {dict(Counter(one.after))}")
    return claims


def count(kind: str, *, cpu: bool, folder: Path) -> dict[str, Counted]:
    """All scenarios on one engine inside this process; kind: `plain` or `traced`."""
    from vllm import LLM
    from vllm.compilation.cuda_graph import CUDAGraphLogging

    seen: list[str] = []
    observe = CUDAGraphLogging.observe

    def observed(self: Any, stat: Any) -> None:
        seen.append(str(stat.runtime_mode).rpartition(".")[2])
        observe(self, stat)

    CUDAGraphLogging.observe = observed
    options: dict[str, Any] = {"enforce_eager": True} if cpu else {"gpu_memory_utilization": 0.3}
    with _tracing(kind, folder):
        llm = LLM(
            str(demo_model()), max_model_len=512, cudagraph_metrics=True, disable_log_stats=False,
            kv_cache_memory_bytes=1 << 28, enable_prefix_caching=False, **options,
        )  # fmt: skip
    found = {}
    for name, capture in SCENARIOS.items():
        seen.clear()
        if kind == "traced":
            found[name] = _traced(llm, name, capture, seen)
        elif not capture or name == "one":
            _generate(llm, name, "")
            found[name] = Counted(dict(Counter(seen)))
    return found


def _tracing(kind: str, folder: Path) -> Any:
    from tracer import capture

    return capture("", store=folder) if kind == "traced" else nullcontext()


def _generate(llm: Any, name: str, capture: str) -> list[Any]:
    """Eight greedy answers; in scenario `one` the first is short and the only one captured."""
    from vllm import SamplingParams

    params = []
    for index in range(REQUESTS):
        alone = name == "one" and index > 0
        tokens = CAPTURED_TOKENS if name == "one" and not index else TOKENS
        extra = {"trace_capture": capture} if capture and not alone else None
        params.append(SamplingParams(**{**GREEDY, "max_tokens": tokens, "extra_args": extra}))
    prompts = [{"prompt_token_ids": prompt(32, seed)} for seed in range(REQUESTS)]
    return list(llm.generate(prompts, params, use_tqdm=False))


def _traced(llm: Any, name: str, capture: str, seen: list[str]) -> Counted:
    from tracer.records import GenerationStart, StepRecord

    with watched() as sent:
        _generate(llm, name, capture)
    first = next(record.span_id for record in sent if isinstance(record, GenerationStart))
    steps = [record for record in sent if isinstance(record, StepRecord) and record.phase == "decode"]
    own = [step.cuda_graph for step in steps if step.span_id == first and (step.step or 0) < CAPTURED_TOKENS]
    rest = [step.cuda_graph for step in steps if step.span_id != first and (step.step or 0) > CAPTURED_TOKENS + SLACK]
    return Counted(dict(Counter(seen)), own, rest)


def _in_child(kind: str, *, cpu: bool) -> dict[str, Counted]:
    plugins = other_plugins() if kind == "plain" else ""
    extra = {"VLLM_PLUGINS": plugins} if kind == "plain" else {}
    # vLLM counts for its log: at a higher level it does not.
    environment = server_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="INFO", **extra)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts.json"
        command = [sys.executable, "-m", "tests.gpu.graphs", "--run", kind, "--out", str(out), *["--cpu"] * cpu]
        subprocess.run(command, env=environment, check=True, cwd=Path(__file__).resolve().parents[2])
        return {name: Counted(**entry) for name, entry in json.loads(out.read_text(encoding="utf-8")).items()}


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.graphs", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="a rehearsal without a GPU")
    parser.add_argument("--out", type=Path, default=None, help="file for the counts, JSON")
    parser.add_argument("--run", choices=("plain", "traced"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> int:
    """Count, judge, print; 0 if every claim holds."""
    chosen = arguments(sys.argv[1:])
    if chosen.run:
        with tempfile.TemporaryDirectory() as folder:
            found = count(chosen.run, cpu=chosen.cpu, folder=Path(folder))
            chosen.out.write_text(json.dumps(_plain(found)), encoding="utf-8")
            sys.stdout.flush()
        os._exit(0)  # the engine's own threads need not be waited for
    plain, traced = (_in_child(kind, cpu=chosen.cpu) for kind in ("plain", "traced"))
    claims = judge(plain, traced, "NONE" if chosen.cpu else "FULL")
    sys.stdout.write("".join(f"- {'yes' if holds else 'NO'}: {what}\n" for holds, what in claims))
    if chosen.out:
        chosen.out.write_text(json.dumps({"plain": _plain(plain), "traced": _plain(traced)}), encoding="utf-8")
    return 0 if all(holds for holds, _ in claims) else 1


def _plain(found: dict[str, Counted]) -> dict[str, Any]:
    return {
        name: {"modes": entry.modes, "captured": entry.captured, "after": entry.after} for name, entry in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
