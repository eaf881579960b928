"""Keys and queries in 8 bits: which are known, and what number a byte stands for.

vLLM keeps an fp8 cache as bytes with one scale per layer: a key is `element * scale`, and its kernels multiply by the
scale after the product with the query, so nothing more is rounded. Kernels on GPUs that multiply in fp8 get their
queries in fp8, too, with a scale of their own. A byte is believed only after `keys.learn` has seen the backend write
every one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch

from tracer.worker import compat

__all__ = ["Quantised", "key_storage", "query_storage", "refusal"]

FORMATS: Final = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""vLLM's `kv_cache_dtype` -> the elements behind the cache's bytes; any other type of cache is refused."""
BACKENDS: Final = {
    "CPU_ATTN": (torch.float8_e4m3fn, torch.float8_e5m2),
    "FLASH_ATTN": (torch.float8_e4m3fn,),
    "TRITON_ATTN": (torch.float8_e4m3fn,),
}
"""Backends whose arithmetic on such a cache is known: scores are products of elements, scaled in float32."""
CPU_KERNELS: Final = ("vec", "amx")
"""Of CPU_ATTN's kernels those that leave the query as it is."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """Numbers kept as `element * scale`."""

    dtype: torch.dtype
    scale: float

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """float32 numbers; stored: elements of `dtype`, or their bytes, of any shape."""
        elements = stored if stored.dtype == self.dtype else stored.view(self.dtype)
        return elements.float() * self.scale

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Bytes of the elements nearest to float32 `numbers`, for checks: backends round in ways of their own."""
        most = torch.finfo(self.dtype).max
        return (numbers / self.scale).clamp(-most, most).to(self.dtype).view(torch.uint8)


def key_storage(module: Any) -> Quantised | None:
    """How a layer's cache keeps its keys; None if as they are. `refusal` must have said nothing."""
    dtype = FORMATS.get(module.kv_cache_dtype)
    return None if dtype is None else Quantised(dtype, _scale(module, "k"))


def query_storage(module: Any) -> Quantised | None:
    """How a layer's kernel gets its queries; None if as the model computes them."""
    if module.kv_cache_dtype not in FORMATS or getattr(module, "query_quant", None) is None:
        return None
    return Quantised(torch.float8_e4m3fn, _scale(module, "q"))


def refusal(module: Any) -> str | None:
    """Why a quantised cache of this layer cannot be read; module: a vLLM `Attention` layer with its cache bound."""
    kind, backend = module.kv_cache_dtype, compat.backend_name(module)
    dtype = FORMATS.get(kind)
    if dtype is None:
        return f"KV cache of type {kind}"
    on_cpu, queries = backend == "CPU_ATTN", getattr(module, "query_quant", None) is not None
    isa = getattr(module, "isa", "")
    checks = (
        (dtype not in BACKENDS.get(backend, ()), f"KV cache of type {kind} of backend {backend}"),
        (on_cpu and isa not in CPU_KERNELS, f"KV cache of type {kind} of the CPU kernel {isa!r}"),
        (on_cpu == queries, f"KV cache of type {kind} with queries that backend {backend} should not see"),
        (getattr(module.kv_cache, "dtype", None) != torch.uint8, f"KV cache of type {kind} that is not in bytes"),
        (not _is_known(module, "k"), f"KV cache of type {kind} without one scale of its keys"),
        (queries and not _is_known(module, "q"), f"KV cache of type {kind} without one scale of its queries"),
    )
    return next((reason for failed, reason in checks if failed), None)


def _scale(module: Any, which: str) -> float:
    return float(getattr(module, f"_{which}_scale_float"))


def _is_known(module: Any, which: str) -> bool:
    """True if there is one scale, and kernels that take it from the host and from the device see the same."""
    scale, on_device = _scale(module, which), getattr(module, f"_{which}_scale")
    if not (math.isfinite(scale) and scale > 0.0) or on_device.numel() != 1:
        return False
    return math.isclose(float(on_device.item()), scale, rel_tol=1e-6)
