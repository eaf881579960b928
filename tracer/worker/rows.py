"""One request's attention rows, from a layer, its cache and the step's metadata."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from tracer.worker.attention import attention_last_rows, attention_rows
from tracer.worker.batch import Row
from tracer.worker.device import indices
from tracer.worker.layers import Layer
from tracer.worker.pack import DTYPES
from tracer.worker.work import Work

__all__ = [
    "last_row_weights",
    "past_keys",
    "plain_query",
    "prompt_blocks",
    "prompt_parts",
    "require_causal",
    "row_weights",
    "worth_batching",
]

PROMPT_ROWS: Final = 256
"""Query rows per record of the prompt's map: bounds a record's size."""

MAX_PADDING: Final = 2
"""How many times the keys that are needed a batch may read."""


def row_weights(layer: Layer, query: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Weights [heads, rows, keys] of query rows [rows, heads, head_size] at these absolute positions."""
    assert layer.math is not None
    return attention_rows(plain_query(layer, query), keys, positions, layer.math)


def plain_query(layer: Layer, query: torch.Tensor) -> torch.Tensor:
    """The numbers that the kernel's queries stand for, whatever their type; raises TypeError if that is another one."""
    if layer.query is None:
        return query
    if query.dtype != layer.query.dtype:
        raise TypeError(f"queries of {query.dtype}, not of {layer.query.dtype}")
    return layer.query.decode(query)


def require_causal(metadata: Any) -> None:
    """Raise unless the step's metadata says plainly that every row sees only what came before it."""
    if getattr(metadata, "causal", True) is not True or getattr(metadata, "dynamic_causal", None) is not None:
        raise ValueError("the step's attention is not causal")


def past_keys(layer: Layer, row: Row, kv_cache: torch.Tensor, metadata: Any) -> torch.Tensor:
    """Keys of positions 0 … last of this request, [kv_heads, keys, head_size], from the paged cache.

    The step's own keys are in the cache too: backends with a separate cache update (the only ones accepted) store
    them before attention runs. Blocks that a sliding window has given back hold other keys; they are masked.
    """
    assert layer.keys is not None
    require_causal(metadata)
    layer.require_scales()
    length = row.position + 1
    count = -(-length // layer.keys.block_size)
    blocks = metadata.block_table[row.index, :count].to(torch.int64)
    return layer.keys.read(kv_cache, blocks)[:, :length]


def prompt_parts(row: Row) -> Iterator[tuple[int, int]]:
    """Positions [start, stop) of the prompt's rows that this step computes, a record's worth at a time."""
    end = min(row.position + 1, row.prompt_tokens)
    for start in range(row.computed, end, PROMPT_ROWS):
        yield start, min(start + PROMPT_ROWS, end)


def prompt_blocks(
    layer: Layer, work: Work, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any
) -> Iterator[tuple[int, torch.Tensor]]:
    """See `maths.Maths.prompt`."""
    row, traced = work.row, work.traced
    assert traced.attention is not None
    keys = past_keys(layer, row, kv_cache, metadata)
    for start, stop in prompt_parts(row):
        part = query[row.first + start - row.computed : row.first + stop - row.computed]
        weights = row_weights(layer, part, keys[:, :stop], torch.arange(start, stop, device=keys.device))
        chosen = [head for head in traced.heads if head < weights.shape[0]]
        yield start, weights[indices(chosen, weights.device)].to(DTYPES[traced.attention.dtype])


def worth_batching(rows: Sequence[Row]) -> bool:
    """True for several requests of not too different lengths: each is padded to the longest."""
    lengths = [row.position + 1 for row in rows]
    return len(rows) > 1 and max(lengths) * len(rows) <= MAX_PADDING * sum(lengths)


def last_row_weights(
    layer: Layer, rows: Sequence[Row], query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any
) -> list[torch.Tensor]:
    """Weights [heads, keys] of the last query row of each request, all requests at once."""
    assert layer.keys is not None
    assert layer.math is not None
    require_causal(metadata)
    layer.require_scales()
    device = kv_cache.device
    positions = [row.position for row in rows]
    count = -(-(max(positions) + 1) // layer.keys.block_size)
    # Rows of the table are as long as the longest request: what follows a shorter one's blocks is masked.
    table = metadata.block_table[indices([row.index for row in rows], device), :count].to(torch.int64)
    keys = layer.keys.read(kv_cache, table.clamp(min=0).flatten())
    keys = keys.view(keys.shape[0], len(rows), -1, keys.shape[2])
    last = plain_query(layer, query)[indices([row.first + row.tokens - 1 for row in rows], device)]
    weights = attention_last_rows(last, keys, indices(positions, device), layer.math)
    return [weights[:, place, : row.position + 1] for place, row in enumerate(rows)]
