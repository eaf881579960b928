"""What the metrics need of generations that have neither spans nor a capture: one small record at their end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["PlainGeneration"]


@dataclass(frozen=True, slots=True)
class PlainGeneration:
    """A finished generation of which nothing else was recorded: numbers and names, no content."""

    model: str
    operation: str
    """GenAI `gen_ai.operation.name`."""
    start_ns: int
    parent_span_id: str | None = None
    """The request that it belongs to, whose RequestSpan follows; None offline."""
    choice: int = 0
    prompt_tokens: int = 0
    end_ns: int = 0
    status: Literal["ok", "aborted", "error"] = "ok"
    error: str = ""
    output_tokens: int = 0
    first_token_ns: int | None = None
