"""What a capture says about itself: the group's attributes and the small arrays written at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporters.ledger import ranges
from tracer import schema
from tracer.member_layouts import COUNTED, MEMBER_ARRAYS, member_layout, member_limits
from tracer.member_records import PROMPT_ARRAYS
from tracer.records import (
    AttentionSpec,
    CaptureSpec,
    EngineInfo,
    GenerationEnd,
    GenerationStart,
    LayerInfo,
    QKSpec,
    StepRecord,
)
from tracer.schema import COORDINATES, ROW_CONVENTION, STEP_NUMBERS, ArrayLayout

__all__ = [
    "AttentionAxes",
    "Numbers",
    "attention_axes",
    "end_attributes",
    "key_capacity",
    "limits",
    "limits_said",
    "number_columns",
    "numbers_of",
    "prompt_layout",
    "prompt_lengths",
    "row_layout",
    "start_attributes",
    "stored_facts",
    "token_text",
]

Array = NDArray[Any]
Numbers = tuple[int | float, ...]
UNKNOWN_TOKENS: Final = 4096
"""Output tokens that attention has room for when neither `max_tokens` nor the model's limit is known."""
QK: Final = (schema.QUERY, schema.KEY, schema.QUERY_PROMPT, schema.KEY_PROMPT)
LOST: Final[Numbers] = tuple(number.fill for number in STEP_NUMBERS.values())
NAN: Final = float("nan")


class AttentionAxes(NamedTuple):
    """What the stored layer and head axes stand for: the model's indices."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    refused: tuple[LayerInfo, ...]
    """Layers that were asked for and cannot be captured."""


def attention_axes(spec: AttentionSpec | None, engine: EngineInfo | None) -> AttentionAxes | None:
    """The axes the worker uses for that request; None if the engine has not introduced itself."""
    spec = spec or AttentionSpec()
    if engine is None:
        known = spec.layers is not None and spec.heads is not None
        return AttentionAxes(spec.layers or (), spec.heads or (), ()) if known else None
    asked = [layer for layer in engine.layers if spec.layers is None or layer.index in spec.layers]
    return AttentionAxes(
        tuple(layer.index for layer in asked if layer.unsupported is None),
        spec.heads or tuple(range(engine.num_heads)),
        tuple(layer for layer in asked if layer.unsupported is not None),
    )


def key_capacity(start: GenerationStart, engine: EngineInfo | None) -> int:
    """Most keys that a row of this generation can have."""
    limit = engine.max_model_len if engine is not None else 0
    if start.max_tokens is None:
        return max(limit, start.prompt_tokens) or start.prompt_tokens + UNKNOWN_TOKENS
    wanted = start.prompt_tokens + start.max_tokens
    return min(wanted, limit) if limit else wanted


def row_layout(
    name: str, shape: tuple[int, ...], start: GenerationStart, engine: EngineInfo | None, axes: AttentionAxes | None
) -> ArrayLayout | None:
    """The array over `step` of that name for rows of that shape; None if the capture cannot have it."""
    spec = start.capture
    assert spec is not None
    if name in QK:
        return _qk_layout(name, shape, spec, engine)
    if name in MEMBER_ARRAYS:
        return member_layout(name, shape, spec, engine)
    layout: ArrayLayout | None = None
    match name, shape:
        case schema.LOGITS, (vocab,) if spec.logits is not None:
            layout = schema.logits_layout(vocab, spec.logits.dtype)
        case schema.LOGITS_TOPK, (k,) if spec.logits is not None:
            layout = schema.logits_topk_layout(k, spec.logits.dtype)
        case schema.LOGITS_TOPK_ID, (k,) if spec.logits is not None:
            layout = schema.logits_topk_id_layout(k)
        case schema.ATTENTION, (layers, heads, _) if spec.attention is not None and _agree(axes, layers, heads):
            capacity = key_capacity(start, engine)
            layout = schema.attention_layout(layers, heads, start.prompt_tokens, capacity, spec.attention.dtype)
        case schema.ATTENTION_SUMMARY, (layers, heads, _) if _agree(axes, layers, heads):
            layout = schema.attention_summary_layout(layers, heads)
    return layout


def _agree(axes: AttentionAxes | None, layers: int, heads: int) -> bool:
    return axes is None or (layers, heads) == (len(axes.layers), len(axes.heads))


def _qk_layout(name: str, shape: tuple[int, ...], spec: CaptureSpec, engine: EngineInfo | None) -> ArrayLayout | None:
    if spec.qk is None or len(shape) != 3 or name not in schema.asked_arrays(spec):
        return None
    return schema.qk_layout(name, *shape, qk_dtype(spec.qk, engine))


def qk_dtype(spec: QKSpec, engine: EngineInfo | None) -> str:
    """`f16` or `f32`, as the worker decides it."""
    return spec.dtype or ("f32" if engine is not None and engine.dtype == "float32" else "f16")


def prompt_lengths(start: GenerationStart) -> dict[str, int]:
    """Rows of the arrays that go by the prompt's positions: all before the last, which is step 0."""
    names = (schema.QUERY_PROMPT, schema.KEY_PROMPT, *PROMPT_ARRAYS)
    return dict.fromkeys(names, max(start.prompt_tokens - 1, 0))


