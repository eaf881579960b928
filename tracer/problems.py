"""What a refused request is answered with: RFC 9457 problem details."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final

from tracer.authorise import CaptureBudgetError, CaptureDeniedError
from tracer.errors import CaptureRequestError, CaptureUnavailableError, MissingExtraError

__all__ = ["REFUSALS", "Problem", "problem_of"]

REFUSALS: Final = (
    CaptureRequestError, CaptureDeniedError, CaptureBudgetError, CaptureUnavailableError, MissingExtraError
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """One answer."""

    status: int
    kind: str
    """Last part of the problem's type."""
    title: str
    capture: str
    """Value of `Trace-Capture-Status`."""
    detail: str
    more: dict[str, Any] = field(default_factory=dict)
    """Members beside those of the RFC."""

    @property
    def body(self) -> bytes:
        """As `application/problem+json`."""
        content = {
            "type": f"urn:tensorspan:problem:{self.kind}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        return json.dumps(content | self.more).encode()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the response, lower case."""
        out = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(self.body))]
        if "retry_after" in self.more:
            out.append((b"retry-after", b"%d" % self.more["retry_after"]))
        return out


def problem_of(error: Exception) -> Problem:
    """The answer to one of `REFUSALS`."""
    text = str(error)
    match error:
        case CaptureRequestError():
            more = {"member": error.member, "allowed": error.allowed, "example": error.example}
            return Problem(400, "malformed", "Capture request not understood", "off", text, more)
        case CaptureDeniedError():
            return Problem(403, "denied", "Capture not allowed", "denied", text)
        case CaptureBudgetError():
            return Problem(429, "budget", "Capture budget spent", "denied", text, {"retry_after": error.seconds})
        case _:
            return Problem(501, "unavailable", "Capture not available", "unavailable", text)
