"""How several tensor parallel ranks share a capture's arrays: each writes whole inner chunks of its own heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from exporters.zarr_facts import AttentionAxes
from tracer import schema
from tracer.ranks import Part, divide, owner
from tracer.records import CaptureSpec, EngineInfo, LayerInfo
from tracer.schema import ArrayLayout

__all__ = ["HEAD_DIMS", "Parts", "divided", "first_head", "head_parts", "rank_count", "whole_row"]

Parts = Mapping[str, Sequence[Part]]
"""By array, what each rank writes along the head axis; an array that is not in it has one writer."""
ROWS: Final = (schema.ATTENTION, schema.ATTENTION_PREFILL, schema.ATTENTION_SUMMARY)
HEAD_DIMS: Final = frozenset({"head", "qk_head", "kv_head"})


def rank_count(spec: CaptureSpec, engine: EngineInfo | None) -> int:
    """Ranks that send steps of such a capture, numbered from 0."""
    return engine.world_size if engine is not None and spec.wants_layers else 1


def head_parts(spec: CaptureSpec, engine: EngineInfo | None, axes: AttentionAxes | None) -> Parts:
    """The parts of each array with heads; empty where one rank has them all.

    Found from the engine's facts alone, so that nobody has to wait for a rank before another's heads are written.
    """
    if engine is None or engine.world_size == 1:
        return {}
    ranks, out = engine.world_size, {}
    if axes is not None and axes.heads:
        out = dict.fromkeys(ROWS, divide(axes.heads, owner(engine.num_heads, ranks)))
    layer = _qk_layer(spec, engine)
    if layer is not None:
        queries = divide(range(layer.num_heads), owner(layer.num_heads, ranks))
        keys = divide(range(layer.num_kv_heads), owner(layer.num_kv_heads, ranks))
        out |= dict.fromkeys((schema.QUERY, schema.QUERY_PROMPT), queries)
        out |= dict.fromkeys((schema.KEY, schema.KEY_PROMPT), keys)
    return out


def _qk_layer(spec: CaptureSpec, engine: EngineInfo) -> LayerInfo | None:
    """Any of the layers whose queries and keys are stored: they have the same heads."""
    if spec.qk is None:
        return None
    asked = (layer for layer in engine.layers if spec.qk.layers is None or layer.index in spec.qk.layers)
    return next((layer for layer in asked if layer.unsupported is None), None)


def whole_row(shape: tuple[int, ...], parts: Sequence[Part]) -> tuple[int, ...]:
    """Shape [layers, heads, ...] of a row of which a rank brought the heads of `shape`."""
    if len(shape) != 3 or not parts:
        return shape
    return (shape[0], sum(len(part.heads) for part in parts), shape[2])


def divided(layout: ArrayLayout, parts: Sequence[Part]) -> ArrayLayout:
    """The layout with inner chunks of one part's heads."""
    if not parts:
        return layout
    size = len(parts[0].heads)
    chunk = (size if dim in HEAD_DIMS else extent for dim, extent in zip(layout.dims, layout.chunk, strict=True))
    return replace(layout, chunk=tuple(chunk))


def first_head(start: tuple[int, ...]) -> int:
    """Where a row begins along the axis of heads, which must be its second; -1 if it begins elsewhere."""
    if len(start) == 3:
        layer, head, last = start
        return -1 if layer or last else head
    return -1 if any(start) else 0
