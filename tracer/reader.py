"""Find captures and open them: by path, or by store and the ID of a generation span, a step span or a trace.

cap = open_capture("captures", "b7ad6b7169203331")
cap.tokens; cap.logits; cap.attention[12]; cap.row(step=7, layer=12, head=3); cap.to_xarray()
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from zarr.errors import ZarrUserWarning

from tracer import schema
from tracer.capture_data import Capture
from tracer.capture_files import CaptureFiles
from tracer.capture_parts import Alternative, AttentionLayers, Step, Token
from tracer.errors import CaptureNotFoundError, FormatError
from tracer.span_index import find_span, known_captures
from tracer.store_files import step_spans

__all__ = [
    "Alternative",
    "AttentionLayers",
    "Capture",
    "CaptureEntry",
    "Step",
    "Token",
    "find_captures",
    "open_capture",
]

MANY: Final = 10
"""Captures that an error message lists."""


@dataclass(frozen=True, slots=True)
class CaptureEntry:
    """One capture of a store, from its group's metadata alone."""

    path: str
    """Path or URL, for `open_capture`."""
    trace_id: str
    span_id: str
    model: str
    status: str
    """`ok`, `aborted`, `error`, `interrupted`, `failed`, or `open` if the writer has not finished (or died)."""
    complete: bool
    prompt_tokens: int
    output_tokens: int | None
    """None before the writer has finished."""
    start_ns: int
    arrays: tuple[str, ...]
    """The big arrays, by name; empty before the writer has finished."""


def open_capture(store: str | os.PathLike[str], span_id: str | None = None) -> Capture:
    """Open one capture, lazily.

    store: a capture's own path or URL; or a store root together with `span_id`: the ID of a generation span, of a
    step span (`Capture.step_index` then says which row it wrote), of a trace that holds exactly one generation, or
    `<trace_id>/<span_id>` as in the `Trace-Capture-Ref` header.

    Raises CaptureNotFoundError naming what exists, FormatError if it was written in another format or version.
    """
    root = os.fspath(store).rstrip("/")
    if span_id is None:
        return _open(_only(root, _captures_below(root)) if _kind(root) in ("store", "trace") else root)
    wanted = span_id.lower()
    trace, _, generation = wanted.rpartition("/")
    if schema.is_trace_id(wanted):
        return _open(_only(wanted, _children(f"{root}/{wanted}")))
    if not schema.is_span_id(generation) or (trace and not schema.is_trace_id(trace)):
        raise CaptureNotFoundError(f"{span_id!r} is neither a span ID (16 hexadecimal digits) nor a trace ID (32)")
    if trace and _kind(f"{root}/{trace}/{generation}") == "capture":
        return _open(f"{root}/{trace}/{generation}")
    return _by_span(root, generation, only_steps=bool(trace))


def find_captures(root: str | os.PathLike[str]) -> list[CaptureEntry]:
    """All captures of a store, newest first; groups in other formats are left out."""
    found = []
    for path in _captures_below(os.fspath(root).rstrip("/")):
        content = _metadata(path)
        attributes = content.get("attributes", {})
        if (attributes.get("format"), attributes.get("version")) == (schema.FORMAT, schema.VERSION):
            found.append(_entry(path, attributes, content))
    return sorted(found, key=lambda entry: -entry.start_ns)


def _entry(path: str, attributes: dict[str, Any], content: dict[str, Any]) -> CaptureEntry:
    arrays = (content.get("consolidated_metadata") or {}).get("metadata", {})
    return CaptureEntry(
        path=path,
        trace_id=attributes["trace_id"],
        span_id=attributes["span_id"],
        model=attributes["model"],
        status=attributes.get("status", "open"),
        complete=attributes["complete"],
        prompt_tokens=attributes["prompt_tokens"],
        output_tokens=attributes.get("output_tokens"),
        start_ns=attributes["start_ns"],
        arrays=tuple(name for name in sorted(arrays) if name.startswith(("logits", "attention"))),
    )


