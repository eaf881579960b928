"""The grammar of `Trace-Capture`: text to `CaptureSpec`, back again, and against what the engine has.

The text is an RFC 9651 Dictionary with the members of `_PARAMETERS`, the same in the header, in the request field
`vllm_xargs.trace_capture` and offline. A member that is not understood is refused, never ignored: an answer without the
tensors that were asked for cannot be generated a second time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NoReturn, cast

from tracer.errors import CaptureRequestError, CaptureUnavailableError, MissingExtraError
from tracer.ranks import UNAVAILABLE, whole_engines
from tracer.records import (
    ArrayDtype,
    AttentionSpec,
    CaptureSpec,
    EngineInfo,
    HiddenSpec,
    LayerInfo,
    LogitsSpec,
    QKSpec,
    RouterSpec,
)

__all__ = ["MAX_TEXT", "beam_search_refusal", "check_capture", "embeddings_refusal", "format_capture", "parse_capture"]

MAX_TEXT: Final = 4096
"""Bytes of a request's text."""
MAX_INDEX: Final = 1023
"""Largest head index that is read at all: a range is expanded before the model's heads are known."""

_PARAMETERS: Final = {
    "logits": ("top", "dtype"),
    "attention": ("heads", "rows", "dtype"),
    "qk": ("rows", "dtype"),
    "summary": (),
    "prompt_logits": ("top", "dtype"),
    "hidden_states": ("rows", "dtype"),
    "router": ("rows",),
}
_LISTED: Final = ("attention", "qk", "hidden_states", "router")
"""Members that may have an inner list of layers."""
_MEMBERS: Final = ", ".join(_PARAMETERS)
_EXAMPLES: Final = {
    "logits": "logits;top=256",
    "attention": 'attention=(0 14);heads="0-3,7";rows=all',
    "qk": "qk=(0 14);rows=all",
    "prompt_logits": "prompt_logits;top=256",
    "hidden_states": "hidden_states=(0 14);rows=all",
    "router": "router=(0 14);rows=all",
}
_RANGE: Final = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


def parse_capture(text: str) -> CaptureSpec | None:
    """What `text` asks for; None if that is nothing (empty, or every member off).

    Raises CaptureRequestError for text that is malformed, too long, or has an unknown member or parameter, and
    MissingExtraError without http-sf.
    """
    fields = _dictionary(text)
    for name, (value, parameters) in fields.items():
        _check_member(name, value, parameters)
    on = {name: field for name, field in fields.items() if field[0] is not False}
    spec = CaptureSpec(
        logits=_logits("logits", on["logits"][1]) if "logits" in on else None,
        attention=_attention(*on["attention"]) if "attention" in on else None,
        summary="summary" in on,
        qk=_qk(*on["qk"]) if "qk" in on else None,
        prompt_logits=_logits("prompt_logits", on["prompt_logits"][1]) if "prompt_logits" in on else None,
        hidden_states=_hidden(*on["hidden_states"]) if "hidden_states" in on else None,
        router=_router(*on["router"]) if "router" in on else None,
    )
    return None if spec == CaptureSpec() else spec


def format_capture(spec: CaptureSpec) -> str:
    """The canonical text of `spec`: `parse_capture` gives an equal one back."""
    members = []
    if spec.logits is not None:
        members.append(_format_logits("logits", spec.logits))
    if (attention := spec.attention) is not None:
        layers = _format_layers(attention.layers)
        heads = "" if attention.heads is None else f';heads="{_ranges(attention.heads)}"'
        members.append(f"attention{layers}{heads}{_format_rows(attention.rows)}{_format_dtype(attention.dtype)}")
    for name, item in (("qk", spec.qk), ("hidden_states", spec.hidden_states)):
        if item is not None:
            dtype = "" if item.dtype is None else f";dtype={item.dtype}"
            members.append(f"{name}{_format_layers(item.layers)}{_format_rows(item.rows)}{dtype}")
    if spec.router is not None:
        members.append(f"router{_format_layers(spec.router.layers)}{_format_rows(spec.router.rows)}")
    if spec.prompt_logits is not None:
        members.append(_format_logits("prompt_logits", spec.prompt_logits))
    if spec.summary:
        members.append("summary")
    return ", ".join(members)


