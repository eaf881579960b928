"""How fine the step spans of a request are: `TENSORSPAN_STEP_SPANS` and the header `Trace-Steps`."""

from __future__ import annotations

import re
from typing import Final

from tracer.errors import CaptureRequestError

__all__ = ["HEADER", "parse_step_spans"]

HEADER: Final = b"trace-steps"
MOST: Final = 1_000_000
ALLOWED: Final = "all, every:N with N from 1 to 1000000, or summary"


def parse_step_spans(text: str, where: str = "Trace-Steps") -> int:
    """Every how many output tokens a step has a span of its own: 1 for `all`, 0 for `summary`.

    Raises CaptureRequestError, which names `where`, for anything else.
    """
    wanted = text.strip().lower()
    if wanted in ("all", "summary"):
        return int(wanted == "all")
    match = re.fullmatch(r"every:([0-9]{1,7})", wanted)
    if match is None or not 0 < int(match[1]) <= MOST:
        detail = f"{where} is {text[:64]!r}; allowed: {ALLOWED}; example: every:16"
        raise CaptureRequestError(detail, member=where, allowed=ALLOWED, example="every:16")
    return int(match[1])
