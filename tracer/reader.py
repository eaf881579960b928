"""Find captures and open them: by path, or by store and the ID of a generation span, a step span or a trace.

cap = open_capture("captures", "b7ad6b7169203331")
cap.tokens; cap.logits; cap.attention[12]; cap.row(step=7, layer=12, head=3); cap.to_xarray()
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr

from tracer import config, remote, schema
from tracer.capture_data import Capture
from tracer.capture_files import CaptureFiles
from tracer.capture_parts import Alternative, AttentionLayers, Step, Token
from tracer.damage import check_attributes, reading
from tracer.errors import CaptureNotFoundError, DamagedError, FormatError
from tracer.span_index import find_span, known_captures
from tracer.store_files import read_metadata, step_spans

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
DAMAGED: Final = "damaged"
BATCH: Final = 256
"""Captures of a bucket whose steps are looked through at once."""


@dataclass(frozen=True, slots=True)
class CaptureEntry:
    """One capture of a store, from its group's metadata alone."""

    path: str
    """Path or URL, for `open_capture`."""
    trace_id: str
    span_id: str
    model: str
    status: str
    """`ok`, `aborted`, `error`, `interrupted`, `failed`, `open` if the writer has not finished (or died), `damaged`."""
    complete: bool
    prompt_tokens: int
    output_tokens: int | None
    """None before the writer has finished."""
    start_ns: int
    arrays: tuple[str, ...]
    """The big arrays, by name; empty before the writer has finished."""
    owner: str = ""
    """Name of the key with which it was captured."""


def open_capture(store: str | os.PathLike[str], span_id: str | None = None) -> Capture:
    """Open one capture, lazily.

    store: a capture's own path or URL; or a store root together with `span_id`: the ID of a generation span, of a
    step span (`Capture.step_index` then says which row it wrote), of a trace that holds exactly one generation, or
    `<trace_id>/<span_id>` as in the `Trace-Capture-Ref` header.

    In a bucket (`s3://bucket/prefix`) a generation is found by one request, a step's own ID only by reading every
    capture's: `<trace_id>/<span_id>` or the generation's ID is what to keep.

    Raises CaptureNotFoundError naming what exists, FormatError if it was written in another format or version,
    DamagedError naming the file that does not hold what it should, StoreError if the bucket cannot be read,
    MissingExtraError without the extra `s3`.
    """
    root = _root(store)
    if span_id is None:
        return _open(_only(root, _captures_below(root)) if _kind(root) in ("store", "trace") else root)
    wanted = span_id.lower()
    trace, _, generation = wanted.rpartition("/")
    if schema.is_trace_id(wanted):
        return _open(_only(wanted, _captures_below(f"{root}/{wanted}")))
    if not schema.is_span_id(generation) or (trace and not schema.is_trace_id(trace)):
        raise CaptureNotFoundError(f"{span_id!r} is neither a span ID (16 hexadecimal digits) nor a trace ID (32)")
    if trace and (found := _generation(root, trace, generation)) is not None:
        return found
    return _by_span(root, generation, only_steps=bool(trace))


def find_captures(root: str | os.PathLike[str]) -> list[CaptureEntry]:
    """All captures of a store, newest first; groups in other formats are left out.

    One whose own metadata are damaged has the status `damaged` and the IDs of its place; nothing else is known of it.
    """
    found = []
    paths = list(_captures_below(_root(root)))
    for path, content in zip(paths, _all_metadata(paths), strict=True):
        attributes = _dictionary(content.get("attributes"))
        if (attributes.get("format"), attributes.get("version")) == (schema.FORMAT, schema.VERSION):
            found.append(_entry(path, attributes, content))
    return sorted(found, key=lambda entry: -entry.start_ns)


def _entry(path: str, attributes: dict[str, Any], content: dict[str, Any]) -> CaptureEntry:
    try:
        with reading(path):
            check_attributes(path, attributes)
            arrays = (content.get("consolidated_metadata") or {}).get("metadata", {})
            names = tuple(name for name, array in sorted(arrays.items()) if len(array["shape"]) > 1)
    except DamagedError:
        trace, _, span = path.rpartition("/")
        return CaptureEntry(
            path, trace.rpartition("/")[2], span, "", DAMAGED, complete=False, prompt_tokens=0, output_tokens=None,
            start_ns=0, arrays=(),
        )  # fmt: skip
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
        arrays=names,
        owner=str(attributes.get("owner", "")),
    )


def _open(path: str, step_index: int | None = None) -> Capture:
    try:
        if config.is_remote(path):
            group = remote.open_group(path)
        else:
            files = CaptureFiles(path, read_only=True)
            group = zarr.open_group(files, mode="r", zarr_format=3)
            files.expect(group.attrs.get("checksums"))
    except FileNotFoundError as error:
        raise CaptureNotFoundError(f"no capture at {path}; `tensorspan list` shows the captures of a store") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is not a Zarr v3 group: {error}") from error
    return Capture(path, group, step_index)


def _is_inside(root: str, path: str) -> bool:
    """False for a capture of that store to which a symbolic link leads: it may be anywhere."""
    return config.is_remote(root) or not (Path(path).is_symlink() or Path(path).parent.is_symlink())


