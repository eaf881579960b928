"""Every private vLLM name that we touch, and the versions we know them in.

The self-test at start (`missing_names`) looks each of them up; if one is gone, vLLM serves as usual and captures are
answered with the reason. This is the only file where `Any` stands for an object of vLLM.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, Final

import vllm

__all__ = [
    "KNOWN_VERSIONS",
    "attention_class",
    "attention_type",
    "backend_name",
    "full_graph_mode",
    "missing_names",
    "output_processor_class",
    "version",
    "worker_wrapper_class",
]

KNOWN_VERSIONS: Final = ("0.32",)
"""Minor versions whose private names were read and tested."""

NAMES: Final = (
    ("vllm.v1.worker.worker_base", "WorkerWrapperBase.initialize_from_config", ("self", "kv_cache_configs")),
    ("vllm.model_executor.layers.attention", "Attention", ()),
    ("vllm.v1.engine.output_processor", "OutputProcessor.add_request", ("self", "request", "prompt", "parent_req")),
    ("vllm.v1.engine.output_processor", "OutputProcessor.process_outputs", ("self", "engine_core_outputs")),
    ("vllm.v1.engine.output_processor", "OutputProcessor.abort_requests", ("self", "request_ids", "internal")),
    ("vllm.v1.engine.output_processor", "OutputProcessor.propagate_error", ("self", "e")),
    ("vllm.sampling_params", "SamplingParams", ()),
)
"""(module, dotted name, leading parameters) that both processes need."""

V1_NAMES: Final = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.execute_model", ("self", "scheduler_output")),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens", ("self", "grammar_output")),
    ("vllm.v1.worker.gpu_model_runner", "ExecuteModelState", ()),
    ("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher.dispatch", ("self", "num_tokens")),
    ("vllm.v1.core.sched.output", "SchedulerOutput", ()),
)
V1_ATTRIBUTES: Final = ("input_batch", "requests", "discard_request_mask", "compilation_config", "cudagraph_dispatcher")

V2_NAMES: Final = (
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.execute_model", ("self", "scheduler_output")),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs", ("self", "scheduler_output")),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample", ("self",)),
    ("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager.dispatch", ("self",)),
)


def version() -> str:
    """vLLM's version, e.g. `0.32.0`."""
    return str(vllm.__version__)


def missing_names(names: tuple[tuple[str, str, tuple[str, ...]], ...] = NAMES) -> list[str]:
    """Names that this vLLM does not have, or has with other parameters; empty if all is as known."""
    return [f"{module}.{name}" for module, name, parameters in names if not _present(module, name, parameters)]


def _present(module: str, name: str, parameters: tuple[str, ...]) -> bool:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return not parameters or tuple(inspect.signature(found).parameters)[: len(parameters)] == parameters


def worker_wrapper_class() -> Any:
    """`WorkerWrapperBase`: one per worker process, whatever the executor."""
    return importlib.import_module("vllm.v1.worker.worker_base").WorkerWrapperBase


def output_processor_class() -> Any:
    """`OutputProcessor`: sees each generation begin and end, behind the server and behind `LLM` alike."""
    return importlib.import_module("vllm.v1.engine.output_processor").OutputProcessor


def attention_class() -> Any:
    """`Attention`: the plain decoder layer; its subclasses mean something else and are refused."""
    return importlib.import_module("vllm.model_executor.layers.attention").Attention


def attention_type(impl: Any) -> str:
    """`decoder`, `encoder`, ... of an attention implementation."""
    return str(getattr(impl.attn_type, "value", impl.attn_type))


def backend_name(module: Any) -> str:
    """E.g. `CPU_ATTN`; empty for layers without an attention backend."""
    backend = getattr(module, "attn_backend", None)
    return str(backend.get_name()) if backend is not None else ""


def full_graph_mode() -> Any:
    """`CUDAGraphMode.FULL`."""
    return importlib.import_module("vllm.config").CUDAGraphMode.FULL


def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `make(original)`, once however often it is asked for."""
    original = getattr(owner, name)
    if not getattr(original, "_tensorspan", False):
        replacement = make(original)
        replacement._tensorspan = True  # noqa: SLF001 - our own mark on our own function
        setattr(owner, name, replacement)
