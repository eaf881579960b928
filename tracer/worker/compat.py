"""Every private vLLM name that we touch, and the versions we know them in.

The self-test at start (`missing_names`) looks each of them up; if one is gone, vLLM serves as usual and captures are
answered with the reason. This is the only file where `Any` stands for an object of vLLM.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, get_args

import vllm

__all__ = [
    "KNOWN_VERSIONS",
    "attention_class",
    "attention_type",
    "backend_is_known",
    "backend_name",
    "beam_search_class",
    "class_path",
    "full_graph_mode",
    "is_eager",
    "is_known",
    "metadata_fields",
    "missing_attributes",
    "missing_fields",
    "missing_names",
    "moe_runners",
    "no_graph_mode",
    "output_processor_class",
    "qkv_linear_class",
    "reasoning_counter",
    "reasoning_parser",
    "sampling_params_class",
    "scheduler_classes",
    "version",
    "worker_wrapper_class",
]

KNOWN_VERSIONS: Final = ("0.30", "0.31", "0.32")
"""Minor versions whose private names were read and on which the tests ran; see `worker.rehearsal` for all others.

One table of names serves all of them: what we touch did not change between them.
"""

NAMES: Final = (
    ("vllm.v1.worker.worker_base", "WorkerWrapperBase.initialize_from_config", ("self", "kv_cache_configs")),
    ("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_device", ("self",)),
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
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.get_model", ("self",)),
    ("vllm.v1.worker.gpu_model_runner", "ExecuteModelState", ()),
    ("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher.dispatch", ("self", "num_tokens")),
    ("vllm.v1.core.sched.output", "SchedulerOutput", ()),
)
V1_ATTRIBUTES: Final = (
    "input_batch",
    "requests",
    "discard_request_mask",
    "compilation_config",
    "cudagraph_dispatcher",
    "num_computed_tokens",
    "speculative_config",
    "use_async_spec_decode",
)

V2_NAMES: Final = (
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.execute_model", (
        "self", "scheduler_output", "intermediate_tensors", "dummy_run",
    )),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs", (
        "self", "scheduler_output", "batch_req_state", "batch_desc",
    )),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample", (
        "self", "hidden_states", "input_batch", "grammar_output",
    )),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample_tokens", ("self", "grammar_output")),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.get_model", ("self",)),
    ("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager.dispatch", (
        "self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras", "max_query_len", "num_ubatches",
    )),
    ("vllm.v1.worker.gpu.async_utils", "AsyncOutput.get_output", ("self",)),
    ("vllm.v1.worker.gpu.states", "RequestState", ()),
    ("vllm.v1.core.sched.output", "SchedulerOutput", ()),
)  # fmt: skip
V2_FIELDS: Final = (
    ("vllm.v1.worker.gpu.input_batch", "InputBatch", (
        "req_ids", "num_reqs", "idx_mapping_np", "num_scheduled_tokens", "num_draft_tokens", "query_start_loc_np",
        "num_computed_tokens_np", "prefill_len_np", "cu_num_logits_np", "num_draft_tokens_per_req", "positions",
        "query_start_loc",
    )),
    ("vllm.v1.worker.gpu.cudagraph_utils", "BatchExecutionDescriptor", (
        "cg_mode", "num_tokens", "num_reqs", "uniform_token_count", "max_query_len",
    )),
)  # fmt: skip
"""(module, dataclass, fields)."""
V2_ATTRIBUTES: Final = (
    "req_states.prompt_len.np",
    "model.compute_logits",
    "model_state.num_new_sampled_tokens_per_step",
    "parallel_config.data_parallel_size",
    "cudagraph_manager",
    "num_speculative_steps",
    "adaptive_verification",
    "batch_sharder",
    "ubatch_runner",
    "pcp_manager",
    "fast_prefill",
)


BACKENDS: Final = {
    "CPU_ATTN": "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend",
    "FLASH_ATTN": "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend",
    "FLEX_ATTENTION": "vllm.v1.attention.backends.flex_attention.FlexAttentionBackend",
    "TRITON_ATTN": "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend",
}
"""Attention backends whose source was read: plain softmax over one paged cache, stored before it is read."""


def version() -> str:
    """vLLM's version, e.g. `0.32.0`."""
    return str(vllm.__version__)


def is_known(version_: str) -> bool:
    """True for a version of KNOWN_VERSIONS: `0.32.1` and `0.32.0rc1+cpu` are, `0.320.0` is not."""
    return ".".join(version_.split(".")[:2]) in KNOWN_VERSIONS


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


def missing_fields(dataclasses: tuple[tuple[str, str, tuple[str, ...]], ...] = V2_FIELDS) -> list[str]:
    """Fields that these dataclasses of vLLM do not have."""
    missing = []
    for module, name, fields in dataclasses:
        try:
            found = getattr(importlib.import_module(module), name).__dataclass_fields__
        except (ImportError, AttributeError):
            found = {}
        missing += [f"{module}.{name}.{field}" for field in fields if field not in found]
    return missing


def missing_attributes(runner: Any, names: tuple[str, ...]) -> list[str]:
    """Dotted attributes that this model runner does not have; None on the way counts as missing."""

    def has(name: str) -> bool:
        try:
            operator.attrgetter(name)(runner)
        except AttributeError:
            return False
        return True

    return [f"model_runner.{name}" for name in names if not has(name)]


