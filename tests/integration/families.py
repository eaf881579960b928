"""One line per model family: the smallest configuration that shows what is special about its attention.

`TINY` is what every family takes of it that has a key of that name; a line says the rest. Alternating families get one
layer of each kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["FAMILIES", "HYBRIDS"]

TINY: Final[dict[str, Any]] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "tie_word_embeddings": False, "sliding_window": 24,
    # experts, under every name that families give them
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    # GPT-2 and its children
    "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 128,
}  # fmt: skip
BOTH: Final = ["sliding_attention", "full_attention"]
LLAMA3: Final = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN: Final = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR: Final = ["linear_attention", "full_attention"]


def tiny(kind: str, without: tuple[str, ...] = (), **extra: Any) -> Callable[[], Any]:
    """Maker of a configuration of Transformers' model type `kind`."""

    def make() -> Any:
        family = CONFIG_MAPPING[kind]
        keys = {field.name for field in dataclasses.fields(family)} - set(without)
        return family(**{key: value for key, value in TINY.items() if key in keys} | extra)

    return make


FAMILIES: Final[dict[str, Callable[[], Any]]] = {
    "afmoe": tiny("afmoe", layer_types=BOTH, num_dense_layers=1, num_shared_experts=1, score_func="sigmoid",
                  route_norm=True, n_group=1, topk_group=1),
    "apertus": tiny("apertus", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "arcee": tiny("arcee"),
    "bitnet": tiny("bitnet"),
    "cohere": tiny("cohere", tie_word_embeddings=True),
    "cohere2": tiny("cohere2", layer_types=BOTH, tie_word_embeddings=True),
    "cohere2_moe": tiny("cohere2_moe", layer_types=BOTH, tie_word_embeddings=True),
    "cwm": tiny("cwm", layer_types=BOTH),
    "dots1": tiny("dots1", layer_types=["full_attention"] * 2),
    "ernie4_5": tiny("ernie4_5"),
    "ernie4_5_moe": tiny("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1),
    "exaone4": tiny("exaone4", layer_types=BOTH),
    "exaone_moe": tiny("exaone_moe", layer_types=BOTH, num_shared_experts=1),
    "falcon": tiny("falcon"),
    "falcon_alibi": tiny("falcon", alibi=True, multi_query=False, bias=True, parallel_attn=False),
    "falcon_new": tiny("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "flex_olmo": tiny("flex_olmo"),
    "gemma": tiny("gemma"),
    "gemma3": tiny("gemma3_text", layer_types=BOTH),
    "gemma3n": tiny("gemma3n_text", layer_types=BOTH * 2, num_hidden_layers=4, num_kv_shared_layers=2, laurel_rank=8,
                    vocab_size_per_layer_input=512, hidden_size_per_layer_input=32, tie_word_embeddings=True),
    "gemma4": tiny("gemma4_text", ("num_experts", "moe_intermediate_size"), layer_types=BOTH,
                   vocab_size_per_layer_input=512, hidden_size_per_layer_input=32, global_head_dim=32),
    "glm": tiny("glm"),
    "glm4": tiny("glm4"),
    "glm4_moe": tiny("glm4_moe", head_dim=32),
    "gpt2": tiny("gpt2"),
    "gpt_bigcode": tiny("gpt_bigcode"),
    "gpt_neox": tiny("gpt_neox"),
    "gptj": tiny("gptj", rotary_dim=16),
    "granite": tiny("granite", attention_multiplier=0.25, logits_scaling=2.0, residual_multiplier=0.5,
                    embedding_multiplier=3.0),
    "granite_swa": tiny("granite_swa", layer_types=BOTH, attention_multiplier=0.25),
    "granitemoe": tiny("granitemoe", attention_multiplier=0.25),
    "granitemoe_swa": tiny("granitemoe_swa", layer_types=BOTH, attention_multiplier=0.25),
    "granitemoeshared": tiny("granitemoeshared", attention_multiplier=0.25),
    "helium": tiny("helium"),
    "hunyuan": tiny("hunyuan_v1_dense"),
    "hunyuan_moe": tiny("hunyuan_v1_moe", moe_topk=2),
    "hyperclovax": tiny("hyperclovax"),
    "jais2": tiny("jais2"),
    "llama3_rope": tiny("llama", rope_parameters=LLAMA3),
    "llama_yarn": tiny("llama", rope_parameters=YARN),
    "mellum": tiny("mellum", layer_types=BOTH, mlp_layer_types=["dense", "sparse"]),
    "minicpm": tiny("granite", embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0,
                    attention_multiplier=32**-0.5, scale_emb=3.0, scale_depth=0.5 * 2**0.5, dim_model_base=64),
    "minicpm3": tiny("minicpm3", kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
                     v_head_dim=32, num_key_value_heads=4, dim_model_base=64, scale_emb=2),
    "ministral": tiny("ministral", layer_types=BOTH),
    "ministral3": tiny("ministral3"),
    "mixtral": tiny("mixtral"),
    "nanochat": tiny("nanochat"),
    "nemotron": tiny("nemotron"),
    "olmo": tiny("olmo", clip_qkv=1.5),
    "olmo2": tiny("olmo2"),
    "olmo3": tiny("olmo3", layer_types=BOTH),
    "olmoe": tiny("olmoe"),
    "persimmon": tiny("persimmon"),
    "phi": tiny("phi"),
    "phi3": tiny("phi3"),
    "qwen2": tiny("qwen2", ("sliding_window",)),
    "qwen2_moe": tiny("qwen2_moe", ("sliding_window",)),
    "qwen3_moe": tiny("qwen3_moe"),
    "seed_oss": tiny("seed_oss"),
    "smollm3": tiny("smollm3", no_rope_layers=[1, 0]),
    "solar_open": tiny("solar_open"),
    "stablelm": tiny("stablelm"),
    "starcoder2": tiny("starcoder2"),
    "vaultgemma": tiny("vaultgemma", layer_types=BOTH, attn_logit_softcapping=5.0, final_logit_softcapping=10.0),
}  # fmt: skip
"""Families whose layers are all captured, beside those in `models`."""

HYBRIDS: Final[dict[str, Callable[[], Any]]] = {
    "granitemoehybrid": tiny("granitemoehybrid", layer_types=LINEAR, position_embedding_type="rope", mamba_n_heads=8,
                             mamba_d_head=32, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=16),
    "llama4": tiny("llama4_text", num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=2,
                   intermediate_size_mlp=128, attention_chunk_size=128, no_rope_layers=[1, 0]),
}  # fmt: skip
"""Families of which some layers are refused."""
REFUSED_LAYERS: Final = {
    "granitemoehybrid": "MambaMixer2 is not causal softmax attention",
    "llama4": "ChunkedLocalAttention is not causal softmax attention",
}
"""What a capture says of those layers."""

ENGINE_CLASS: Final = {"minicpm": "MiniCPMForCausalLM"}
"""Families without a class in Transformers, written as an equal model of it: MiniCPM is Granite by other names."""
