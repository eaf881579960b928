"""What Transformers' eager attention computes on the same weights and tokens: the oracle, free of our code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

__all__ = ["Oracle", "greedy", "oracle"]


@dataclass(frozen=True, slots=True)
class Oracle:
    """One forward pass over prompt and answer."""

    attention: Any
    """float32 [layer, head, query, key]."""
    logits: Any
    """float32 [position, vocab]: row i predicts token i + 1."""


def oracle(path: Path, tokens: list[int]) -> Oracle:
    """Eager attention and logits for `tokens` in float32."""
    with _eager(path) as model:
        return _forward(model, tokens)


def greedy(path: Path, tokens: list[int], count: int) -> tuple[Oracle, list[int]]:
    """The greedy answer of `count` tokens, and the pass over prompt and answer.

    For models that vLLM runs as Transformers' own class: it compiles that class for itself, so the oracle goes first.
    """
    with _eager(path) as model:
        whole = list(tokens)
        for _ in range(count):
            whole.append(int(_forward(model, whole).logits[-1].argmax()))
        return _forward(model, whole), whole[len(tokens) :]


def _forward(model: Any, tokens: list[int]) -> Oracle:
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_attentions=True, use_cache=False)
    layers = [layer[0].numpy() for layer in out.attentions if layer is not None]
    return Oracle(np.stack(layers), out.logits[0].numpy())


@contextmanager
def _eager(path: Path) -> Iterator[Any]:
    """The model, where vLLM and Transformers mean different models brought to what vLLM computes."""
    config = transformers.AutoConfig.from_pretrained(path)
    if config.model_type in ("cohere2", "cohere2_moe"):
        # vLLM's windows hold the query's own token beside `sliding_window` earlier ones, as these models were trained.
        config.sliding_window += 1
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    for module in model.modules():
        if type(module).__name__ == "BloomGelu":
            # vLLM's Bloom uses the exact GELU, Transformers' an approximation: the models differ, not the attention.
            module.forward = torch.nn.functional.gelu
        elif type(module).__name__ == "XIELUActivation":
            # vLLM keeps the two learned numbers of this activation in bfloat16, whatever the model's dtype.
            module.to(torch.bfloat16)
        elif type(module).__name__ == "FalconAttention" and config.alibi:
            # Transformers' mask holds Falcon's ALiBi already (as its other kernels want it); eager adds it once more.
            module.register_forward_pre_hook(_without_alibi, with_kwargs=True)
    with _weights_with_sinks(sys.modules[type(model).__module__]):
        yield model


def _without_alibi(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"alibi": torch.zeros_like(kwargs["alibi"])}


@contextmanager
def _weights_with_sinks(modeling: Any) -> Iterator[None]:
    """Granite's models with sinks scale the layer's output by the sink's share and return weights without it."""
    if not modeling.__name__.endswith("_swa"):
        yield
        return
    plain = modeling.eager_attention_forward

    def scaled(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any) -> Any:
        output, weights = plain(module, query, key, value, mask, scaling, **rest)
        scores = query @ modeling.repeat_kv(key, module.num_key_value_groups).transpose(2, 3) * scaling + mask
        share = (torch.logsumexp(scores, dim=-1) - module.sinks.view(1, -1, 1)).sigmoid()
        return output, weights * share.unsqueeze(-1)

    modeling.eager_attention_forward = scaled
    try:
        yield
    finally:
        modeling.eager_attention_forward = plain