def worker_wrapper_class() -> Any:
    """`WorkerWrapperBase`: one per worker process, whatever the executor."""
    return importlib.import_module("vllm.v1.worker.worker_base").WorkerWrapperBase


def output_processor_class() -> Any:
    """`OutputProcessor`: sees each generation begin and end, behind the server and behind `LLM` alike."""
    return importlib.import_module("vllm.v1.engine.output_processor").OutputProcessor


def beam_search_class() -> Any | None:
    """The part of the offline `LLM` that searches beams; None in a process that has not imported it."""
    module = sys.modules.get("vllm.entrypoints.generate.beam_search.offline")
    return getattr(module, "BeamSearchOfflineMixin", None)


def scheduler_classes() -> tuple[Any, Any, Any]:
    """`SchedulerOutput`, `NewRequestData` and `CachedRequestData`: what a worker is told to do in a step."""
    module = importlib.import_module("vllm.v1.core.sched.output")
    return module.SchedulerOutput, module.NewRequestData, module.CachedRequestData


def sampling_params_class() -> Any:
    """`SamplingParams`."""
    return importlib.import_module("vllm.sampling_params").SamplingParams


def attention_class() -> Any:
    """`Attention`: the plain decoder layer; its subclasses mean something else and are refused."""
    return importlib.import_module("vllm.model_executor.layers.attention").Attention


def qkv_linear_class() -> Any:
    """`QKVParallelLinear`: knows how the heads of a layer are dealt out to tensor parallel ranks."""
    return importlib.import_module("vllm.model_executor.layers.linear").QKVParallelLinear


def attention_type(module: Any) -> str:
    """`decoder`, `encoder`, ... of an attention layer."""
    return str(getattr(module.attn_type, "value", module.attn_type))


def backend_name(module: Any) -> str:
    """E.g. `CPU_ATTN`; empty for layers without an attention backend."""
    backend = getattr(module, "attn_backend", None)
    return str(backend.get_name()) if backend is not None else ""


def backend_is_known(module: Any) -> bool:
    """True for a backend of `BACKENDS`, and not for another class registered under its name."""
    backend = getattr(module, "attn_backend", None)
    return backend is not None and BACKENDS.get(backend_name(module)) == class_path(backend)


def class_path(kind: Any) -> str:
    """Where a class is defined."""
    return f"{kind.__module__}.{kind.__qualname__}"


def metadata_fields(module: Any) -> frozenset[str]:
    """Fields of the metadata that an `Attention` layer's backend builds; empty if its builder does not name the class.

    `AttentionMetadataBuilder[FlashAttentionMetadata]`: the class is the builder's type argument.
    """
    builder = module.attn_backend.get_builder_cls()
    bases = [base for owner in builder.__mro__ for base in owner.__dict__.get("__orig_bases__", ())]
    arguments = [argument for base in bases for argument in get_args(base)]
    metadata = next((argument for argument in arguments if hasattr(argument, "__dataclass_fields__")), None)
    return frozenset() if metadata is None else frozenset(metadata.__dataclass_fields__)


def full_graph_mode() -> Any:
    """`CUDAGraphMode.FULL`."""
    return importlib.import_module("vllm.config").CUDAGraphMode.FULL


def no_graph_mode() -> Any:
    """`CUDAGraphMode.NONE`."""
    return importlib.import_module("vllm.config").CUDAGraphMode.NONE


def is_eager(config: Any) -> bool:
    """True if this `VllmConfig` compiles nothing, so that Python runs in every layer."""
    return bool(config.compilation_config.mode == importlib.import_module("vllm.config").CompilationMode.NONE)


def moe_runners(config: Any) -> list[tuple[str, Any]]:
    """(name, `MoERunner`) of each layer with experts, in the model's order; empty if this vLLM has no such class."""
    try:
        kind = importlib.import_module("vllm.model_executor.layers.fused_moe.runner.moe_runner").MoERunner
    except (ImportError, AttributeError):
        return []
    modules = config.compilation_config.static_forward_context
    return [(name, modules[name]) for name in config.compilation_config.static_all_moe_layers
            if isinstance(modules[name], kind)]  # fmt: skip


def reasoning_parser(config: Any) -> str:
    """Name of the reasoning parser in a `VllmConfig`; empty without one."""
    return str(getattr(config.structured_outputs_config, "reasoning_parser", "") or "")


def reasoning_counter(name: str, tokenizer: Any) -> Callable[[Sequence[int]], int] | None:
    """`count_reasoning_tokens` of that parser; None for one that does not count."""
    module = importlib.import_module("vllm.reasoning")
    kind = module.ReasoningParserManager.get_reasoning_parser(name)
    if kind.count_reasoning_tokens is module.ReasoningParser.count_reasoning_tokens:
        return None
    count: Callable[[Sequence[int]], int] = kind(tokenizer).count_reasoning_tokens
    return count


def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `make(original)`, once however often it is asked for."""
    original = getattr(owner, name)
    if not getattr(original, "_tensorspan", False):
        replacement = make(original)
        replacement._tensorspan = True  # noqa: SLF001 - our own mark on our own function
        setattr(owner, name, replacement)
