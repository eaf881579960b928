"""OpenTelemetry tracing that sees inside the model.

`capture(...)` records an offline `LLM`; `open_capture(...)` reads what was recorded, by whomever. Importing this
package imports nothing heavy: each name below loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tracer.offline import CaptureRun, capture
    from tracer.reader import Capture, find_captures, open_capture

__all__ = ["Capture", "CaptureRun", "__version__", "capture", "find_captures", "open_capture"]

__version__: Final = "0.1.0"

_HOME: Final = {
    "Capture": "tracer.reader",
    "CaptureRun": "tracer.offline",
    "capture": "tracer.offline",
    "find_captures": "tracer.reader",
    "open_capture": "tracer.reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(import_module(_HOME[name]), name)
