"""What each attention-like key of a model's configuration does to the weights: nothing that we miss, or a refusal.

The weights that we compute are those of vLLM's plain `Attention` layer: queries and keys as they reach the kernel, and
the terms that `layers` and `kernel_facts` read from it. This table is the check from the other side. A key of the text
configuration whose name looks like attention must be known here; one that is not known and is switched on refuses
attention of the whole model, by name, while logits are captured as ever. So a new kind of attention is met by a
refusal even where vLLM happens to build it from a plain layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["HARMLESS", "LAYER_TYPES", "LOOKS_LIKE_ATTENTION", "REFUSED", "config_refusal"]

LOOKS_LIKE_ATTENTION: Final = re.compile(
    r"attn|attention|window|swa(_|$)|softcap|soft_cap|logit_cap|capping|softmax|rope|rotary|sink|alibi|qk|q_k|clip_qkv"
    r"|(^|_)kv(_|$)|chunk|scal(e|ing)|multiplier|temper|sparse|(^|_)index|differential|mla(_|$)|lora_rank|causal"
    r"|bidirect|layer_type|layers_block_type|block_config|relative|prefix|local|global|compress|query|(^|_)key(_|$)"
    r"|(^|_)rel(_|$)|(^|_)tau(_|$)|log_?n(_|$)|position_embedding_type"
)
"""Names that say something about attention, or might: rather too many than too few, all are in the table."""


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


HARMLESS: Final[dict[str, frozenset[str]]] = {
    "acts on queries and keys before they reach the kernel, where they are read": _keys("""
        rope_parameters rope_scaling rope_theta rope_interleave rope_ratio original_rope rope_head_dim rotary rotary_dim
        rope_local_base_freq rope_local_theta layer_rope_theta swa_rope_parameters swa_rope_theta partial_rotary_factor
        partial_rotary_factors attn_rotary_emb no_rope_layers no_rope_layer_interval use_rope_layers mrope_section
        use_mem_rope position_embedding_type qk_layernorm qk_norm use_qk_norm query_key_norm qk_norm_type clip_qkv
        attention_bias attn_qkv_bias attn_bias qkv_bias use_qkv_bias add_qkv_bias interleaved_qkv
        use_shared_attention_adapter key_multiplier attention_in_multiplier attn_temperature_tuning attn_scale
        floor_scale log_scaling_alpha log_scaling_n_floor llama_4_scaling scale_query_by qk_scale_factor
        attention_k_eq_v kv_channels
    """),
    "is a term of the layer or of its kernel, which is read there": _keys("""
        attention_multiplier query_pre_attn_scalar scale_attn_weights scale_attn_by_inverse_layer_idx
        apply_query_key_layer_scaling attn_logit_softcapping logits_soft_cap alibi attention_sinks
        swa_attention_sink_enabled add_swa_attention_sink_bias add_full_attention_sink_bias sliding_window
        sliding_windows sliding_window_size sliding_window_pattern _sliding_window_pattern interleaved_sliding_window
        use_sliding_window max_window_layers prefix_dense_sliding_window_pattern loop_window_size
        global_attn_every_n_layers local_layer_ids full_attention_layer_ids layer_types attention_type attn_type
        num_attention_heads num_key_value_heads num_kv_heads multi_query multi_query_attention n_head_kv kv_n_heads
        num_attention_groups num_attention_heads_per_layer multi_query_group_num num_query_groups
        attention_other_setting attention_head_dim
        qk_head_dim swa_head_dim swa_v_head_dim swa_num_attention_heads swa_num_key_value_heads qk_nope_dim
        num_sliding_attention_heads
    """),
    "computes the same weights in another precision, order or kernel": _keys("""
        attention_softmax_in_fp32 scale_attention_softmax_in_fp32 reorder_and_upcast_attn _attn_implementation
        _attn_implementation_internal attn_implementation attn_impl kv_cache_scheme
    """),
    "acts on the values or on the layer's output, after the weights": _keys("""
        attention_dropout attn_pdrop attention_probs_dropout_prob attn_dropout attention_value_scale
        attention_output_gate attn_output_gate use_attn_output_gate use_head_wise_attn_gate attention_gate_func
        attention_out_multiplier attention_out_bias parallel_attn num_ln_in_parallel_attn attention_hidden_size
        gated_attention_proj_granularity_type attn_res_block_size
    """),
    "belongs to layers of a class of its own, which are refused by that class": _keys("""
        attention_chunk_size kv_lora_rank q_lora_rank o_lora_rank qk_rope_head_dim qk_nope_head_dim qk_rope_dim
        mla_use_nope mla_use_output_gate mla_use_qk_norm mla_scale_kv_lora mla_scale_q_lora gated_mla
        linear_attn_config linear_key_head_dim linear_num_key_heads is_linear_attn
        linear_attn_alpha_factor linear_attn_beta_factor full_attn_alpha_factor full_attn_beta_factor
        layers_block_type mtp_layers_block_type attn_layer_offset attn_layer_period attn_layer_indices
        full_attn_idxs chunk_size mamba_chunk_size num_kv_shared_layers add_cross_attention
        param_sink_number param_sink_of_head_dim param_sink_scalar param_sink_with_value learnable_sink
        learnable_sink_init
    """),
    "is not about attention weights": _keys("""
        final_logit_softcapping logits_scaling logit_scale lm_head_multiplier output_multiplier
        logits_mup_width_multiplier mup_scale_factor soft_logits_capping soft_logits_capping_logits embedding_multiplier
        embedding_scale scale_emb scale_depth layer_scale residual_multiplier mlp_multipliers ssm_in_multiplier
        ssm_multipliers ssm_out_multiplier rescale_prenorm_residual time_step_scale routed_scaling_factor
        moe_routed_scaling_factor moe_router_scaling_factor router_scaling_factor route_scale
        moe_router_logit_softcapping mlp_layer_types mtp_layer_types mtp_sliding_windows mtp_local_layer_ids
        mtp_loss_scaling_factor num_local_experts shared_expert_sink hc_sinkhorn_iters decoder_sparse_step
        altup_correct_scale chunk_size_feed_forward prefix_dense_intermediate_size prefix_projection
        mtp_mlp_layer_types moe_layer_start_index moe_layer_end_index block_ffn_dim_multiplier output_attentions
        block_configs image_token_index audio_token_index video_token_index deepstack_visual_indexes
        use_global_scale is_scale_e8m0 temperature
    """),
}  # fmt: skip
"""What the keys of each group do, and why the weights are right all the same."""

REFUSED: Final[dict[str, str]] = {
    "use_bidirectional_attention": "tokens attend to later ones",
    "prefix_lm": "tokens of the prompt attend to later ones",
    "prefix_attn": "tokens of the prompt attend to later ones",
    "mm_prefix_clamp_sliding_window": "image tokens attend to later ones",
    "mm_prefix_span_leading_pad_modulus": "image tokens attend to later ones",
    "rswa_window": "reference sliding window attention",
    "dual_chunk_attention_config": "keys of other chunks meet a query at positions of their own",
    "d_rel": "relative positions add to the scores inside the kernel",
    "rel_extent": "relative positions add to the scores inside the kernel",
    "relative_attention_num_buckets": "relative positions add to the scores inside the kernel",
    "relative_attention_max_distance": "relative positions add to the scores inside the kernel",
    "attn_uses_sequence_id": "tokens of other sequences are masked",
    "sparse_attention_config": "an indexer chooses the keys of each query",
    "index_topk": "an indexer chooses the keys of each query",
    "index_topk_blocks": "an indexer chooses the keys of each query",
    "index_topk_freq": "an indexer chooses the keys of each query",
    "index_topk_pattern": "an indexer chooses the keys of each query",
    "index_skip_topk_offset": "an indexer chooses the keys of each query",
    "index_block_size": "an indexer chooses the keys of each query",
    "index_local_blocks": "an indexer chooses the keys of each query",
    "index_head_dim": "an indexer chooses the keys of each query",
    "index_n_heads": "an indexer chooses the keys of each query",
    "index_kpool": "an indexer chooses the keys of each query",
    "index_kpool_always_select_tail": "an indexer chooses the keys of each query",
    "use_index_cache": "an indexer chooses the keys of each query",
    "indexer_budget": "an indexer chooses the keys of each query",
    "indexer_compress_ratio": "an indexer chooses the keys of each query",
    "indexer_head_dim": "an indexer chooses the keys of each query",
    "indexer_kv_heads": "an indexer chooses the keys of each query",
    "indexer_n_heads": "an indexer chooses the keys of each query",
    "indexer_rope_interleave": "an indexer chooses the keys of each query",
    "indexer_types": "an indexer chooses the keys of each query",
    "compress_rates": "keys are compressed before the kernel",
    "compress_ratios": "keys are compressed before the kernel",
    "compress_rope_theta": "keys are compressed before the kernel",
}
"""Keys that change the weights in a way that no layer shows, refused where they are switched on."""
ALLOWED: Final = frozenset({("use_bidirectional_attention", "vision")})
"""(key of REFUSED, value) that changes nothing for text: layers that see images are refused one by one."""

LAYER_TYPES: Final = frozenset({
    "full_attention", "attention", "sliding_attention", "global", "local", "full", "sliding",
    "chunked_attention", "window_attention", "indexed_attention", "compressed_sparse_attention",
    "heavily_compressed_attention", "deepseek_sparse_attention", "qwen_sparse_attention", "minimax_m3_sparse",
    "linear_attention", "conv", "moe", "mlp", "dense", "sparse", "mamba", "mamba2", "hybrid", "hybrid_sliding",
    "recurrent",
})  # fmt: skip
"""Values of `layer_types`: full and sliding ones are plain layers, all others have classes of their own in vLLM."""

KNOWN: Final = frozenset().union(*HARMLESS.values())


def config_refusal(config: Any) -> str | None:
    """Why attention of a model with this text configuration (Transformers' `PreTrainedConfig`) cannot be captured.

    None if every key that looks like attention is known and harmless, or switched off.
    """
    for key, value in _attention_keys(config.to_dict()):
        if isinstance(value, str) and (key, value) in ALLOWED:
            continue
        if key in REFUSED:
            return f"attention config key {key!r}: {REFUSED[key]}"
        if key not in KNOWN:
            return f"attention config key {key!r} is not known to this release"
        if key == "layer_types":
            unknown = sorted({str(kind) for kind in value} - LAYER_TYPES)
            if unknown:
                return f"layer type {unknown[0]!r} is not known to this release"
    if config.to_dict().get("is_causal", True) is False:
        return "attention config key 'is_causal': tokens attend to later ones"
    return None


def _attention_keys(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys that look like attention and are switched on, those inside `attn_config` too."""
    for key, value in config.items():
        if key in ("attn_config", "attention") and isinstance(value, Mapping):
            yield from _attention_keys(value)
        elif key != "is_causal" and LOOKS_LIKE_ATTENTION.search(key) and _is_on(value):
            yield key, value


def _is_on(value: Any) -> bool:
    """False for what configurations say where a feature is absent: nothing, False, zero or empty."""
    return bool(value) if not hasattr(value, "to_dict") else True
