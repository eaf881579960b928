"""What Transformers' eager attention computes on the same weights and tokens: the oracle, free of our code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

__all__ = ["Oracle", "oracle"]


@dataclass(frozen=True, slots=True)
class Oracle:
    """One forward pass over prompt and answer."""

    attention: Any
    """float32 [layer, head, query, key]."""
    logits: Any
    """float32 [position, vocab]: row i predicts token i + 1."""


def oracle(path: Path, tokens: list[int]) -> Oracle:
    """Eager attention and logits for `tokens` in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    for module in model.modules():
        if type(module).__name__ == "BloomGelu":
            # vLLM's Bloom uses the exact GELU, Transformers' an approximation: the models differ, not the attention.
            module.forward = torch.nn.functional.gelu
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_attentions=True, use_cache=False)
    return Oracle(np.stack([layer[0].numpy() for layer in out.attentions]), out.logits[0].numpy())
