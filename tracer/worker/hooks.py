"""Puts the tracer into a worker: after the KV caches exist, before CUDA graphs are captured.

Nothing is patched on a class here; only attributes of this worker's own runner and layers change, and only if the
self-test passed. Otherwise the worker says in its EngineInfo why it cannot capture, and serves as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch

from tracer.config import Settings
from tracer.export import Channel, process_channel, publish_engine
from tracer.records import EngineInfo, LayerInfo
from tracer.worker import compat
from tracer.worker.layers import describe_layers
from tracer.worker.maths import choose
from tracer.worker.model_config import config_refusal
from tracer.worker.runner_v1 import RunnerV1
from tracer.worker.runner_v2 import RunnerV2, refusal
from tracer.worker.step import StepTracer

__all__ = ["install"]

LOG: Final = logging.getLogger("vllm.tensorspan")


def install(worker: Any, settings: Settings) -> EngineInfo:
    """Hook one worker (vLLM's `WorkerBase`) and publish what it can capture; never raises for what vLLM looks like."""
    channel = process_channel(settings, "worker", settings.queue_mb)
    reason = _unavailable(worker)
    info = _engine_info(worker, (), reason)
    if reason is None:
        try:
            info = _hook(worker, channel, settings)
        except Exception as error:
            LOG.exception("tensorspan: this worker cannot be hooked")
            info = _engine_info(worker, (), f"unavailable: hooking the worker failed: {type(error).__name__}: {error}")
    channel.greet(info)
    publish_engine(channel.settings, info)
    _report(info)
    return info


def _hook(worker: Any, channel: Channel, settings: Settings) -> EngineInfo:
    config, runner = worker.vllm_config, worker.model_runner
    layers = describe_layers(config.compilation_config.static_forward_context, _no_attention(config))
    info = _engine_info(worker, tuple(layer.info for layer in layers), None)
    adapter = RunnerV2(runner) if worker.use_v2_model_runner else RunnerV1(runner)
    maths = choose(layers, worker.device, max(2, min(settings.topk, info.vocab_size)))
    info = replace(info, kernels=maths.name)
    tracer = StepTracer(channel, adapter, layers, info, maths)
    adapter.install(tracer)
    for layer in layers:
        if layer.math is not None:
            layer.module.impl.forward = _observed(layer.module.impl.forward, layer.info.index, tracer)
    return info


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
        (config.speculative_config is not None, "speculative decoding is not supported by this release"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is not supported by this release"),
        (parallel.tensor_parallel_size > 1, "tensor parallelism is not supported by this release"),
        (parallel.prefill_context_parallel_size > 1, "context parallelism is not supported by this release"),
        (parallel.use_ubatching, "dual-batch overlap is not supported by this release"),
        (config.model_config.is_encoder_decoder, "encoder-decoder models are not supported by this release"),
        (config.model_config.runner_type != "generate", "the model does not generate"),
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
        block_size=config.cache_config.block_size,
        prefix_caching=bool(config.cache_config.enable_prefix_caching),
        logits_unsupported=reason,
        attention_unsupported=reason or (None if usable else refused),
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