def beam_search_refusal(example: str) -> CaptureRequestError:
    """The answer to a capture of beam search; `example` is how its caller switches that off."""
    return CaptureRequestError(
        "beam search cannot be captured: every beam and step is a generation of its own; "
        f"allowed: sampling; example: {example}",
        member="use_beam_search",
        allowed="false",
    )


def embeddings_refusal() -> CaptureRequestError:
    """The answer to a capture of a prompt that is no tokens."""
    return CaptureRequestError(
        "a prompt of embeddings cannot be captured: it has no tokens; allowed: text or token IDs; example: prompt",
        member="prompt_embeds",
        allowed="text or token IDs",
    )


def check_capture(spec: CaptureSpec, engines: Sequence[EngineInfo]) -> None:
    """Refuse what the engines of these workers cannot give, before anything is generated.

    Raises CaptureRequestError if the model lacks it, CaptureUnavailableError if this server cannot capture it.
    """
    engines = whole_engines(engines)
    if not engines:
        raise CaptureUnavailableError("no worker has reported what it can capture; see tensorspan doctor")
    if spec.logits is not None:
        for engine in engines:
            _refuse_if("logits", engine.logits_unsupported)
        _check_top("logits", spec.logits, engines)
    if spec.wants_attention:
        member = "attention" if spec.attention is not None else "summary"
        for engine in engines:
            _refuse_if(member, engine.attention_unsupported)
        _check_attention(member, spec.attention or AttentionSpec(), _layers(engines))
    if spec.qk is not None:
        for engine in engines:
            _refuse_if("qk", engine.attention_unsupported)
        _check_attention("qk", AttentionSpec(layers=spec.qk.layers), _layers(engines))
        _check_same_shape(spec.qk, _layers(engines))
    for engine in engines:
        _check_members(spec, engine)
    if spec.prompt_logits is not None:
        _check_top("prompt_logits", spec.prompt_logits, engines)


def _check_members(spec: CaptureSpec, engine: EngineInfo) -> None:
    """Prompt logits, hidden states and choices of experts."""
    known = engine.members
    if spec.prompt_logits is not None:
        _refuse_if("prompt_logits", engine.logits_unsupported or known.prompt_logits_unsupported)
    if spec.hidden_states is not None:
        _refuse_if("hidden_states", engine.logits_unsupported or known.hidden_states_unsupported)
        last = known.hidden_states - 1
        for index in spec.hidden_states.layers or ():
            if index > last:
                allowed = f"this model has 0-{last}: what the first layer reads, and what each layer leaves"
                _refuse("hidden_states", f"index {index} is out of range", allowed, f"hidden_states=({last})")
    if spec.router is not None:
        _refuse_if("router", engine.logits_unsupported or known.router_unsupported)
        reasons = {layer.index: layer.unsupported for layer in known.routers}
        for index in spec.router.layers or ():
            if index not in reasons:
                allowed = f"this model has experts in layers {_ranges(sorted(reasons))}"
                _refuse("router", f"layer {index} has no router", allowed, f"router=({max(reasons)})")
            _refuse_if("router", reasons[index], f"layer {index}: ")


def _dictionary(text: str) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """(value, parameters) of each member."""
    if not text.strip(" \t"):
        return {}
    if len(text) > MAX_TEXT:
        _refuse("", f"the text is {len(text)} characters long", f"at most {MAX_TEXT}")
    try:
        import http_sf
    except ImportError as error:
        raise MissingExtraError("serve", "http-sf") from error
    try:
        parsed = cast(dict[str, Any], http_sf.parse(text.encode("ascii"), tltype="dictionary"))
    # Dates out of range are the library's only other way to fail.
    except (ValueError, ArithmeticError, OSError) as error:
        _refuse("", f"not an RFC 9651 Dictionary: {error}", f"the members {_MEMBERS}, separated by commas")
    return {name: field if isinstance(field, tuple) else (field, {}) for name, field in parsed.items()}


