"""An attention layer as the C kernels know it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.worker.layers import Layer
from tracer.worker.native import LayerStruct, NativeError

__all__ = ["CODES", "NativeLayer", "address_of", "addresses_of"]

CODES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types as kernels.c numbers them."""
FP8_CODES: Final = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 4}
"""The same of keys in a cache of bytes."""
LANES: Final = 16


@dataclass(slots=True)
class NativeLayer:
    """A layer as the kernel knows it."""

    struct: LayerStruct
    address: int
    layer: Layer
    dtype: torch.dtype
    """Of the cache."""
    query_dtype: torch.dtype
    keep: tuple[Any, ...]
    """Arrays that `struct` points into."""
    margin: int
    """Scores that a row may have beyond its keys."""
    floats: int = 1 << 62
    """Scratch of one thread; impossible until it is worked out."""

    @classmethod
    def of(cls, layer: Layer) -> NativeLayer:
        """Raises NativeError for a cache that the kernel cannot read."""
        assert layer.math is not None
        assert layer.keys is not None
        cache, info, math, keys = layer.module.kv_cache, layer.info, layer.math, layer.keys
        code, key_scale = _code(layer)
        if code is None or cache.stride(3) != 1 or cache.stride(2) != cache.shape[3]:
            raise NativeError(f"layer {info.name}: a cache of {cache.dtype} with strides {tuple(cache.stride())}")
        if keys.block_size % LANES:
            raise NativeError(f"layer {info.name}: blocks of {keys.block_size} tokens, not a multiple of {LANES}")
        if layer.query_dtype not in CODES:
            raise NativeError(f"layer {info.name}: queries of {layer.query_dtype}")
        slopes, sinks = _floats(math.alibi_slopes), _floats(math.sinks)
        offsets = None if keys.strides is not None else keys.offsets.cpu().numpy().astype(np.int64, order="C")
        first, per_token, per_dim = keys.strides or (0, 0, 0)
        struct = LayerStruct(
            code, info.num_heads, info.num_kv_heads, info.head_size, keys.block_size,
            cache.stride(0), cache.stride(1), first, per_token, per_dim,
            _pointer(offsets), _pointer(slopes), _pointer(sinks),
            math.sliding_window or 0, CODES[layer.query_dtype],
            math.scale * key_scale, math.soft_cap or 0.0, key_scale,
        )  # fmt: skip
        keep, margin = (slopes, sinks, offsets), keys.block_size + LANES
        return cls(struct, ctypes.addressof(struct), layer, cache.dtype, layer.query_dtype, keep, margin)

    def check(self, query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor) -> None:
        """Raise unless these are what the kernel was told about: a wrong stride would read somebody else's keys."""
        self.layer.require_scales()
        ours = (self.struct.block_stride, self.struct.head_stride)
        if query.dtype != self.query_dtype or query.stride(2) != 1 or query.shape[1] != self.struct.heads:
            raise TypeError(f"queries of {query.dtype}, shape {tuple(query.shape)}, strides {query.stride()}")
        if cache.dtype != self.dtype or cache.stride()[:2] != ours:
            raise TypeError(f"a key cache of {cache.dtype} with strides {cache.stride()}")
        if table.dtype != torch.int32 or table.stride(1) != 1:
            raise TypeError(f"a block table of {table.dtype} with strides {table.stride()}")


def _code(layer: Layer) -> tuple[int | None, float]:
    """The keys' type as kernels.c numbers it, None if it has no number, and their scale."""
    assert layer.keys is not None
    quantised = layer.keys.quantised
    if quantised is None:
        return CODES.get(layer.module.kv_cache.dtype), 1.0
    return FP8_CODES.get(quantised.dtype), quantised.scale


def address_of(array: NDArray[Any]) -> int:
    """Address of an array's memory; `array.ctypes.data` builds an object first."""
    address: int = array.__array_interface__["data"][0]
    return address


def addresses_of(*arrays: NDArray[Any]) -> list[int]:
    """`address_of` each."""
    return [address_of(array) for array in arrays]


def _floats(values: torch.Tensor | None) -> NDArray[np.float32] | None:
    return None if values is None else values.detach().float().cpu().numpy().copy()


def _pointer(array: NDArray[Any] | None) -> int | None:
    return None if array is None else address_of(array)
