"""Arrays of prompt logits, hidden states and choices of experts: the part of the capture format beside `schema`."""

from __future__ import annotations

from math import nan
from typing import Final

from tracer import schema
from tracer.member_records import (
    HIDDEN_STATES,
    HIDDEN_STATES_PROMPT,
    PROMPT_LOGITS,
    PROMPT_LOGITS_TOPK,
    PROMPT_LOGITS_TOPK_ID,
    ROUTER_EXPERT,
    ROUTER_EXPERT_PROMPT,
    ROUTER_WEIGHT,
    ROUTER_WEIGHT_PROMPT,
)
from tracer.records import CaptureSpec, EngineInfo, HiddenSpec
from tracer.schema import ArrayLayout, shard_steps

__all__ = [
    "COUNTED",
    "MEMBER_ARRAYS",
    "hidden_dtype",
    "hidden_layers",
    "member_layout",
    "member_limits",
    "router_layers",
]

_HIDDEN: Final = (HIDDEN_STATES, HIDDEN_STATES_PROMPT)
_EXPERTS: Final = (ROUTER_EXPERT, ROUTER_EXPERT_PROMPT)
_WEIGHTS: Final = (ROUTER_WEIGHT, ROUTER_WEIGHT_PROMPT)
MEMBER_ARRAYS: Final = (*_HIDDEN, *_EXPERTS, *_WEIGHTS, PROMPT_LOGITS, PROMPT_LOGITS_TOPK, PROMPT_LOGITS_TOPK_ID)
COUNTED: Final = (*_HIDDEN, PROMPT_LOGITS, PROMPT_LOGITS_TOPK)
"""Those that hold the engine's own values, which may be infinite in the stored precision."""
_TYPES: Final = {"f16": ("float16", 2), "f32": ("float32", 4)}


def member_layout(
    name: str, shape: tuple[int, ...], spec: CaptureSpec, engine: EngineInfo | None
) -> ArrayLayout | None:
    """The array of that name for rows of that shape; None if the capture cannot have it.

    Over `step`, or with `prompt_row` in its place: positions before the last prompt row.
    """
    if name not in schema.asked_arrays(spec):
        return None
    layout: ArrayLayout | None = None
    match shape:
        case (width,) if spec.prompt_logits is not None:
            layout = _prompt_logits(name, width, spec.prompt_logits.dtype)
        case (layers, width) if name in _HIDDEN and spec.hidden_states is not None:
            kind, size = _TYPES[hidden_dtype(spec.hidden_states, engine)]
            layout = _rows(name, ("hidden_layer", "hidden"), kind, (layers, width), size)
        case (layers, width) if name in _EXPERTS:
            layout = _rows(name, ("router_layer", "expert_slot"), "int32", (layers, width), 4)
        case (layers, width) if name in _WEIGHTS:
            layout = _rows(name, ("router_layer", "expert_slot"), "float32", (layers, width), 4)
    return layout


def _prompt_logits(name: str, width: int, dtype: str) -> ArrayLayout | None:
    kind, size = _TYPES[dtype]
    match name:
        case "prompt_logits":
            return _rows(name, ("vocab",), kind, (width,), size)
        case "prompt_logits_topk":
            return _rows(name, ("prompt_k",), kind, (width,), size)
        case "prompt_logits_topk_id":
            return _rows(name, ("prompt_k",), "int32", (width,), 4)
    return None


def _rows(name: str, dims: tuple[str, ...], kind: str, row: tuple[int, ...], size: int) -> ArrayLayout:
    """One row per inner chunk; fill is what a row that was lost reads as."""
    cells = 1
    for length in row:
        cells *= length
    count = shard_steps(cells * size)
    first = "step" if name in (HIDDEN_STATES, ROUTER_EXPERT, ROUTER_WEIGHT) else "prompt_row"
    integers = kind == "int32"
    units = {"units": "logit"} if name in (PROMPT_LOGITS, PROMPT_LOGITS_TOPK) else {}
    fill = -1 if integers else nan
    shuffle = kind == "float16" or name == PROMPT_LOGITS
    return ArrayLayout(name, (first, *dims), kind, (1, *row), (count, *row), fill, shuffle, units)


def hidden_dtype(spec: HiddenSpec, engine: EngineInfo | None) -> str:
    """`f16` or `f32`, as the worker decides it."""
    return spec.dtype or ("f32" if engine is not None and engine.dtype == "float32" else "f16")


def hidden_layers(spec: CaptureSpec, engine: EngineInfo | None) -> tuple[int, ...]:
    """Indices along `hidden_layer`; empty if they are not known."""
    asked = spec.hidden_states.layers if spec.hidden_states is not None else ()
    if asked is not None or engine is None:
        return asked or ()
    return tuple(range(engine.members.hidden_states))


def router_layers(spec: CaptureSpec, engine: EngineInfo | None) -> tuple[int, ...]:
    """Indices along `router_layer`; empty if they are not known."""
    asked = spec.router.layers if spec.router is not None else ()
    if engine is None:
        return asked or ()
    able = [layer.index for layer in engine.members.routers if layer.unsupported is None]
    return tuple(index for index in able if asked is None or index in asked)


def member_limits(spec: CaptureSpec, engine: EngineInfo) -> list[tuple[str, str, str]]:
    """(array, what, reason) of everything asked for that this engine cannot give at all."""
    known = engine.members
    out: list[tuple[str, str, str]] = []
    whole = (
        (spec.prompt_logits, PROMPT_LOGITS, "all positions", known.prompt_logits_unsupported),
        (spec.hidden_states, HIDDEN_STATES, "all layers", known.hidden_states_unsupported),
        (spec.router, ROUTER_EXPERT, "all layers", known.router_unsupported),
    )
    for wanted, array, what, reason in whole:
        if wanted is not None and (engine.logits_unsupported or reason):
            out.append((array, what, engine.logits_unsupported or reason or ""))
    if spec.router is not None and not known.router_unsupported:
        asked = spec.router.layers
        layers = [layer for layer in known.routers if asked is None or layer.index in asked]
        out += [(ROUTER_EXPERT, f"layer {layer.index}", layer.unsupported) for layer in layers if layer.unsupported]
    return out