def _generation(root: str, trace: str, generation: str) -> Capture | None:
    """The capture of that generation span, if the store has it; `trace` may be empty."""
    for where in (f"{root}/{trace}",) if trace else _traces_of(root, generation):
        path = f"{where}/{generation}"
        if config.is_remote(root):  # Asking for its kind first would be one more request.
            with contextlib.suppress(CaptureNotFoundError):
                return _open(path)
        elif _is_inside(root, path) and _kind(path) == "capture":
            return _open(path)
    return None


def _by_span(root: str, span_id: str, *, only_steps: bool) -> Capture:
    """By the store's index, if it has one, checked against the capture; what it does not know is searched."""
    known: Container[str] = ()
    if not config.is_remote(root):
        for name in find_span(root, span_id):
            path = str(name.below(Path(root)))
            if not _is_inside(root, path):
                continue
            if name.span_id == span_id and not only_steps and _kind(path) == "capture":
                return _open(path)
            rows = np.flatnonzero(_spans_of(path) == np.uint64(int(span_id, 16)))
            if len(rows):
                return _open(path, int(rows[0]))
        known = {str(name.below(Path(root))) for name in known_captures(root)}
    return _search(root, span_id, known, only_steps=only_steps)


def _search(root: str, span_id: str, known: Container[str], *, only_steps: bool) -> Capture:
    """Look into every trace for the generation, then into the `span_id` arrays of captures that are not `known`."""
    found = None if only_steps else _generation(root, "", span_id)
    if found is not None:
        return found
    paths = list(_captures_below(root))
    for path in paths:
        if path.endswith(f"/{span_id}") and config.is_remote(root):  # It was copied there without the index.
            return _open(path)
    for path, spans in _step_spans(root, [path for path in paths if path not in known]):
        rows = np.flatnonzero(spans == np.uint64(int(span_id, 16)))
        if len(rows):
            return _open(path, int(rows[0]))
    raise CaptureNotFoundError(f"no capture in {root} has span {span_id}, as generation or as step; {_listing(paths)}")


def _step_spans(root: str, paths: list[str]) -> Iterator[tuple[str, Any]]:
    """Each capture with its uint64 [step]; empty for one that is not closed.

    The array is one raw chunk (docs/store-format.md): reading that is 100 times faster than opening an array.
    """
    if config.is_remote(root):
        for some in _batches(paths):
            raw = remote.read([f"{path}/span_id/c.0" for path in some])
            yield from zip(some, (np.frombuffer(data or b"", "<u8") for data in raw), strict=True)
        return
    yield from ((path, _spans_of(path)) for path in paths)


def _spans_of(path: str) -> Any:
    raw = step_spans(Path(path))
    return np.frombuffer(raw, "<u8", len(raw) // 8)


def _batches(paths: list[str]) -> Iterator[list[str]]:
    for at in range(0, len(paths), BATCH):
        yield paths[at : at + BATCH]


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


def _root(store: str | os.PathLike[str]) -> str:
    """A path or a bucket's URL, without a slash at its end."""
    name = os.fspath(store)
    return (str(config.local_path(name)) if name.startswith("file://") else name).rstrip("/")


def _traces_of(root: str, generation: str) -> list[str]:
    """Where the generation may be: in a bucket the index says it, in a directory looking is as fast."""
    if config.is_remote(root):
        return [f"{root}/{trace}" for trace in remote.indexed_traces(root, generation)]
    return _children([root])[0]


def _captures_below(location: str) -> Iterator[str]:
    """Captures of a store or of one trace."""
    below = _children([location])[0]
    traces = [child for child in below if schema.is_trace_id(child.rpartition("/")[2])]
    for child in [*(path for paths in _children(traces) for path in paths), *below]:
        if schema.is_span_id(child.rpartition("/")[2]):
            yield child


def _children(locations: list[str]) -> list[list[str]]:
    """Groups below each group, by name."""
    if locations and config.is_remote(locations[0]):
        found = remote.children(locations)
    else:
        found = [_folders(Path(location)) for location in locations]
    return [[f"{where}/{name}" for name in names] for where, names in zip(locations, found, strict=True)]


def _folders(path: Path) -> list[str]:
    """Its own directories: what a link leads to is not the store's."""
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))


def _kind(location: str) -> str | None:
    """`store`, `trace` or `capture`; None for anything else."""
    kind = _dictionary(_all_metadata([location])[0].get("attributes")).get("kind")
    return kind if isinstance(kind, str) else None


def _all_metadata(locations: list[str]) -> list[dict[str, Any]]:
    """Each group's `zarr.json`; empty if there is none."""
    if locations and config.is_remote(locations[0]):
        return [_parsed(data) for data in remote.read([f"{location}/zarr.json" for location in locations])]
    return [_parsed(_file(Path(location) / "zarr.json")) for location in locations]


def _file(path: Path) -> bytes | None:
    try:
        return read_metadata(path)
    except OSError:
        return None


def _parsed(data: bytes | None) -> dict[str, Any]:
    try:
        return _dictionary(json.loads(data or b"{}"))
    except (ValueError, RecursionError):
        return {}


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
