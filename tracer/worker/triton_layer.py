"""An attention layer as the Triton kernels know it, and their launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton

from tracer.records import LayerInfo
from tracer.worker.gpu_plan import PickPlan, RowPlan
from tracer.worker.keys import KeyLayout
from tracer.worker.layers import Layer
from tracer.worker.triton_kernels import collect_keys, collect_queries, score_rows, weigh_rows

__all__ = ["TYPES", "GpuError", "Results", "TritonLayer", "as_results"]

TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""Of queries, keys and logits."""
FP8_CODES: Final = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 4}
"""Types of quantised queries and keys as the kernels number them."""
KEYS: Final = 64
"""Keys per program of `score_rows`."""
TILE: Final = 1024
"""Scores at a time in `weigh_rows`."""
ENTRIES: Final = 16
"""Positions per program of the `collect_` kernels."""
LEAST: Final = 16
"""Least width of a tile over a head's elements."""
NO_WINDOW: Final = (1 << 31) - 1

Results = tuple[torch.Tensor, torch.Tensor]
"""One result buffer on the device, as float16 and as float32."""


class GpuError(RuntimeError):
    """The Triton kernels cannot read a layer's cache, or disagree with torch; the message says which."""


@dataclass(frozen=True, slots=True)
class TritonLayer:
    """Everything about a layer that does not change."""

    info: LayerInfo
    layer: Layer
    dtype: torch.dtype
    """Of the cache."""
    strides: tuple[int, int]
    """From block to block and from KV head to KV head of the cache, in elements."""
    inside: tuple[int, int, int]
    """Where key element (token, dim) lies in its block and head: first, per token, per dim, in elements of memory."""
    block_size: int
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    scale: float
    """Of a product of elements."""
    soft_cap: float
    window: int
    codes: tuple[int, int] = (0, 0)
    """`KEY_CODE` and `QUERY_CODE` of the kernels."""
    scales: tuple[float, float] = (1.0, 1.0)
    """Of keys and queries: a number is scale * element."""

    @classmethod
    def of(cls, layer: Layer) -> TritonLayer:
        """Raises GpuError for a cache that the kernels cannot read."""
        assert layer.math is not None
        assert layer.keys is not None
        cache, math, info = layer.module.kv_cache, layer.math, layer.info
        storages = (layer.keys.quantised, layer.query)
        codes = [0 if storage is None else FP8_CODES.get(storage.dtype) for storage in storages]
        scales = [1.0 if storage is None else storage.scale for storage in storages]
        key_code, query_code = codes
        if key_code is None or query_code is None or (key_code == 0 and cache.dtype not in TYPES):
            raise GpuError(f"layer {info.name}: a cache of {cache.dtype}")
        inside = _inside(cache, layer.keys)
        if inside is None:
            raise GpuError(f"layer {info.name}: its backend's order of keys in a block is not a plain one")
        return cls(
            info, layer, cache.dtype, (cache.stride(0), cache.stride(1)), inside, layer.keys.block_size,
            _floats(math.alibi_slopes, cache.device), _floats(math.sinks, cache.device),
            math.scale * scales[0] * scales[1], math.soft_cap or 0.0, math.sliding_window or NO_WINDOW,
            (key_code, query_code), (scales[0], scales[1]),
        )  # fmt: skip

    def check(self, query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor) -> None:
        """Raise unless these are what the kernels were told about: a wrong stride would read somebody else's keys."""
        self.layer.require_scales()
        shape = (self.info.num_heads, self.info.head_size)
        if query.dtype not in self._query_types or query.stride(2) != 1 or tuple(query.shape[1:]) != shape:
            raise TypeError(f"queries of {query.dtype}, shape {tuple(query.shape)}, strides {query.stride()}")
        if cache.dtype != self.dtype or cache.stride()[:2] != self.strides:
            raise TypeError(f"a key cache of {cache.dtype} with strides {cache.stride()}")
        if table.dtype != torch.int32 or table.stride(1) != 1:
            raise TypeError(f"a block table of {table.dtype} with strides {table.stride()}")

    def attend(
        self, plan: RowPlan, tables: torch.Tensor, results: Results, scores: torch.Tensor, stride: int,
        query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor,
    ) -> None:  # fmt: skip
        """Weights, features and tops of this layer for all rows of the plan.

        scores: float32 scratch of at least [rows, plan.most, stride]; stride: at least plan.longest.
        """
        self.check(query, cache, table)
        info, slots_at = self.info, plan.slots_at + self.info.index * plan.count
        score_rows[triton.cdiv(plan.longest, KEYS), info.num_kv_heads, plan.count](
            tables, slots_at, plan.places_at, plan.width, _bytes(query), query.stride(0), query.stride(1), cache,
            *self.strides, *self.inside, table, table.stride(0), scores, plan.most, stride,
            scores if self.slopes is None else self.slopes, self.window, self.scale, self.soft_cap,
            GROUP=info.num_heads // info.num_kv_heads, SIZE=info.head_size, BLOCK=self.block_size,
            ALIBI=self.slopes is not None, SOFT_CAP=self.soft_cap != 0.0, KEYS=KEYS, DIMS=self._dims,
            KEY_CODE=self.codes[0], QUERY_CODE=self.codes[1],
        )  # fmt: skip
        weigh_rows[plan.most, plan.count](
            tables, slots_at, plan.heads_at, plan.most, scores, stride, *results,
            scores if self.sinks is None else self.sinks, self.window,
            HEADS=info.num_heads, SINKS=self.sinks is not None, TILE=TILE,
        )  # fmt: skip

    def collect(
        self, plan: PickPlan, tables: torch.Tensor, results: Results, query: torch.Tensor, cache: torch.Tensor,
        table: torch.Tensor,
    ) -> None:  # fmt: skip
        """Queries and keys of this layer for all rows of the plan."""
        self.check(query, cache, table)
        info, slots_at = self.info, plan.slots_at + self.info.index * len(plan.arrays)
        if plan.queries:
            collect_queries[triton.cdiv(plan.queries, ENTRIES), info.num_heads](
                tables, slots_at, plan.queries_at, plan.queries, _bytes(query), query.stride(0), query.stride(1),
                self.scales[1], *results,
                HEADS=info.num_heads, SIZE=info.head_size, DIMS=self._dims, ENTRIES=ENTRIES, QUERY_CODE=self.codes[1],
            )  # fmt: skip
        if plan.keys:
            collect_keys[triton.cdiv(plan.keys, ENTRIES), info.num_kv_heads](
                tables, slots_at, plan.keys_at, plan.keys, cache, *self.strides, *self.inside, table, table.stride(0),
                self.window, self.scales[0], *results,
                HEADS=info.num_kv_heads, SIZE=info.head_size, BLOCK=self.block_size, DIMS=self._dims, ENTRIES=ENTRIES,
                KEY_CODE=self.codes[0],
            )  # fmt: skip

    @property
    def _query_types(self) -> tuple[torch.dtype, ...]:
        return TYPES if self.layer.query is None else (self.layer.query.dtype,)

    @property
    def _dims(self) -> int:
        return max(LEAST, int(triton.next_power_of_2(self.info.head_size)))


def _inside(cache: torch.Tensor, keys: KeyLayout) -> tuple[int, int, int] | None:
    """The layout's steps in the cache's memory; None if there are none.

    The layout counts in a block's flattened [block_size, 2 * head_size] region: that is memory if the region is
    contiguous, and rows of it are memory whatever the strides from token to token.
    """
    if keys.strides is None:
        return None
    first, per_token, per_dim = keys.strides
    if (per_token, per_dim) == (cache.shape[3], 1):
        return first * cache.stride(3), cache.stride(2), cache.stride(3)
    contiguous = cache.stride(3) == 1 and cache.stride(2) == cache.shape[3]
    return (first, per_token, per_dim) if contiguous else None


def _bytes(query: torch.Tensor) -> torch.Tensor:
    """fp8 queries as the kernels take them, others as they are."""
    return query.view(torch.uint8) if query.dtype in FP8_CODES else query


def _floats(values: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A copy of its own, contiguous: the kernels index it by head."""
    return None if values is None else values.detach().to(device, torch.float32, copy=True).contiguous()


def as_results(buffer: torch.Tensor) -> Results:
    """uint8 memory as the kernels write to it."""
    return buffer.view(torch.float16), buffer.view(torch.float32)
