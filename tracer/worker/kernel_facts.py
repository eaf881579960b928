"""What the attention kernels of vLLM's backends hold, and a refusal for one that holds more.

A layer's `impl` is where a term of the softmax can hide: a new window, a cap, a bias. Every attribute that the
implementations of vLLM 0.30 to 0.33 set is known here by name; any other that is switched on refuses the layer.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["KERNEL_ATTRIBUTES", "kernel_refusal"]

SOFTMAX: Final = frozenset({
    "num_heads", "num_kv_heads", "head_size", "scale", "sliding_window", "logits_soft_cap", "alibi_slopes", "sinks",
    "attn_type", "kv_cache_dtype", "kv_sharing_target_layer_name", "chunk_lookback", "use_alibi_sqrt",
})  # fmt: skip
"""Terms that `layers` reads or refuses by their own name."""
NEEDED: Final = ("num_heads", "num_kv_heads", "head_size", "scale", "sliding_window")
"""Terms that every implementation states; one that does not keeps them where we do not look."""
HOW: Final = frozenset({
    # which kernel runs, how work is split over threads, ranks and warps; caches of scales of quantised keys
    "num_queries_per_kv", "is_fp8_kv_cache", "use_zentorch_sdpa", "vllm_flash_attn_version", "batch_invariant_enabled",
    "fa4_hd256", "use_td", "unified_attention", "fp8_dtype", "supports_quant_query_input", "block_m", "block_n",
    "_is_per_token_head_quant", "_k_scale_cache", "_v_scale_cache", "_kv_quant_mode", "_set_kv_ptr_range",
    # context parallelism, which `hooks` refuses
    "dcp_world_size", "dcp_rank", "pcp_world_size", "pcp_rank", "total_cp_world_size", "total_cp_rank", "dcp_combine",
    "_dcp_dtype", "_dcp_max_num_tokens", "need_to_return_lse_for_decode",
    # ranges of image tokens, empty without them; layers of models that have them are refused
    "mm_prefix_range",
})  # fmt: skip
"""Attributes that leave the weights as they are."""
KERNEL_ATTRIBUTES: Final = SOFTMAX | HOW
"""Every attribute of an implementation that this release knows."""
MASKS: Final = ("logical_mask_mod", "score_mod", "block_sparsity_hint")
"""Functions on a layer with which FlexAttention lets a model choose its own mask."""


def kernel_refusal(module: Any) -> str | None:
    """Why the weights of this attention layer (vLLM's `Attention`) may not be what we would compute, or None."""
    impl = module.impl
    own = next((name for name in MASKS if getattr(module, name, None) is not None), None)
    if own is not None:
        return f"it has a mask of its own, {own}"
    absent = next((name for name in NEEDED if not hasattr(impl, name)), None)
    if absent is not None:
        return f"its kernel {type(impl).__name__} does not state {absent!r}"
    unknown = sorted(name for name, value in vars(impl).items() if name not in KERNEL_ATTRIBUTES and _is_on(value))
    if unknown:
        return f"its kernel {type(impl).__name__} has {unknown[0]!r}, which is not known to this release"
    return None


def _is_on(value: Any) -> bool:
    """False for what vLLM's options say when they are off: None, False, 0 and -1."""
    return not (value is None or (isinstance(value, (bool, int, float)) and value in (0, -1)))