def _open(path: str, step_index: int | None = None) -> Capture:
    try:
        store = path if _is_url(path) else CaptureFiles(path, read_only=True)
        group = zarr.open_group(store, mode="r", zarr_format=3)
    except FileNotFoundError as error:
        raise CaptureNotFoundError(f"no capture at {path}; `tensorspan list` shows the captures of a store") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is not a Zarr v3 group: {error}") from error
    return Capture(path, group, step_index)


def _by_span(root: str, span_id: str, *, only_steps: bool) -> Capture:
    """By the store's index, if it has one, checked against the capture; what it does not know is searched."""
    known: Container[str] = ()
    if not _is_url(root):
        for name in find_span(root, span_id):
            path = str(name.below(Path(root)))
            if name.span_id == span_id and not only_steps and _kind(path) == "capture":
                return _open(path)
            rows = np.flatnonzero(_step_spans(path) == np.uint64(int(span_id, 16)))
            if len(rows):
                return _open(path, int(rows[0]))
        known = {str(name.below(Path(root))) for name in known_captures(root)}
    return _search(root, span_id, known, only_steps=only_steps)


def _search(root: str, span_id: str, known: Container[str], *, only_steps: bool) -> Capture:
    """Look into every trace for the generation, then into the `span_id` arrays of captures that are not `known`."""
    candidates = () if only_steps else (f"{trace}/{span_id}" for trace in _children(root))
    generation = next((path for path in candidates if _kind(path) == "capture"), None)
    if generation is not None:
        return _open(generation)
    paths = list(_captures_below(root))
    for path in (path for path in paths if path not in known):
        rows = np.flatnonzero(_step_spans(path) == np.uint64(int(span_id, 16)))
        if len(rows):
            return _open(path, int(rows[0]))
    raise CaptureNotFoundError(f"no capture in {root} has span {span_id}, as generation or as step; {_listing(paths)}")


def _step_spans(path: str) -> Any:
    """uint64 [step]; empty for a capture that is not closed."""
    if not _is_url(path):  # The array is one raw chunk (docs/store-format.md): 100 times faster than opening it.
        raw = step_spans(Path(path))
        return np.frombuffer(raw, "<u8", len(raw) // 8)
    group = zarr.open_group(path, mode="r", zarr_format=3)
    return np.asarray(group["span_id"]) if "span_id" in group else np.empty(0, "<u8")


def _only(name: str, paths: Iterable[str]) -> str:
    found = list(paths)
    if len(found) != 1:
        raise CaptureNotFoundError(f"{name} does not hold exactly one capture; {_listing(found)}")
    return found[0]


def _listing(paths: list[str]) -> str:
    if not paths:
        return "it holds none"
    names = ", ".join("/".join(path.split("/")[-2:]) for path in paths[:MANY])
    return f"it holds {len(paths)}: {names}{', ...' if len(paths) > MANY else ''}"


def _captures_below(location: str) -> Iterator[str]:
    """Captures of a store or of one trace."""
    for child in _children(location):
        name = child.rpartition("/")[2]
        if schema.is_trace_id(name):
            yield from (path for path in _children(child) if schema.is_span_id(path.rpartition("/")[2]))
        elif schema.is_span_id(name):
            yield child


def _children(location: str) -> list[str]:
    """Groups below a group, by name."""
    names: list[str] = []
    if _is_url(location):
        with contextlib.suppress(FileNotFoundError), warnings.catch_warnings():
            # About what lies in a store and is no group: the index, `spans`.
            warnings.simplefilter("ignore", ZarrUserWarning)
            names = sorted(zarr.open_group(location, mode="r", zarr_format=3).group_keys())
    else:
        path = Path(location)
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if path.is_dir() else []
    return [f"{location}/{name}" for name in names]


def _kind(location: str) -> str | None:
    """`store`, `trace` or `capture`; None for anything else."""
    kind = _metadata(location).get("attributes", {}).get("kind")
    return kind if isinstance(kind, str) else None


def _metadata(location: str) -> dict[str, Any]:
    """The group's `zarr.json`; empty if there is none."""
    try:
        if _is_url(location):
            return {"attributes": dict(zarr.open_group(location, mode="r", zarr_format=3).attrs)}
        content = json.loads((Path(location) / "zarr.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_url(location: str) -> bool:
    return "://" in location