def _check_member(name: str, value: Any, parameters: Mapping[str, Any]) -> None:
    """Refuse an unknown member, a value that no member has, and an unknown parameter."""
    if name not in _PARAMETERS:
        _refuse(name, "unknown member", _MEMBERS)
    listed = name in _LISTED
    if not (isinstance(value, bool) or (listed and isinstance(value, list))):
        layers = ", an inner list of layers" if listed else ""
        _refuse(name, f"the value {_show(value)} is not understood", f"the bare word{layers}, or ?0 (off)")
    for parameter in parameters:
        if parameter not in _PARAMETERS[name]:
            _refuse(name, f"unknown parameter {parameter!r}", ", ".join(_PARAMETERS[name]) or "no parameters")


def _logits(member: str, parameters: Mapping[str, Any]) -> LogitsSpec:
    top = parameters.get("top")
    if top is not None and (type(top) is not int or top < 1):
        _refuse(member, f"top={_show(top)}", "top=K with a whole number K of at least 1")
    return LogitsSpec(top, _dtype(member, parameters))


def _attention(value: Any, parameters: Mapping[str, Any]) -> AttentionSpec:
    return AttentionSpec(
        layers=None if value is True else _layer_list("attention", value),
        heads=_head_list(parameters["heads"]) if "heads" in parameters else None,
        rows=_rows("attention", parameters),
        dtype=_dtype("attention", parameters),
    )


def _qk(value: Any, parameters: Mapping[str, Any]) -> QKSpec:
    return QKSpec(
        layers=None if value is True else _layer_list("qk", value),
        rows=_rows("qk", parameters),
        dtype=_dtype("qk", parameters) if "dtype" in parameters else None,
    )


def _hidden(value: Any, parameters: Mapping[str, Any]) -> HiddenSpec:
    return HiddenSpec(
        layers=None if value is True else _layer_list("hidden_states", value),
        rows=_rows("hidden_states", parameters),
        dtype=_dtype("hidden_states", parameters) if "dtype" in parameters else None,
    )


def _router(value: Any, parameters: Mapping[str, Any]) -> RouterSpec:
    return RouterSpec(None if value is True else _layer_list("router", value), _rows("router", parameters))


def _rows(member: str, parameters: Mapping[str, Any]) -> Any:
    return _word(member, "rows", parameters, ("decode", "all"))


def _layer_list(member: str, items: list[tuple[Any, Mapping[str, Any]]]) -> tuple[int, ...]:
    for value, parameters in items:
        if type(value) is not int or value < 0 or parameters:
            _refuse(member, f"{_show(value)} is not a layer", "layer numbers from 0, e.g. (0 14 29)")
    if not items:
        _refuse(member, "the list of layers is empty", "at least one layer, or the bare word for all")
    return tuple(sorted({value for value, _ in items}))


def _head_list(text: Any) -> tuple[int, ...]:
    heads: set[int] = set()
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_INDEX:
            allowed = f'a quoted list of heads and ranges from 0 to {MAX_INDEX}, e.g. heads="0-3,7"'
            _refuse("attention", f"heads={_show(text)}", allowed)
        heads.update(range(first, last + 1))
    return tuple(sorted(heads))


def _dtype(member: str, parameters: Mapping[str, Any]) -> ArrayDtype:
    return cast(ArrayDtype, _word(member, "dtype", parameters, ("f16", "f32")))


def _word(member: str, name: str, parameters: Mapping[str, Any], choices: tuple[str, ...]) -> str:
    """The parameter as one of `choices`, the first of which is the default."""
    value = parameters.get(name, choices[0])
    # Tokens and strings both compare equal to `str`; which of the two was written does not matter.
    chosen = next((choice for choice in choices if value == choice), None)
    if chosen is None:
        _refuse(member, f"{name}={_show(value)}", f"{name}={'|'.join(choices)}")
    return chosen


def _refuse(member: str, problem: str, allowed: str, example: str = "") -> NoReturn:
    example = example or _EXAMPLES.get(member, "logits, attention")
    where = f"Trace-Capture member {member!r}" if member else "Trace-Capture"
    detail = f"{where}: {problem}; allowed: {allowed}; example: {example}"
    raise CaptureRequestError(detail, member=member, allowed=allowed, example=example)


