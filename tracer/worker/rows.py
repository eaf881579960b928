"""One request's attention rows, from a layer, its cache and the step's metadata."""

from __future__ import annotations

from typing import Any

import torch

from tracer.worker.attention import attention_rows
from tracer.worker.batch import Row
from tracer.worker.layers import Layer

__all__ = ["past_keys", "row_weights"]


def row_weights(layer: Layer, query: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Weights [heads, rows, keys] of query rows [rows, heads, head_size] at these absolute positions."""
    assert layer.math is not None
    return attention_rows(query, keys, positions, layer.math)


def _is_causal(metadata: Any) -> bool:
    """True if the step's metadata says plainly that every row sees only what came before it."""
    return getattr(metadata, "causal", True) is True and getattr(metadata, "dynamic_causal", None) is None


def past_keys(layer: Layer, row: Row, kv_cache: torch.Tensor, metadata: Any) -> torch.Tensor:
    """Keys of positions 0 … last of this request, [kv_heads, keys, head_size], from the paged cache.

    The step's own keys are in the cache too: backends with a separate cache update (the only ones accepted) store
    them before attention runs. Blocks that a sliding window has given back hold other keys; they are masked.
    """
    assert layer.keys is not None
    if not _is_causal(metadata):
        raise ValueError("the step's attention is not causal")
    length = row.position + 1
    count = -(-length // layer.keys.block_size)
    blocks = metadata.block_table[row.index, :count].to(torch.int64)
    return layer.keys.read(kv_cache, blocks)[:, :length]
