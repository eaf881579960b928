"""Tiny random-weight models of real families, made with Transformers: what the engine and the oracle both load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from tests.integration.families import ENGINE_CLASS, HYBRIDS
from tests.integration.families import FAMILIES as MORE

__all__ = ["FAMILIES", "make_model"]

VOCAB: Final = 512
LAYERS: Final = 3


def _common(**extra: Any) -> dict[str, Any]:
    base = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return base | extra


def _gemma2() -> Any:
    return transformers.Gemma2Config(
        **_common(
            attn_logit_softcapping=5.0,
            final_logit_softcapping=10.0,
            sliding_window=24,
            query_pre_attn_scalar=24,
            tie_word_embeddings=True,
        )
    )


def _gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **_common(num_local_experts=4, num_experts_per_tok=2, sliding_window=24, tie_word_embeddings=False)
    )


def _opt() -> Any:
    return transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=128, ffn_dim=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=512, word_embed_proj_dim=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def _bloom() -> Any:
    return transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=128, n_layer=LAYERS, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )


FAMILIES: Final[dict[str, Callable[[], Any]]] = {
    "llama": lambda: transformers.LlamaConfig(**_common()),
    "qwen3": lambda: transformers.Qwen3Config(**_common()),
    "gemma2": _gemma2,
    "gpt_oss": _gpt_oss,
    "mistral": lambda: transformers.MistralConfig(**_common(sliding_window=24)),
    "opt": _opt,
    "bloom": _bloom,
} | MORE


def make_model(family: str, root: Path) -> Path:
    """A checkpoint of that family under `root`, float32, with weights large enough to make attention uneven."""
    path = root / family
    if not path.exists():
        torch.manual_seed(11)
        config = (FAMILIES | HYBRIDS)[family]()
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and not name.endswith("correction_bias"):
                    parameter.normal_(0.0, _spread(family))
                elif "sinks" in name:
                    parameter.normal_(0.0, 1.0)
        model.save_pretrained(path)
        if family in ENGINE_CLASS:
            _name_class(path / "config.json", ENGINE_CLASS[family])
    return path


def _spread(family: str) -> float:
    """Standard deviation of the weights: as large as the differences between the experts' kernels allow."""
    if family == "gpt_oss":
        return 0.08
    return 0.1 if family in MORE or family in HYBRIDS else 0.15


def _name_class(path: Path, architecture: str) -> None:
    """Have vLLM load the checkpoint as a class that Transformers does not have."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"architectures": [architecture]}), encoding="utf-8")
