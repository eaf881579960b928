"""Others that give attention: Transformers' `generate`, and the vLLM plugin vllm-lens.

Each alternates with our full capture of the same batch, while all servers that are not measured sleep.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from deploy.model import model_folder
from tests.benchmarks.load import Load, prompts, run_batch
from tests.benchmarks.measure import Fleet, Variant
from tests.benchmarks.servers import ROOT, Engine, other_plugins

__all__ = ["LENS", "TransformersPeer", "against", "lens_batch", "start_lens"]

LENS: Final = ("vllm-lens==1.3.0", "zstandard==0.25.0")
"""The plugin and the one library of its that vLLM's environment lacks."""
QK: Final = {"vllm_xargs": {"output_qk": "true"}}
"""Q and K of all layers, all positions, by the plugin's own switch."""


class TransformersPeer:
    """A child process that has the model loaded and waits for batches."""

    def __init__(self, model: Path) -> None:
        module = "tests.benchmarks.transformers_peer"
        self._child = subprocess.Popen(
            [sys.executable, "-m", module, str(model), str(os.cpu_count())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self._line()

    def run(self, load: Load, seed: int) -> dict[str, float]:
        """`seconds`, `tokens`, `mb` and `steps` of one batch."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"prompts": prompts(load, seed), "output": load.output}) + "\n")
        self._child.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, float]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the Transformers process ended with {self._child.wait()}")
        return dict(json.loads(line))

    def stop(self) -> None:
        """End the child."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(30)


def against(
    fleet: Fleet,
    ours: Sequence[Variant],
    peer: Callable[[], float],
    load: Load,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, list[float]]:
    """Our tokens per second over the peer's, by variant: ours, the peer, and ours again in each round.

    peer: runs one batch and returns its tokens per second.
    """
    ratios: dict[str, list[float]] = {variant.name: [] for variant in ours}
    for number in range(rounds):
        for variant in ours:
            first, _ = fleet.run(variant, load)
            other = peer()
            second, captured = fleet.run(variant, load)
            if captured is not None and captured.faults:
                say(f"  INCOMPLETE: {captured.faults[0]}")
            ours_speed = (first.throughput + second.throughput) / 2
            say(f"  round {number + 1}: {variant.name} {ours_speed:.0f} tokens/s, peer {other:.0f} tokens/s")
            ratios[variant.name].append(ours_speed / other)
    return ratios


def start_lens(model: Path, folder: Path, options: Sequence[str]) -> Engine:
    """A server with vllm-lens, checked to return Q and K. Raises RuntimeError saying what does not work."""
    engine = Engine(
        "vllm-lens", model, folder, options, PYTHONPATH=str(_installed()), VLLM_PLUGINS=f"activations,{other_plugins()}"
    )
    try:
        _check_lens(engine)
    except BaseException:
        engine.stop()
        raise
    return engine


def lens_batch(engine: Engine, load: Load, seed: int) -> float:
    """Tokens per second of one batch whose Q and K the plugin brings to the API process (and no further)."""
    with engine.awake():
        return run_batch(engine.url, load, seed, extra=QK).throughput


def _installed() -> Path:
    """The plugin in a folder of its own under the user's cache, where nobody imports it by accident."""
    target = model_folder("bfloat16").with_name(LENS[0])
    if not target.is_dir():
        # Next to its place and then renamed: a folder that exists is whole.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            # It names a newer Python and another vLLM than it needs.
            flags = ["--no-deps", "--ignore-requires-python", "--quiet", "--disable-pip-version-check"]
            command = [sys.executable, "-m", "pip", "install", *flags, "--target", f"{scratch}/whole", *LENS]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"pip cannot install {' '.join(LENS)}: {done.stderr.strip()[-300:]}")
            (Path(scratch) / "whole").rename(target)
    return target


def _check_lens(engine: Engine) -> None:
    """One request as its own client sends it: the answer must hold Q and K of every position."""
    body: dict[str, Any] = {"model": "demo", "prompt": list(range(100, 132)), "max_tokens": 4, "temperature": 0, **QK}
    body["ignore_eos"] = True
    request = urllib.request.Request(
        engine.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    found = answer.get("activations") or {}
    if not {"attn_q", "attn_k"} <= found.keys():
        raise RuntimeError(f"vllm-lens answered without Q and K: fields {sorted(answer)}, activations {sorted(found)}")
