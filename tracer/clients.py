"""Where a request really comes from, as far as that can be known behind proxies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final

from tracer.errors import SettingsError

__all__ = ["Client", "Headers", "find_client", "header_lines", "parse_networks"]

Headers = Sequence[tuple[bytes, bytes]]
Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

FORWARDING: Final = (b"forwarded", b"x-real-ip", b"via", b"x-client-ip", b"true-client-ip", b"cf-connecting-ip")
"""A request with one of these, or with any `X-Forwarded-*`, came through a proxy."""
MAX_HOPS: Final = 32
"""Proxies that are looked through."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who sent a request."""

    address: str
    """The peer's, or what trusted proxies say; empty on a Unix socket and where it is unknown."""
    remote: str = ""
    """Why it cannot be taken for one on this host; empty if it can."""


def parse_networks(text: str) -> tuple[Network, ...]:
    """Networks of `TENSORSPAN_TRUSTED_PROXIES`, separated by commas; SettingsError if one is none."""
    out = []
    for part in (part.strip() for part in text.split(",")):
        try:
            out += [ip_network(part)] if part else []
        except ValueError as error:
            raise SettingsError(
                f"TENSORSPAN_TRUSTED_PROXIES={text}: {error}; it lists addresses or networks, such as 10.0.0.0/8"
            ) from None
    return tuple(out)


def header_lines(headers: Headers, name: bytes) -> list[str]:
    """Every value of header `name`, in order."""
    return [value.decode("latin-1") for key, value in headers if key.lower() == name]


def find_client(scope: Mapping[str, Any], trusted: Sequence[Network] = ()) -> Client:
    """The client of the ASGI connection `scope`.

    Forwarding headers count only from a peer in `trusted`, and there only `X-Forwarded-For`, to which each proxy adds
    the address it saw at the end: read backwards, the first one that no trusted proxy has is the client. Everything
    further left was written by that client itself.
    """
    peer, server = scope.get("client"), scope.get("server")
    host = str(peer[0]) if peer is not None else ""
    headers: Headers = scope["headers"]
    if host and _is_in(_address(host), trusted):
        return _behind(host, headers, trusted)
    for name in (key.lower() for key, _ in headers):
        if name in FORWARDING or name.startswith(b"x-forwarded-"):
            return Client(host, f"this request was forwarded (it has the header {name.decode('latin-1')})")
    if peer is None and (server is None or server[1] is None):
        return Client("")  # A Unix socket: its clients have no address and are on this host.
    return _seen(host)


def _behind(host: str, headers: Headers, trusted: Sequence[Network]) -> Client:
    """The client that a trusted proxy speaks for; remote if the proxy did not say whom."""
    hops = [hop.strip() for line in header_lines(headers, b"x-forwarded-for") for hop in line.split(",")]
    for hop in reversed(hops[-MAX_HOPS:]):
        address = _address(hop)
        if address is None:
            return Client(host, "a trusted proxy forwarded it with an X-Forwarded-For that is not an address")
        if not _is_in(address, trusted):
            return _seen(str(address))
    return Client(host, "a trusted proxy forwarded it without saying for whom (X-Forwarded-For)")


def _seen(host: str) -> Client:
    address = _address(host)
    local = address is not None and address.is_loopback
    return Client(host, "" if local else f"this one is {host or 'unknown'}")


def _address(text: str) -> Address | None:
    """An address, without a port and out of its brackets; an IPv4 one that is written as IPv6 is IPv4."""
    host = text[1:].partition("]")[0] if text.startswith("[") else text
    if host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _is_in(address: Address | None, networks: Sequence[Network]) -> bool:
    return address is not None and any(address in network for network in networks)
