"""Who may capture: `TENSORSPAN_CAPTURE` against the client's address and headers."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from ipaddress import IPv6Address, ip_address
from typing import Any, Final

from tracer.config import Settings
from tracer.errors import TensorspanError

__all__ = ["CaptureDeniedError", "Headers", "authorise", "header_lines"]

Headers = Sequence[tuple[bytes, bytes]]

FORWARDING: Final = (b"forwarded", b"x-real-ip", b"via", b"x-client-ip", b"true-client-ip", b"cf-connecting-ip")
"""A request with one of these, or with any `X-Forwarded-*`, came through a proxy."""


class CaptureDeniedError(TensorspanError):
    """The server's settings do not let this client capture; the text names the setting."""


def authorise(settings: Settings, scope: Mapping[str, Any]) -> None:
    """Raise CaptureDeniedError unless the client of the ASGI connection `scope` may capture.

    A reverse proxy on the same host that adds no forwarding header cannot be told from a local client: behind one, the
    operator needs the policy `key`.
    """
    if settings.capture == "off":
        raise CaptureDeniedError("captures are switched off by TENSORSPAN_CAPTURE=off on this server")
    if settings.capture == "loopback" and (cause := _remoteness(scope)):
        raise CaptureDeniedError(
            f"TENSORSPAN_CAPTURE=loopback lets only clients on the server's host capture, and {cause}; "
            "repair: send the request from that host, or let the operator set TENSORSPAN_CAPTURE=key or all"
        )
    if settings.capture == "key":
        given = ",".join(header_lines(scope["headers"], b"trace-capture-key")).encode("latin-1")
        if not hmac.compare_digest(given, settings.capture_key.encode()):
            raise CaptureDeniedError(
                "TENSORSPAN_CAPTURE=key expects this server's TENSORSPAN_CAPTURE_KEY in the header "
                f"Trace-Capture-Key, and the request has {'another value' if given else 'no such header'}"
            )


def header_lines(headers: Headers, name: bytes) -> list[str]:
    """Every value of header `name`, in order."""
    return [value.decode("latin-1") for key, value in headers if key.lower() == name]


def _remoteness(scope: Mapping[str, Any]) -> str:
    """Why the client cannot be taken for one on this host; empty if it can."""
    for name in (key.lower() for key, _ in scope["headers"]):
        if name in FORWARDING or name.startswith(b"x-forwarded-"):
            return f"this request was forwarded (it has the header {name.decode('latin-1')})"
    client, server = scope.get("client"), scope.get("server")
    if client is None and (server is None or server[1] is None):
        return ""  # A Unix socket: its clients have no address and are on this host.
    return "" if client is not None and _is_loopback(client[0]) else f"this one is {client[0] if client else 'unknown'}"


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
