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
LANES: Final = 16


@dataclass(slots=True)
class NativeLayer:
    """A layer as the kernel knows it."""

    struct: LayerStruct
    address: int
    dtype: torch.dtype
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
        if cache.dtype not in CODES or cache.stride(3) != 1 or cache.stride(2) != cache.shape[3]:
            raise NativeError(f"layer {info.name}: a cache of {cache.dtype} with strides {tuple(cache.stride())}")
        slopes, sinks = _floats(math.alibi_slopes), _floats(math.sinks)
        offsets = None if keys.strides is not None else keys.offsets.cpu().numpy().astype(np.int64, order="C")
        first, per_token, per_dim = keys.strides or (0, 0, 0)
        struct = LayerStruct(
            CODES[cache.dtype], info.num_heads, info.num_kv_heads, info.head_size, keys.block_size,
            cache.stride(0), cache.stride(1), first, per_token, per_dim,
            _pointer(offsets), _pointer(slopes), _pointer(sinks),
            math.sliding_window or 0, math.scale, math.soft_cap or 0.0,
        )  # fmt: skip
        return cls(struct, ctypes.addressof(struct), cache.dtype, (slopes, sinks, offsets), keys.block_size + LANES)

    def check(self, query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor) -> None:
        """Raise unless these are what the kernel was told about: a wrong stride would read somebody else's keys."""
        ours = (self.struct.block_stride, self.struct.head_stride)
        if query.dtype != self.dtype or query.stride(2) != 1 or query.shape[1] != self.struct.heads:
            raise TypeError(f"queries of {query.dtype}, shape {tuple(query.shape)}, strides {query.stride()}")
        if cache.dtype != self.dtype or cache.stride()[:2] != ours:
            raise TypeError(f"a key cache of {cache.dtype} with strides {cache.stride()}")
        if table.dtype != torch.int32 or table.stride(1) != 1:
            raise TypeError(f"a block table of {table.dtype} with strides {table.stride()}")


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