def limits(spec: CaptureSpec, engine: EngineInfo | None) -> list[tuple[str, str, str]]:
    """(array, what, reason) of everything asked for that this engine cannot give at all."""
    out: list[tuple[str, str, str]] = []
    if engine is None:
        return out
    if engine.logits_unsupported and spec.logits is not None:
        out.append((schema.LOGITS, "all steps", engine.logits_unsupported))
    asked = [(schema.ATTENTION, spec.attention or AttentionSpec())] if spec.wants_attention else []
    asked += [(schema.QUERY, AttentionSpec(spec.qk.layers))] if spec.qk is not None else []
    for array, wanted in asked:
        if engine.attention_unsupported:
            out.append((array, "all layers", engine.attention_unsupported))
        axes = attention_axes(wanted, engine)
        refused = axes.refused if axes is not None else ()
        out += [(array, f"layer {layer.index}", layer.unsupported or "") for layer in refused]
    return out + member_limits(spec, engine)


def limits_said(spec: CaptureSpec, engine: EngineInfo | None) -> list[str]:
    """`limits` in words, the layers of one reason together: `attention layers 0, 2-4: reason`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for array, what, reason in limits(spec, engine):
        groups.setdefault((array, reason), []).append(what)
    return [f"{array} {_together(whats)}: {reason}" for (array, reason), whats in groups.items()]


def _together(whats: list[str]) -> str:
    numbers = [what.removeprefix("layer ") for what in whats]
    return ranges("layer", map(int, numbers)) if all(map(str.isdecimal, numbers)) else ", ".join(whats)


def stored_facts(
    arrays: Mapping[str, Mapping[str, Any]], overflow: Mapping[str, int], engine: EngineInfo | None
) -> dict[str, dict[str, Any]]:
    """Attribute `stored`: per array what precision the values had, have, and what that cost."""
    source = engine.dtype if engine is not None else "unknown"
    out: dict[str, dict[str, Any]] = {}
    for name, metadata in arrays.items():
        kind = metadata["data_type"]
        if name in (schema.ATTENTION, schema.ATTENTION_PREFILL):
            out[name] = {"source_dtype": "float32", "stored_dtype": kind}
        elif name in (schema.LOGITS, schema.LOGITS_TOPK, *QK, *COUNTED):
            out[name] = {"source_dtype": source, "stored_dtype": kind, "overflow": overflow[name]}
    return out


def prompt_layout(start: GenerationStart, axes: AttentionAxes | None) -> ArrayLayout | None:
    """The prompt's own map; None if it was not asked for or its axes are not known."""
    spec = start.capture.attention if start.capture is not None else None
    if spec is None or spec.rows != "all" or axes is None or not start.prompt_tokens:
        return None
    return schema.attention_prefill_layout(len(axes.layers), len(axes.heads), start.prompt_tokens, spec.dtype)


