"""Tiny checkpoints for one engine feature each: adapters, quantised weights, shared caches, images, an encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.integration.models import FAMILIES, VOCAB, make_model

__all__ = [
    "IMAGE",
    "IMAGE_TOKENS",
    "int8_oracle",
    "make_adapter",
    "make_blip2",
    "make_merged",
    "make_quantised",
    "make_sharing",
    "make_whisper",
]

RANK: Final = 8
SCALING: Final = 2.0
ADAPTED: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUP: Final = 32
"""Input channels that share a scale where weights have 4 bits."""
IMAGE: Final = VOCAB
"""Token ID that stands for each position of an image."""
IMAGE_TOKENS: Final = 16


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(path / "model.safetensors"))


def _projections(path: Path) -> dict[str, torch.Tensor]:
    """Weight [out, in] of every linear layer inside the decoder's layers."""
    return {name: weight for name, weight in _weights(path).items() if name.split(".")[-2] in ADAPTED}


def make_adapter(base: Path, root: Path, seed: int) -> Path:
    """A random LoRA adapter of `base` in the format of PEFT."""
    path = root / f"{base.name}-lora-{seed}"
    if path.exists():
        return path
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in _projections(base).items():
        stem = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=generator) * 0.1
        tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], RANK, generator=generator) * 0.1
    save_file(tensors, path / "adapter_model.safetensors")
    facts = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": SCALING * RANK, "bias": "none",
        "target_modules": list(ADAPTED),
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(facts))
    return path


def make_merged(base: Path, adapter: Path) -> Path:
    """`base` with the adapter's products added to its weights: what Transformers loads as the oracle."""
    path = adapter.with_name(adapter.name + "-merged")
    if path.exists():
        return path
    weights, tensors = _weights(base), load_file(adapter / "adapter_model.safetensors")
    for name in _projections(base):
        stem = "base_model.model." + name.removesuffix(".weight")
        weights[name] += SCALING * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    return _copy(base, path, weights)


def _copy(base: Path, path: Path, weights: dict[str, torch.Tensor], **config: Any) -> Path:
    """`base` with other weights and with additions to its configuration."""
    path.mkdir()
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, path / "model.safetensors", {"format": "pt"}
    )
    facts = json.loads((base / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(facts))
    return path


def make_quantised(bits: int, root: Path) -> tuple[Path, Path]:
    """(checkpoint as `compressed-tensors` stores it, the same weights dequantised).

    bits: 8 for int8 weights per channel with int8 activations per token, 4 for weights in groups alone.
    """
    base = make_model("llama", root)
    path, plain = root / f"llama-w{bits}", root / f"llama-w{bits}-plain"
    if path.exists():
        return path, plain
    stored, dequantised = _weights(base), _weights(base)
    for name, weight in _projections(base).items():
        stem = name.removesuffix(".weight")
        grouped = weight.view(weight.shape[0], -1, GROUP if bits == 4 else weight.shape[1])
        scale = grouped.abs().amax(dim=2, keepdim=True) / (2 ** (bits - 1) - 1)
        whole = (grouped / scale).round().view_as(weight).to(torch.int8)
        dequantised[name] = (whole.view_as(grouped).float() * scale).view_as(weight)
        stored[f"{stem}.weight_scale"] = scale.squeeze(2)
        if bits == 8:
            stored[name] = whole
        else:
            del stored[name]
            stored[f"{stem}.weight_packed"] = _pack(whole)
            stored[f"{stem}.weight_shape"] = torch.tensor(weight.shape)
    return _copy(base, path, stored, quantization_config=_scheme(bits)), _copy(base, plain, dequantised)


def _pack(whole: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit numbers, shifted to be positive, in each int32 along the input channels."""
    shifted = (whole.to(torch.int64) + 8).view(whole.shape[0], -1, 8)
    word = sum(shifted[:, :, place] << 4 * place for place in range(8))
    assert isinstance(word, torch.Tensor)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _scheme(bits: int) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
        "strategy": "group" if bits == 4 else "channel", "group_size": GROUP if bits == 4 else None,
    }  # fmt: skip
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if bits == 8 else None}
    return {
        "quant_method": "compressed-tensors", "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed", "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


def int8_oracle(plain: Path) -> Any:
    """A Transformers model whose linear layers round their inputs to int8 per token, as the scheme says."""
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager")
    for name, module in model.named_modules():
        if name.split(".")[-1] in ADAPTED:
            module.register_forward_pre_hook(_round_inputs)
    return model


def _round_inputs(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    scale = inputs[0].abs().amax(dim=-1, keepdim=True) / 127
    return ((inputs[0] / scale).round() * scale,)


def make_sharing(root: Path) -> Path:
    """Gemma 3n: the last two of four layers read the keys of the first two, one of them through a window."""
    path = root / "gemma3n"
    if path.exists():
        return path
    torch.manual_seed(5)
    config = transformers.Gemma3nTextConfig(
        vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=128, hidden_size_per_layer_input=32,
        intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=512, sliding_window=24, num_kv_shared_layers=2, laurel_rank=8, altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"] * 2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.08)
            elif "q_norm" in name:
                parameter.fill_(0.3)
    model.save_pretrained(path)
    return path


def make_blip2(tokenized: Path, root: Path) -> Path:
    """A vision tower, a Q-Former and the tiny OPT; an image is `IMAGE_TOKENS` positions before the text."""
    path = root / "blip-2"
    if path.exists():
        return path
    torch.manual_seed(5)
    common = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**common, image_size=32, patch_size=8).to_dict(),
        qformer_config=transformers.Blip2QFormerConfig(**common, vocab_size=64, encoder_hidden_size=64).to_dict(),
        text_config={**FAMILIES["opt"]().to_dict(), "vocab_size": VOCAB + 32},
        num_query_tokens=IMAGE_TOKENS, image_token_index=IMAGE,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenized)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    images = transformers.BlipImageProcessorPil(size={"height": 32, "width": 32})
    transformers.Blip2Processor(images, tokenizer, num_query_tokens=IMAGE_TOKENS).save_pretrained(path)
    return path


def make_whisper(tokenized: Path, root: Path) -> Path:
    """An encoder of two layers and a decoder of two."""
    path = root / "whisper"
    if path.exists():
        return path
    torch.manual_seed(5)
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=80, max_source_positions=1500,
        max_target_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).float().save_pretrained(path)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(path)
    for file in tokenized.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path
