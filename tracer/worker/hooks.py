"""Puts the tracer into a worker: after the KV caches exist, before CUDA graphs are captured.

Nothing is patched on a class here; only attributes of this worker's own runner and layers change, and only if the
self-test passed. Otherwise the worker says in its EngineInfo why it cannot capture, and serves as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, cast

import torch

from tracer.config import Settings
from tracer.export import Channel, process_channel, publish_engine
from tracer.records import EngineInfo, LayerInfo, MembersInfo
from tracer.worker import compat
from tracer.worker.batch import Runner
from tracer.worker.layers import Layer, describe_layers
from tracer.worker.maths import choose
from tracer.worker.model_config import config_refusal
from tracer.worker.points import placed
from tracer.worker.rehearsal import Outlet, rehearse, unhooking, when_warm
from tracer.worker.runner_v1 import RunnerV1
from tracer.worker.runner_v2 import RunnerV2, refusal
from tracer.worker.shares import shared
from tracer.worker.step import StepTracer

__all__ = ["install"]

LOG: Final = logging.getLogger("vllm.tensorspan")


def install(worker: Any, settings: Settings) -> None:
    """Hook one worker (vLLM's `WorkerBase`) and publish what it can capture; never raises for what vLLM looks like.

    A version that is not known is hooked after its warm-up and must pass a test (`rehearsal`).
    """
    channel = process_channel(settings, "worker", settings.queue_mb)
    reason = _unavailable(worker)
    if reason is not None:
        _announce(channel, _engine_info(worker, (), reason))
    elif compat.is_known(compat.version()):
        _announce(channel, _hooked(worker, channel, settings))
    else:
        publish_engine(channel.settings, _engine_info(worker, (), f"{_untested()}, and its test has not run yet"))
        when_warm(worker, lambda: _announce(channel, _rehearsed(worker, channel, settings)))


def _hooked(worker: Any, channel: Channel, settings: Settings) -> EngineInfo:
    try:
        return _hook(worker, channel, settings)[0]
    except Exception as error:
        LOG.exception("tensorspan: this worker cannot be hooked")
        return _engine_info(worker, (), f"unavailable: hooking the worker failed: {type(error).__name__}: {error}")


def _rehearsed(worker: Any, channel: Channel, settings: Settings) -> EngineInfo:
    outlet, unhook = Outlet(channel), unhooking(worker)
    try:
        info, adapter, layers = _hook(worker, cast(Channel, outlet), settings)
        rehearse(worker, adapter, layers, outlet)
    except Exception as error:
        LOG.exception("tensorspan: the test of this vLLM failed")
        unhook()
        return _engine_info(worker, (), f"{_untested()}, and it failed its test: {type(error).__name__}: {error}")
    return info


def _untested() -> str:
    return f"unavailable: vLLM {compat.version()} is not one this release was tested with"


def _announce(channel: Channel, info: EngineInfo) -> None:
    """Tell the exporter, the API process and the log what this worker can capture."""
    channel.greet(info)
    publish_engine(channel.settings, info)
    _report(info)


def _hook(worker: Any, channel: Channel, settings: Settings) -> tuple[EngineInfo, Runner, list[Layer]]:
    config, runner = worker.vllm_config, worker.model_runner
    layers = describe_layers(_own_layers(config, runner), _no_attention(config))
    layers, whole = shared(layers, worker)
    info = _engine_info(worker, whole, None)
    adapter = RunnerV2(runner) if worker.use_v2_model_runner else RunnerV1(runner)
    maths = choose(layers, worker.device, max(2, min(settings.topk, info.vocab_size)))
    info = replace(info, kernels=maths.name)
    tracer = StepTracer(channel, adapter, layers, info, maths)
    adapter.install(tracer)
    for layer in layers:
        if layer.math is not None:
            layer.module.impl.forward = _observed(layer.module.impl.forward, layer.info.index, tracer)
    return info, adapter, layers


def _own_layers(config: Any, runner: Any) -> dict[str, Any]:
    """The served model's layers by name; those of a model that drafts tokens are registered beside them."""
    own = {id(module) for module in runner.get_model().modules()}
    context = config.compilation_config.static_forward_context
    return {name: module for name, module in context.items() if id(module) in own}


def _observed(forward: Callable[..., Any], index: int, tracer: StepTracer) -> Callable[..., Any]:
    """`impl.forward` of one layer, watched on steps that asked for it and untouched on all others."""

    def observed(
        layer: Any, query: torch.Tensor, key: Any, value: Any, kv_cache: Any, metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if tracer.wants_attention and metadata is not None:
            tracer.attention(index, query, kv_cache, metadata)
        return forward(layer, query, key, value, kv_cache, metadata, *args, **kwargs)

    return observed


def _unavailable(worker: Any) -> str | None:
    """Why this engine cannot be captured at all, or None.

    Runner V2 needs a GPU and was only checked against its classes and source: what guards its users is this look-up of
    every name, the key read-back of `keys.learn`, and `describe_layers`, which refuses what it does not know.
    """
    config, runner = worker.vllm_config, worker.model_runner
    missing = _missing(runner, v2=worker.use_v2_model_runner)
    parallel = config.parallel_config
    checks = (
        (bool(missing), f"vLLM {compat.version()} lacks {', '.join(missing)}"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is not supported by this release"),
        (parallel.nnodes_within_dp > 1, "the engine's ranks are on several machines"),
        (
            parallel.world_size > 1 and parallel.distributed_executor_backend != "mp",
            f"several ranks under the executor {parallel.distributed_executor_backend!r}, supported is 'mp'",
        ),
        (parallel.prefill_context_parallel_size > 1, "context parallelism is not supported by this release"),
        (parallel.use_ubatching, "dual-batch overlap is not supported by this release"),
        (config.model_config.is_encoder_decoder, "encoder-decoder models are not supported by this release"),
        (config.model_config.runner_type != "generate", "the model does not generate"),
        (
            not compat.is_known(compat.version()) and max(parallel.world_size, parallel.data_parallel_size) > 1,
            f"vLLM {compat.version()} is not one this release was tested with, and its test needs a single worker",
        ),
    )
    reason = next((reason for failed, reason in checks if failed), None)
    if reason is None and worker.use_v2_model_runner:
        reason = refusal(runner)
    return None if reason is None else f"unavailable: {reason}"


def _missing(runner: Any, *, v2: bool) -> list[str]:
    """Names of vLLM that the hooks need and this engine does not have."""
    if v2:
        missing = compat.missing_names() + compat.missing_names(compat.V2_NAMES) + compat.missing_fields()
        return missing + compat.missing_attributes(runner, compat.V2_ATTRIBUTES)
    missing = compat.missing_names() + compat.missing_names(compat.V1_NAMES)
    return missing + compat.missing_attributes(runner, compat.V1_ATTRIBUTES)


def _no_attention(config: Any) -> str | None:
    """Why no layer's attention can be rebuilt although logits can, or None."""
    checks = (
        (config.parallel_config.decode_context_parallel_size > 1, "each rank holds a part of every request's keys"),
        (config.model_config.rswa_window is not None, "reference sliding window attention"),
        (config.cache_config.kv_sharing_fast_prefill, "KV-sharing fast prefill keeps most queries from some layers"),
    )
    reason = next((reason for failed, reason in checks if failed), None)
    return reason or config_refusal(config.model_config.hf_text_config)


def _engine_info(worker: Any, layers: tuple[LayerInfo, ...], reason: str | None) -> EngineInfo:
    config, model = worker.vllm_config, worker.vllm_config.model_config
    usable = [layer for layer in layers if layer.unsupported is None]
    refused = next((layer.unsupported for layer in layers), "the model has no attention layer")
    return EngineInfo(
        model=str(model.served_model_name if isinstance(model.served_model_name, str) else model.model),
        vllm_version=compat.version(),
        runner="V2" if worker.use_v2_model_runner else "V1",
        device=str(worker.device),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model.get_vocab_size(),
        max_model_len=model.max_model_len,
        layers=layers,
        rank=config.parallel_config.rank,
        world_size=config.parallel_config.world_size,
        replica=config.parallel_config.data_parallel_index,
        block_size=config.cache_config.block_size,
        prefix_caching=bool(config.cache_config.enable_prefix_caching),
        reasoning_parser=compat.reasoning_parser(config),
        logits_unsupported=reason,
        attention_unsupported=reason or (None if usable else refused),
        members=_members(worker) if reason is None else MembersInfo(reason, 0, 0, reason, (), reason),
    )


def _members(worker: Any) -> MembersInfo:
    """What can be captured besides logits and attention; all of it of whole steps on one rank."""
    config, found = worker.vllm_config, placed(worker)
    checks = (
        (config.speculative_config is not None, "speculative decoding"),
        (config.parallel_config.tensor_parallel_size > 1, "tensor parallelism"),
    )
    why = next((f"unavailable: not supported together with {what}" for failed, what in checks if failed), None)
    lora = "unavailable: adapters change the head by the rows that are sampled" if config.lora_config else None
    return replace(
        found,
        prompt_logits_unsupported=why or lora,
        hidden_states_unsupported=why or found.hidden_states_unsupported,
        router_unsupported=why or found.router_unsupported,
    )


def _report(info: EngineInfo) -> None:
    refused = [layer for layer in info.layers if layer.unsupported is not None]
    if info.logits_unsupported:
        LOG.warning("tensorspan: no capture on this engine, %s", info.logits_unsupported)
    elif refused:
        LOG.warning("tensorspan: attention of %d of %d layers cannot be captured, first: %s: %s",
                    len(refused), len(info.layers), refused[0].name, refused[0].unsupported)  # fmt: skip
    else:
        LOG.info("tensorspan: ready; logits and attention of %d layers can be captured", len(info.layers))
