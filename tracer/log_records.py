"""One line of our own log on its way to the exporter process."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LogLine"]


@dataclass(frozen=True, slots=True)
class LogLine:
    """What one of our loggers said in a process of vLLM's; never a line of vLLM's own, which may hold prompts."""

    time_ns: int
    level: int
    """As `logging` has it: 30 is a warning."""
    logger: str
    text: str
    exception: str = ""
    """Class of the exception that was logged with it. Its message stays here: it may quote anything."""
    trace_id: str = ""
    """Empty outside a request."""
    span_id: str = ""
    sampled: bool = False
