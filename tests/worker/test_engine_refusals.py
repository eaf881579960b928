"""Set-ups that cannot run here, or whose steps we do not understand: the reason that their users are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from tracer.worker import compat
from tracer.worker.hooks import _no_attention, _unavailable
from tracer.worker.layers import _refusal, _sharing_refusal

CONFIG: dict[str, Any] = {
    "parallel_config.pipeline_parallel_size": 1, "parallel_config.nnodes_within_dp": 1,
    "parallel_config.world_size": 1, "parallel_config.data_parallel_size": 1,
    "parallel_config.distributed_executor_backend": "mp", "parallel_config.prefill_context_parallel_size": 1,
    "parallel_config.decode_context_parallel_size": 1, "parallel_config.use_ubatching": False,
    "model_config.is_encoder_decoder": False, "model_config.runner_type": "generate",
    "model_config.rswa_window": None, "model_config.hf_text_config": transformers.LlamaConfig(),
    "cache_config.kv_sharing_fast_prefill": False,
}  # fmt: skip


def worker(**changes: Any) -> Any:
    """What `_unavailable` looks at of a V1 worker; `changes` to CONFIG."""
    config = SimpleNamespace()
    for name, value in (CONFIG | changes).items():
        group, _, last = name.rpartition(".")
        owner = config.__dict__.setdefault(group, SimpleNamespace()) if group else config
        setattr(owner, last, value)
    runner = SimpleNamespace(**dict.fromkeys(compat.V1_ATTRIBUTES))
    return SimpleNamespace(vllm_config=config, model_runner=runner, use_v2_model_runner=False)


def kernel(window: int = -1) -> Any:
    """What is looked at of its implementation."""
    return SimpleNamespace(sliding_window=window, scale=1.0, num_heads=1, num_kv_heads=1, head_size=32)


def attention(**changes: Any) -> Any:
    """What is looked at of a layer of vLLM's own class, on the CPU's backend."""
    layer = compat.attention_class().__new__(compat.attention_class())
    torch.nn.Module.__init__(layer)
    facts = {
        "attn_type": "decoder", "impl": kernel(), "dtype": torch.float32, "kv_sharing_target_layer_name": None,
        "kv_cache_dtype": "auto", "use_alibi_sqrt": False, "use_mm_prefix": False, "sliding_window": None,
        "kv_cache": torch.zeros(2, 1, 32, 64), "attn_backend": CPUAttentionBackend,
    }  # fmt: skip
    layer.__dict__.update(facts | changes)
    return layer


def test_a_plain_set_up_is_not_refused() -> None:
    assert _unavailable(worker()) is None
    assert _no_attention(worker().vllm_config) is None
    assert _refusal(attention()) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel_config.pipeline_parallel_size": 2}, "pipeline parallelism is not supported"),
        ({"parallel_config.nnodes_within_dp": 2}, "the engine's ranks are on several machines"),
        (
            {"parallel_config.world_size": 2, "parallel_config.distributed_executor_backend": "ray"},
            "several ranks under the executor 'ray'",
        ),
        ({"parallel_config.prefill_context_parallel_size": 2}, "context parallelism is not supported"),
        ({"parallel_config.decode_context_parallel_size": 2}, "each rank holds a part of every request's keys"),
        ({"parallel_config.use_ubatching": True}, "dual-batch overlap is not supported"),
        ({"cache_config.kv_sharing_fast_prefill": True}, "KV-sharing fast prefill"),
        ({"model_config.is_encoder_decoder": True}, "encoder-decoder models are not supported"),
        ({"model_config.runner_type": "pooling"}, "the model does not generate"),
    ],
)
def test_a_set_up_that_is_not_understood_is_refused(changes: dict[str, Any], says: str) -> None:
    engine = worker(**changes)
    reason = _unavailable(engine)
    assert reason is None or reason.startswith("unavailable: ")
    assert says in (reason or _no_attention(engine.vllm_config) or "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_cache_dtype": "nvfp4"}, "KV cache of type nvfp4"),
        ({"kv_cache_dtype": "bfloat16", "dtype": torch.bfloat16}, "beside queries of torch.bfloat16"),
        ({"use_mm_prefix": True}, "bidirectional attention over image tokens"),
        ({"use_alibi_sqrt": True}, "square-root ALiBi"),
        ({"attn_type": "encoder_decoder"}, "is not causal"),
        ({"sliding_window": 8}, "its kernel's sliding window is not the layer's"),
        ({"kv_cache": [torch.zeros(1)]}, "its KV cache is not one tensor"),
    ],
)
def test_a_layer_that_is_not_understood_is_refused(changes: dict[str, Any], says: str) -> None:
    assert says in (_refusal(attention(**changes)) or "")


@pytest.mark.parametrize(
    ("writer", "says"),
    [
        ({}, None),
        ({"kv_cache": torch.zeros(2, 1, 32, 64)}, "keeps its keys elsewhere"),
        ({"kv_cache_dtype": "nvfp4"}, "cannot be captured either"),
        (
            {"sliding_window": 8, "impl": kernel(8)},
            "another sliding window",
        ),
    ],
)
def test_a_layer_that_reads_anothers_keys_is_captured_only_if_they_are_the_same(
    writer: dict[str, Any], says: str | None
) -> None:
    cache = torch.zeros(2, 1, 32, 64)
    modules = {"first": attention(**{"kv_cache": cache} | writer)}
    modules["second"] = attention(kv_cache=cache, kv_sharing_target_layer_name="first")
    reason = _sharing_refusal(modules["second"], modules)
    assert reason is None if says is None else says in (reason or "")
    assert _sharing_refusal(modules["first"], modules) is None
    assert "is not among the layers" in (_sharing_refusal(modules["second"], {"second": modules["second"]}) or "")
