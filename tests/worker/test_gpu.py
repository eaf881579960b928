"""What GPUs get, without one: kernels compiled for real targets, and run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import triton
from triton.backends.compiler import GPUTarget

from tracer.worker import triton_kernels

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parent.parent
POINTERS: Final = {
    "tables": "*i64", "table": "*i32", "scores": "*fp32", "slopes": "*fp32", "sinks": "*fp32", "out16": "*fp16",
    "out32": "*fp32", "scale": "fp32", "soft_cap": "fp32",
}  # fmt: skip
"""Types of the kernels' parameters; the rest are the engine's type or 32-bit numbers."""
SHAPE: Final = {"SIZE": 80, "DIMS": 128, "BLOCK": 16, "ENTRIES": 16, "HEADS": 8}
CODES: Final = {"bf16": (0, 0), "fp16": (0, 0), "fp32": (0, 0), "fp8": (3, 3), "fp8 keys": (4, 0)}
"""What an engine keeps in its cache: `KEY_CODE` and `QUERY_CODE`."""
KERNELS: Final = {
    "score_rows": {"GROUP": 4, "KEYS": 64, "ALIBI": True, "SOFT_CAP": True, "per_dim": 1},
    "weigh_rows": {"SINKS": True, "TILE": 1024},
    "collect_queries": {},
    "collect_keys": {"per_dim": 1},
}
"""What each kernel is compiled for; a number 1 is a constant to Triton."""


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("engine", CODES)
def test_kernels_compile_to_machine_code(
    engine: str, target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # else Triton warns once a process
    codes = dict(zip(("KEY_CODE", "QUERY_CODE"), CODES[engine], strict=True))
    plain = "bf16" if engine.startswith("fp8") else engine
    engine_types = {
        "query": "*u8" if codes["QUERY_CODE"] else f"*{plain}", "cache": "*u8" if codes["KEY_CODE"] else f"*{plain}"
    }  # fmt: skip
    for name, own in KERNELS.items():
        kernel: Any = getattr(triton_kernels, name)
        constants = {key: value for key, value in {**SHAPE, **codes, **own}.items() if key in kernel.arg_names}
        signature = {key: {**POINTERS, **engine_types}.get(key, "i32") for key in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", target, 32))
        assert len(made.asm["cubin"]) > 1000


def test_kernels_and_maths_under_the_interpreter() -> None:
    """In a process of its own: Triton must be told before it is first imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_gpu.py")],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
