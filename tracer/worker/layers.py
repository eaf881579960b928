"""Which attention layers the engine has, how each turns queries and keys into weights, and which are refused.

A layer is captured only if everything about it is known: its class, its cache, every term of its softmax. All other
layers are named with the reason, here and in every capture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from tracer.records import LayerInfo
from tracer.worker import compat, fp8
from tracer.worker.attention import LayerMath
from tracer.worker.fp8 import Quantised
from tracer.worker.kernel_facts import kernel_refusal
from tracer.worker.keys import KeyLayout, LayoutError, learn

__all__ = ["Layer", "describe_layers"]

PLAIN_DTYPES: Final = ("auto", "bfloat16", "float16", "float32")
"""Cache types that hold keys as they are, without scales; `fp8` knows the others."""
METADATA: Final = frozenset({"block_table", "causal"})
"""What a step reads from the backend's metadata. FlashInfer's keeps no block table: its wrappers hold page indices."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer of this worker; `math` and `keys` are None if it is refused."""

    info: LayerInfo
    module: Any
    math: LayerMath | None = None
    keys: KeyLayout | None = None
    query: Quantised | None = None
    """How the kernel gets its queries, if not as the model computes them."""
    beside_f32: bool = False
    """True if another layer of the model needs float32: a capture's queries and keys are of one type."""

    @property
    def query_dtype(self) -> torch.dtype:
        """Of the query tensor that the kernel gets."""
        if self.query is not None:
            return self.query.dtype
        assert self.keys is not None
        dtype: torch.dtype = (self.module.kv_cache if self.keys.quantised is None else self.module).dtype
        return dtype

    @property
    def needs_f32(self) -> bool:
        """True if queries and keys of the model are stored in float32 unless a request says otherwise.

        Those of 16-bit layers fit float16, and so do fp8 elements, but not once they are scaled.
        """
        if self.beside_f32:
            return True
        assert self.keys is not None
        scales = [one.scale for one in (self.keys.quantised, self.query) if one is not None]
        return self.query_dtype == torch.float32 or any(scale != 1.0 for scale in scales)

    def require_scales(self) -> None:
        """Raise if the scales of an fp8 cache are no longer those that were learned, e.g. after new weights."""
        keys = None if self.keys is None else self.keys.quantised
        if keys is None and self.query is None:  # On every layer of every step.
            return
        for which, known in (("k", keys), ("q", self.query)):
            if known is not None and getattr(self.module, f"_{which}_scale_float") != known.scale:
                raise ValueError(f"the layer's {which}_scale has changed since the start")


def describe_layers(modules: Mapping[str, Any], refused: str | None = None) -> list[Layer]:
    """Every layer of `compilation_config.static_forward_context` with a KV cache or state, in the model's order.

    refused: a reason that holds for all of them.
    """
    layouts: dict[tuple[Any, ...], KeyLayout | LayoutError] = {}
    named = [(name, modules[name]) for name in sorted(modules, key=_model_order) if _is_layer(modules[name])]
    if refused is not None:
        return [Layer(_info(index, name, module, refused), module) for index, (name, module) in enumerate(named)]
    layers = [_describe(index, name, modules, layouts) for index, (name, _) in enumerate(named)]
    wide = any(layer.needs_f32 for layer in layers if layer.keys is not None)
    return [replace(layer, beside_f32=wide) for layer in layers]


def _is_layer(module: Any) -> bool:
    """Attention of any kind, and state-space layers: what a reader would count as a layer of the model."""
    return hasattr(module, "get_kv_cache_spec")


