"""Puts the tracer into a worker: after the KV caches exist, before CUDA graphs are captured.

Nothing is patched on a class here; only attributes of this worker's own runner and layers change, and only if the
self-test passed. Otherwise the worker says in its EngineInfo why it cannot capture, and serves as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import torch

from tracer.config import Settings
from tracer.export import process_channel, publish_engine
from tracer.records import EngineInfo, LayerInfo
from tracer.worker import compat
from tracer.worker.layers import Layer, describe_layers
from tracer.worker.runner_v1 import RunnerV1
from tracer.worker.step import StepTracer

__all__ = ["install"]

LOG: Final = logging.getLogger("vllm.tensorspan")


def install(worker: Any, settings: Settings) -> EngineInfo:
    """Hook one worker (vLLM's `WorkerBase`) and publish what it can capture."""
    config = worker.vllm_config
    reason = _unavailable(worker)
    layers = [] if reason else describe_layers(config.compilation_config.static_forward_context)
    info = _engine_info(worker, tuple(layer.info for layer in layers), reason)
    channel = process_channel(settings, "worker", settings.queue_mb)
    channel.greet(info)
    publish_engine(channel.settings, info)
    if reason is None:
        _hook(worker.model_runner, StepTracerFactory(channel, layers, info, settings.topk))
    _report(info)
    return info


class StepTracerFactory:
    """What is needed to make a tracer once the runner's adapter exists."""

    def __init__(self, channel: Any, layers: list[Layer], info: EngineInfo, topk: int) -> None:
        self.layers = layers
        self._make = lambda runner: StepTracer(channel, runner, layers, info, topk)

    def __call__(self, runner: Any) -> StepTracer:
        return self._make(runner)


def _hook(runner: Any, make: StepTracerFactory) -> None:
    adapter = RunnerV1(runner)
    tracer = make(adapter)
    adapter.install(tracer)
    for layer in make.layers:
        if layer.math is not None:
            layer.module.impl.forward = _observed(layer.module.impl.forward, layer.info.index, tracer)


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
    """Why this engine cannot be captured at all, or None."""
    config = worker.vllm_config
    missing = compat.missing_names() + compat.missing_names(compat.V1_NAMES)
    runner = worker.model_runner
    missing += [f"model_runner.{name}" for name in compat.V1_ATTRIBUTES if not hasattr(runner, name)]
    parallel = config.parallel_config
    checks = (
        (worker.use_v2_model_runner, "model runner V2 is not supported; set VLLM_USE_V2_MODEL_RUNNER=0"),
        (bool(missing), f"vLLM {compat.version()} lacks {', '.join(missing)}"),
        (config.speculative_config is not None, "speculative decoding is not supported by this release"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is not supported by this release"),
        (parallel.tensor_parallel_size > 1, "tensor parallelism is not supported by this release"),
        (config.model_config.is_encoder_decoder, "encoder-decoder models are not supported by this release"),
        (config.model_config.runner_type != "generate", "the model does not generate"),
    )
    return next((f"unavailable: {reason}" for failed, reason in checks if failed), None)


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
