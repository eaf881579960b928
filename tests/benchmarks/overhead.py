"""What tracing costs the engine: `python -m tests.benchmarks.overhead [ROUNDS]`.

One engine, one process, the kinds of request alternating within each round, so that a noisy machine hits all alike:
8 requests of 256 prompt tokens and 128 new tokens each, SmolLM2-135M-Instruct in bfloat16, compiled. `off` are requests
without a trace on a hooked engine; every other row is a ratio to the `off` of its own round. The exporter process runs
beside the engine on the same cores. For work on the hooks: it starts in half a minute. What tracing costs against a
plain server is `tests.benchmarks.bench`'s to say.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from typing import Any, Final

from deploy.model import demo_model
from tracer.context import ACTIVE, Inbound, parse_capture
from tracer.offline import capture

STREAMS: Final = 8
PROMPT_TOKENS: Final = 256
NEW_TOKENS: Final = 128
KINDS: Final = {
    "spans with logit statistics": "",
    "+ full logits": "logits",
    "+ attention, all layers and heads": "logits, attention",
    "attention summaries alone": "summary",
}


def run(llm: Any, inbound: Inbound, seed: int) -> float:
    """Tokens per second of one batch under `inbound`."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(seed * 7919 + stream * 104729 + i * 31) % 40000 + 100 for i in range(PROMPT_TOKENS)]}
        for stream in range(STREAMS)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    token = ACTIVE.set(inbound)
    begin = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    ACTIVE.reset(token)
    return STREAMS * NEW_TOKENS / seconds


def main() -> None:
    """Print one line per kind: median ratio, its range, and the rounds."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    ratios: dict[str, list[float]] = {name: [] for name in KINDS}
    with tempfile.TemporaryDirectory() as store, capture("", store=store):
        llm = LLM(str(demo_model()), max_model_len=1024, kv_cache_memory_bytes=1 << 29, enable_prefix_caching=False)
        off = Inbound.offline(None, sampled=False)
        for seed in range(rounds + 1):
            base = run(llm, off, seed)
            for name, text in KINDS.items():
                ratio = run(llm, Inbound.offline(parse_capture(text)), seed) / base
                if seed:  # The first round warms up.
                    ratios[name].append(ratio)
            sys.stdout.write(f"round {seed}: {base:.0f} tokens/s off\n")
            sys.stdout.flush()
    for name, values in ratios.items():
        low, high = min(values), max(values)
        sys.stdout.write(f"{name}: {statistics.median(values):.3f} ({low:.3f} to {high:.3f}, n={len(values)})\n")


if __name__ == "__main__":
    main()
