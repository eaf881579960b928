"""Files of captures in a local store: which path a URL means, and nothing outside of a capture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from tracer import schema
from tracer.errors import CaptureNotFoundError

__all__ = ["capture_directory", "capture_file"]

NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""A file or folder of a Zarr group as we write it."""
MAX_DEPTH: Final = 8


def capture_directory(root: Path, trace_id: str, span_id: str) -> Path:
    """The directory of that capture; CaptureNotFoundError for anything else, a symbolic link for example."""
    if schema.is_trace_id(trace_id) and schema.is_span_id(span_id):
        real = root.resolve()
        path = real / trace_id / span_id
        if path.is_dir() and path.resolve() == path:
            return path
    raise CaptureNotFoundError(f"no capture {trace_id[:32]}/{span_id[:16]} in this store")


def capture_file(root: Path, trace_id: str, span_id: str, name: str) -> Path:
    """A file of that capture; CaptureNotFoundError if it is none, lies elsewhere, or is reached by a symbolic link."""
    directory, parts = capture_directory(root, trace_id, span_id), name.split("/")
    if len(parts) <= MAX_DEPTH and all(NAME.fullmatch(part) for part in parts):
        path = directory.joinpath(*parts)
        if path.is_file() and path.resolve() == path:
            return path
    raise CaptureNotFoundError(f"no such file in the capture {trace_id}/{span_id}")
