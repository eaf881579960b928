"""What a reader may believe of a store: damaged or hostile files end in a DamagedError, not in somebody else's error.

Bounds come before work: what a capture's metadata declare is compared with what a capture can be before anything of
that size is made. docs/store-format.md says which damage no check can see.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from tracer import schema
from tracer.errors import DamagedError, TensorspanError

__all__ = ["MAX_TOKENS", "check_attributes", "damaged", "reading"]

MAX_TOKENS: Final = 1 << 24
"""Prompt tokens, and steps, that a capture may declare: a million times less than an integer can."""
RAISED: Final = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    EOFError,
    struct.error,
    IsADirectoryError,
    NotADirectoryError,
)
"""What Zarr, its codecs, xarray and NumPy raise of bytes that are not what they should be."""
FACTS: Final[Mapping[str, type | tuple[type, ...]]] = {
    "trace_id": str,
    "span_id": str,
    "model": str,
    "operation": str,
    "complete": bool,
    "closed": bool,
    "prompt_tokens": int,
    "start_ns": int,
    "regions": list,
    "capture": dict,
    "engine": (dict, type(None)),
}
"""Attributes that every capture of version 1 has."""
CLOSED: Final[Mapping[str, type | tuple[type, ...]]] = {"missing": list, "output_tokens": int, "status": str}
"""Attributes that a closed one has besides; `failed` ones have the first alone for sure."""


def damaged(location: str, what: str) -> DamagedError:
    """The error of a file or group at `location`."""
    return DamagedError(f"{location} is damaged: {what}; copy it again from where it is whole, or remove this capture")


@contextmanager
def reading(location: str) -> Iterator[None]:
    """Raise DamagedError for what the libraries below raise of damaged bytes; errors of ours pass."""
    try:
        yield
    except TensorspanError:
        raise
    except RAISED as error:
        text = " ".join(str(error).split())[:200]
        raise damaged(location, f"{type(error).__name__}: {text}") from error


def check_attributes(location: str, attributes: Mapping[str, Any]) -> None:
    """Raise DamagedError unless those are a capture's attributes, of the right types and within bounds."""
    _check_types(location, attributes, FACTS)
    if attributes["closed"]:
        _check_types(location, attributes, CLOSED if attributes.get("status") != "failed" else {"missing": list})
    for name, is_id in (("trace_id", schema.is_trace_id), ("span_id", schema.is_span_id)):
        if not is_id(attributes[name]):
            raise damaged(location, f"attribute {name} is not an ID in hexadecimal digits")
    for name in ("prompt_tokens", "output_tokens"):
        if not 0 <= attributes.get(name, 0) <= MAX_TOKENS:
            raise damaged(location, f"attribute {name} is not from 0 to {MAX_TOKENS}")
    if not 0 <= attributes["start_ns"] < 1 << 63:
        raise damaged(location, "attribute start_ns is no time")
    with reading(f"{location}, attribute regions"):
        for region in attributes["regions"]:
            _check_region(region, attributes["prompt_tokens"])
    with reading(f"{location}, attribute missing"):
        for entry in attributes.get("missing", ()):
            if not all(isinstance(entry[name], str) for name in ("array", "what", "reason")):
                raise TypeError("an entry is not three texts")
    _check_asked(location, attributes)


def _check_types(location: str, attributes: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, kind in wanted.items():
        value = attributes.get(name, wanted)  # Never of a right type, as against null.
        if value is wanted:
            raise damaged(location, f"attribute {name} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise damaged(location, f"attribute {name} is {type(value).__name__}")


def _check_region(region: Mapping[str, Any], prompt_tokens: int) -> None:
    role, start, end = region["role"], region["start"], region["end"]
    if set(region) != {"role", "start", "end"} or not isinstance(role, str):
        raise TypeError("a region is not role, start and end")
    if not (type(start) is int and type(end) is int and 0 <= start <= end <= prompt_tokens):
        raise ValueError("a region is outside the prompt")


def _check_asked(location: str, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes["capture"].items():
        if not isinstance(value, dict | bool | None):
            raise damaged(location, f"attribute capture says {type(value).__name__} of {name}")
    layers = (attributes["engine"] or {}).get("layers", [])
    with reading(f"{location}, attribute engine"):
        for layer in layers:
            if not all(type(layer[name]) is int for name in ("index", "num_heads")):
                raise TypeError("a layer's numbers are not whole")
            float(layer["scale"])