def _refuse_if(member: str, reason: str | None, where: str = "") -> None:
    if reason is None:
        return
    if reason.startswith(UNAVAILABLE):
        cause = reason.removeprefix(UNAVAILABLE).strip()
        detail = f"{member} cannot be captured on this server: {where}{cause}"
        raise CaptureUnavailableError(f"{detail}; see tensorspan doctor")
    other = "attention" if member == "logits" else "logits"
    _refuse(member, f"impossible on this model: {where}{reason}", "what the model has", other)


def _check_top(member: str, logits: LogitsSpec, engines: Sequence[EngineInfo]) -> None:
    vocabulary = min(engine.vocab_size for engine in engines)
    if logits.top is not None and logits.top > vocabulary > 0:
        allowed = f"top=1 to top={vocabulary}"
        _refuse(member, f"top={logits.top} exceeds the vocabulary", allowed, f"{member};top={min(256, vocabulary)}")


def _layers(engines: Sequence[EngineInfo]) -> dict[int, LayerInfo]:
    """Every layer by index; one that any engine cannot capture counts as unsupported."""
    out: dict[int, LayerInfo] = {}
    for layer in (layer for engine in engines for layer in engine.layers):
        if layer.index not in out or layer.unsupported is not None:
            out[layer.index] = layer
    return out


def _check_attention(member: str, spec: AttentionSpec, layers: Mapping[int, LayerInfo]) -> None:
    for index in spec.layers or ():
        _check_layer(member, index, layers)
    chosen = list(layers.values()) if spec.layers is None else [layers[index] for index in spec.layers]
    able = _capturable(chosen)
    if not able:
        _refuse_if(member, next((layer.unsupported for layer in chosen), "it has no attention layers"))
    most = max(layer.num_heads for layer in able)
    for head in spec.heads or ():
        if head >= most:
            allowed, example = f"this model has heads 0-{most - 1}", f'attention;heads="0-{most - 1}"'
            _refuse(member, f"head {head} is out of range", allowed, example)


def _check_same_shape(spec: QKSpec, layers: Mapping[int, LayerInfo]) -> None:
    """One array holds the queries of all layers: they must be of one shape."""
    chosen = _capturable(layers.values() if spec.layers is None else [layers[index] for index in spec.layers])
    shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_size): layer.index for layer in chosen}
    if len(shapes) > 1:
        first, second = list(shapes.values())[:2]
        detail = f"layers {first} and {second} differ in heads or head size"
        _refuse("qk", detail, "layers of one shape", f"qk=({first})")


def _check_layer(member: str, index: int, layers: Mapping[int, LayerInfo]) -> None:
    if index in layers:
        _refuse_if(member, layers[index].unsupported, f"layer {index}: ")
        return
    there = f"layers {_ranges(sorted(layers))}" if layers else "no attention layers"
    able = _capturable(layers.values())
    example = f"attention=({max(layer.index for layer in able)})" if able else "logits"
    _refuse(member, f"layer {index} is out of range", f"this model has {there}", example)


def _capturable(layers: Iterable[LayerInfo]) -> list[LayerInfo]:
    return [layer for layer in layers if layer.unsupported is None]


def _ranges(numbers: Iterable[int]) -> str:
    """Ascending `numbers` as `0-3,7`."""
    ordered = list(numbers)
    starts = [0, *(at + 1 for at, (left, right) in enumerate(pairwise(ordered)) if right != left + 1)]
    runs = [ordered[first:last] for first, last in pairwise([*starts, len(ordered)])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if run)


def _format_layers(layers: tuple[int, ...] | None) -> str:
    return "" if layers is None else f"=({' '.join(map(str, layers))})"


def _format_logits(member: str, spec: LogitsSpec) -> str:
    return f"{member}{'' if spec.top is None else f';top={spec.top}'}{_format_dtype(spec.dtype)}"


def _format_rows(rows: str) -> str:
    return ";rows=all" if rows == "all" else ""


def _format_dtype(dtype: ArrayDtype) -> str:
    return "" if dtype == "f16" else f";dtype={dtype}"


def _show(value: Any) -> str:
    """A value as it might have been written, cut to a length that an error may have."""
    if isinstance(value, bool):
        return "?1" if value else "?0"
    return str(value)[:80]
