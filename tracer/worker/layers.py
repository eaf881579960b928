"""Which attention layers the engine has, how each turns queries and keys into weights, and which are refused.

A layer is captured only if everything about it is known: its class, its cache, every term of its softmax. All other
layers are named with the reason, here and in every capture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from tracer.records import LayerInfo
from tracer.worker import compat
from tracer.worker.attention import LayerMath
from tracer.worker.keys import KeyLayout, LayoutError, learn

__all__ = ["Layer", "describe_layers"]

PLAIN_DTYPES: Final = ("auto", "bfloat16", "float16", "float32")
"""Cache types that hold keys as they are, without scales."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer of this worker; `math` and `keys` are None if it is refused."""

    info: LayerInfo
    module: Any
    math: LayerMath | None = None
    keys: KeyLayout | None = None


def describe_layers(modules: Mapping[str, Any]) -> list[Layer]:
    """Every layer of `compilation_config.static_forward_context` with a KV cache or state, in the model's order."""
    layouts: dict[tuple[Any, ...], KeyLayout | LayoutError] = {}
    named = [(name, modules[name]) for name in sorted(modules, key=_model_order) if _is_layer(modules[name])]
    return [_describe(index, name, module, layouts) for index, (name, module) in enumerate(named)]


def _is_layer(module: Any) -> bool:
    """Attention of any kind, and state-space layers: what a reader would count as a layer of the model."""
    return hasattr(module, "get_kv_cache_spec")


def _model_order(name: str) -> list[tuple[int, int, str]]:
    """Natural order, so that layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _describe(index: int, name: str, module: Any, layouts: dict[tuple[Any, ...], KeyLayout | LayoutError]) -> Layer:
    reason = _refusal(module)
    if reason is None:
        layout = _layout(module, layouts)
        if isinstance(layout, LayoutError):
            reason = str(layout)
        else:
            return Layer(_info(index, name, module, None), module, _math(module), layout)
    return Layer(_info(index, name, module, reason), module)


def _refusal(module: Any) -> str | None:
    """Why this layer cannot be captured, before its cache is looked at."""
    if type(module) is not compat.attention_class():
        return f"{type(module).__name__} is not causal softmax attention with a key cache"
    impl = module.impl
    checks = (
        (compat.attention_type(impl) != "decoder", f"attention type {compat.attention_type(impl)!r} is not causal"),
        (module.kv_sharing_target_layer_name is not None, "it reads another layer's KV cache"),
        (module.kv_cache_dtype not in PLAIN_DTYPES, f"KV cache of type {module.kv_cache_dtype}"),
        (module.use_alibi_sqrt, "square-root ALiBi"),
        (module.use_mm_prefix, "bidirectional attention over image tokens"),
        (getattr(impl, "chunk_lookback", -1) > -1, "chunked attention with lookback"),
        (not isinstance(module.kv_cache, torch.Tensor), "its KV cache is not one tensor"),
    )
    return next((reason for failed, reason in checks if failed), None)


def _layout(module: Any, layouts: dict[tuple[Any, ...], KeyLayout | LayoutError]) -> KeyLayout | LayoutError:
    """The cache layout, learned once per kind of cache."""
    cache = module.kv_cache
    isa = getattr(module, "isa", "")
    kind = (type(module.impl), isa, cache.dtype, tuple(cache.shape[1:]), cache.stride()[1:], module.head_size)
    if kind not in layouts:
        try:
            layouts[kind] = learn(module, cache)
        except LayoutError as error:
            layouts[kind] = error
    return layouts[kind]


def _math(module: Any) -> LayerMath:
    impl = module.impl
    slopes = getattr(impl, "alibi_slopes", None)
    if slopes is not None and not isinstance(slopes, torch.Tensor):
        slopes = torch.tensor(slopes, dtype=torch.float32)
    return LayerMath(
        scale=float(impl.scale),
        sliding_window=module.sliding_window,
        soft_cap=getattr(impl, "logits_soft_cap", None) or None,
        alibi_slopes=slopes,
        sinks=getattr(impl, "sinks", None),
    )


def _info(index: int, name: str, module: Any, reason: str | None) -> LayerInfo:
    impl = getattr(module, "impl", None)
    return LayerInfo(
        index=index,
        name=name,
        num_heads=int(getattr(module, "num_heads", 0)),
        num_kv_heads=int(getattr(module, "num_kv_heads", 0)),
        head_size=int(getattr(module, "head_size", 0)),
        scale=float(getattr(impl, "scale", 0.0)),
        sliding_window=getattr(module, "sliding_window", None),
        soft_cap=getattr(impl, "logits_soft_cap", None) or None,
        alibi=getattr(impl, "alibi_slopes", None) is not None,
        sinks=getattr(impl, "sinks", None) is not None,
        backend=compat.backend_name(module),
        unsupported=reason,
    )