def start_attributes(start: GenerationStart, engine: EngineInfo | None) -> dict[str, Any]:
    """Attributes known before the first step; `complete` and `closed` are false."""
    assert start.capture is not None
    return {
        "trace_id": start.trace_id,
        "span_id": start.span_id,
        "traced": start.sampled,
        "request_id": start.request_id,
        "owner": start.owner,
        "operation": start.operation,
        "choice": start.choice,
        "model": start.model,
        "engine": _engine(engine),
        "capture": asdict(start.capture),
        "prompt_tokens": start.prompt_tokens,
        "max_tokens": start.max_tokens,
        "start_ns": start.start_ns,
        "regions": [asdict(region) for region in start.regions],
        "row_convention": ROW_CONVENTION,
        "coordinates": COORDINATES,
        "complete": False,
        "closed": False,
    }


def _engine(engine: EngineInfo | None) -> dict[str, Any] | None:
    if engine is None:
        return None
    names = ("model", "vllm_version", "runner", "device", "dtype", "vocab_size", "max_model_len")
    # Not `asdict`: its deep copies cost 1 ms for 30 layers.
    layers = [{name: getattr(layer, name) for name in LayerInfo.__slots__} for layer in engine.layers]
    return {name: getattr(engine, name) for name in names} | {"layers": layers}


def end_attributes(
    end: GenerationEnd, status: str, missing: list[dict[str, str]], dropped: Mapping[str, Any]
) -> dict[str, Any]:
    """Attributes that replace those of the start once the writer has finished."""
    return {
        "output_tokens": end.output_tokens,
        "cached_tokens": end.cached_tokens,
        "end_ns": end.end_ns,
        "status": status,
        "finish_reason": end.finish_reason,
        "error": end.error,
        "missing": missing,
        "dropped": dict(dropped),
        "complete": not missing and dropped["count"] == 0,
        "closed": True,
    }


def numbers_of(record: StepRecord) -> Numbers:
    """One value per entry of STEP_NUMBERS, in its order."""
    row = record.logits
    seen = (NAN, NAN, NAN, NAN, -1) if row is None else (row.logprob, row.entropy, row.margin, row.varentropy, row.rank)
    return (
        int(record.step_span_id, 16),
        -1 if record.token_id is None else record.token_id,
        record.position,
        record.attempt,
        record.kv_len,
        record.end_ns,
        *seen,
    )


def number_columns(numbers: Mapping[int, Numbers], end: GenerationEnd) -> dict[str, Array]:
    """The one-dimensional arrays over `step`; the client's token IDs win over the worker's."""
    rows = [numbers.get(step, LOST) for step in range(end.output_tokens)]
    columns = list(zip(*rows, strict=True)) or [()] * len(STEP_NUMBERS)
    out = {
        name: np.array(column, dtype=number.dtype)
        for (name, number), column in zip(STEP_NUMBERS.items(), columns, strict=True)
    }
    known = end.output_token_ids[: end.output_tokens]
    out["token_id"][: len(known)] = known
    return out


def token_text(start: GenerationStart, end: GenerationEnd) -> tuple[Array, Array] | None:
    """(bytes uint8, offsets int64) of prompt and output tokens; None unless the bytes of all of them are known."""
    tokens = (*start.prompt_token_bytes, *end.output_token_bytes[: end.output_tokens])
    if not tokens or len(tokens) != start.prompt_tokens + end.output_tokens:
        return None
    edges = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.cumsum([len(token) for token in tokens], out=edges[1:])
    return np.frombuffer(b"".join(tokens), dtype=np.uint8), edges