def _model_order(name: str) -> list[tuple[int, int, str]]:
    """Natural order, so that layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _describe(
    index: int, name: str, modules: Mapping[str, Any], layouts: dict[tuple[Any, ...], KeyLayout | LayoutError]
) -> Layer:
    module = modules[name]
    reason = _refusal(module) or _sharing_refusal(module, modules)
    if reason is None:
        layout = _layout(_writer(module, modules), layouts)
        if isinstance(layout, LayoutError):
            reason = str(layout)
        else:
            info = _info(index, name, module, None)
            return Layer(info, module, _math(module), layout, fp8.query_storage(module))
    return Layer(_info(index, name, module, reason), module)


def _refusal(module: Any) -> str | None:
    """Why this layer cannot be captured, before its cache is looked at."""
    if type(module) is not compat.attention_class():
        return f"{type(module).__name__} is not causal softmax attention with a key cache"
    if not compat.backend_is_known(module):
        return f"attention backend {_backend(module)} is not known: its cache or its softmax may be another"
    impl = module.impl
    checks = (
        (compat.attention_type(module) != "decoder", f"attention type {compat.attention_type(module)!r} is not causal"),
        (module.use_alibi_sqrt, "square-root ALiBi"),
        (module.use_mm_prefix, "bidirectional attention over image tokens"),
        (getattr(impl, "chunk_lookback", -1) > -1, "chunked attention with lookback"),
        (not isinstance(module.kv_cache, torch.Tensor), "its KV cache is not one tensor"),
        (
            bool(METADATA - compat.metadata_fields(module)),
            f"{compat.backend_name(module)} gives no block table to read",
        ),
        (not _window_agrees(module), "its kernel's sliding window is not the layer's"),
    )
    reason = next((reason for failed, reason in checks if failed), None) or kernel_refusal(module)
    if reason is not None or module.kv_cache_dtype not in PLAIN_DTYPES:
        return reason or fp8.refusal(module)
    if module.kv_cache.dtype != module.dtype:  # Kernels round such keys again, each in its own way.
        return f"KV cache of type {module.kv_cache_dtype} beside queries of {module.dtype}"
    return None


def _backend(module: Any) -> str:
    """Name and class, as they are refused."""
    backend = getattr(module, "attn_backend", None)
    where = "" if backend is None else f" ({compat.class_path(backend)})"
    return f"{compat.backend_name(module) or 'without a name'}{where}"


def _writer(module: Any, modules: Mapping[str, Any]) -> Any:
    """The layer that stores the keys which `module` reads: itself, unless the model shares KV caches."""
    return modules.get(module.kv_sharing_target_layer_name, module)


def _sharing_refusal(module: Any, modules: Mapping[str, Any]) -> str | None:
    """Why a layer that reads another layer's keys cannot be captured.

    The other layer has stored this step's keys before this one runs. It must be one of those that we know, with the
    very same memory, and with the same window: a layer that sees further would read blocks that were given back.
    """
    name = module.kv_sharing_target_layer_name
    if name is None:
        return None
    if name not in modules:
        return f"it reads the KV cache of {name}, which is not among the layers"
    writer = modules[name]
    shared = isinstance(writer.kv_cache, torch.Tensor) and all(
        read(module.kv_cache) == read(writer.kv_cache)
        for read in (torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.stride)
    )
    checks = (
        (_refusal(writer) is not None, "cannot be captured either"),
        (not shared, "keeps its keys elsewhere"),
        (writer.sliding_window != module.sliding_window, "has another sliding window"),
        (module.kv_cache_dtype not in PLAIN_DTYPES, "is quantised with scales of its own"),
    )
    reason = next((reason for failed, reason in checks if failed), None)
    return None if reason is None else f"it reads the KV cache of {name}, which {reason}"


def _window_agrees(module: Any) -> bool:
    """True if `impl.sliding_window` says what `module.sliding_window` does, in any of the backends' ways.

    GPU kernels take (keys to the left, keys to the right), -1 for all; others the number of visible keys.
    """
    window, kernel = module.sliding_window, getattr(module.impl, "sliding_window", module.sliding_window)
    if isinstance(kernel, (tuple, list)):
        return tuple(kernel) == ((-1, -1) if window is None else (window - 1, 0))
    return bool(kernel in (None, -1)) if window is None else bool(kernel == window)


def _layout(module: Any, layouts: dict[tuple[Any, ...], KeyLayout | LayoutError]) -> KeyLayout | LayoutError:
    """The cache layout, learned once per kind of cache."""
    cache, quantised = module.kv_cache, fp8.key_storage(module)
    isa, shape, strides = getattr(module, "isa", ""), tuple(cache.shape[1:]), cache.stride()[1:]
    kind = (type(module.impl), isa, cache.dtype, quantised, shape, strides, module.head_size)
    if kind not in layouts:
        try:
            layouts[kind] = learn(module, cache, quantised)
        except LayoutError as error:
            layouts[kind] = error
        except Exception as error:  # noqa: BLE001 - the backend's kernel: whatever it dislikes, logits still work
            layouts[kind] = LayoutError(f"{compat.backend_name(module)} cannot be probed: {error}")
    return layouts[kind]


def _math(module: Any) -> LayerMath:
    impl = module.impl
    slopes = getattr(impl, "alibi_slopes", None)
    if slopes is not None:  # on the keys' device now, instead of a blocking copy in every layer of every step
        slopes = torch.as_tensor(slopes, dtype=torch.float32).to(module.kv_cache.device)
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
        alibi_slopes=_numbers(getattr(impl, "alibi_slopes", None)),
        sink_logits=_numbers(getattr(impl, "sinks", None)),
        backend=compat.backend_name(module),
        unsupported=reason,
    )


def _numbers(values: Any) -> tuple[float, ...]:
    """One per head, for a reader that rebuilds rows from queries and keys."""
    if values is None:
        return ()
    return tuple(torch.as_tensor(values).detach().float().flatten().tolist())
