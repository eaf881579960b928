"""Who sent a request, with and without proxies between."""

from __future__ import annotations

import pytest

from tracer.clients import find_client, parse_networks
from tracer.errors import SettingsError

PROXIES = parse_networks("10.0.0.0/8, 127.0.0.1,fd00::/8")


def client(peer: str, *forwarded: str, trusted: bool = True, **others: str) -> tuple[str, bool]:
    headers = [(b"X-Forwarded-For", line.encode()) for line in forwarded]
    headers += [(name.replace("_", "-").encode(), value.encode()) for name, value in others.items()]
    scope = {"client": (peer, 1234), "server": ("10.0.0.1", 80), "headers": headers}
    found = find_client(scope, PROXIES if trusted else ())
    return found.address, not found.remote


@pytest.mark.parametrize(
    ("peer", "lines", "expected"),
    [
        ("10.0.0.2", ["203.0.113.9"], ("203.0.113.9", False)),
        ("10.0.0.2", ["127.0.0.9"], ("127.0.0.9", True)),
        ("10.0.0.2", ["127.0.0.9, 203.0.113.9"], ("203.0.113.9", False)),  # What the client itself wrote comes first.
        ("10.0.0.2", ["127.0.0.9, 203.0.113.9, 10.1.1.1"], ("203.0.113.9", False)),
        ("10.0.0.2", ["127.0.0.9", "203.0.113.9"], ("203.0.113.9", False)),
        ("::ffff:10.0.0.2", ["203.0.113.9:4711"], ("203.0.113.9", False)),
        ("fd00::1", ["[2001:db8::7]:443"], ("2001:db8::7", False)),
        ("fd00::1", ["[::1]"], ("::1", True)),
        ("10.0.0.2", ["10.0.0.3"], ("10.0.0.2", False)),
        ("10.0.0.2", [], ("10.0.0.2", False)),
        ("10.0.0.2", ["127.0.0.9, unknown"], ("10.0.0.2", False)),
        ("10.0.0.2", [""], ("10.0.0.2", False)),
        ("127.0.0.1", [], ("127.0.0.1", False)),  # The host itself is a proxy here.
        ("203.0.113.9", ["127.0.0.9"], ("203.0.113.9", False)),
        ("127.0.0.7", [], ("127.0.0.7", True)),
        ("127.0.0.7", ["127.0.0.7"], ("127.0.0.7", False)),
    ],
)
def test_addresses(peer: str, lines: list[str], expected: tuple[str, bool]) -> None:
    assert client(peer, *lines) == expected


def test_without_trusted_proxies_no_header_is_believed() -> None:
    assert client("127.0.0.1", trusted=False) == ("127.0.0.1", True)
    assert client("127.0.0.1", "127.0.0.1", trusted=False) == ("127.0.0.1", False)
    assert client("127.0.0.1", trusted=False, Forwarded="for=127.0.0.1") == ("127.0.0.1", False)


def test_a_trusted_proxy_is_not_believed_in_other_headers() -> None:
    assert client("10.0.0.2", X_Real_IP="127.0.0.1", Forwarded="for=127.0.0.1") == ("10.0.0.2", False)


def test_a_long_chain_is_not_walked() -> None:
    assert client("10.0.0.2", ", ".join(["127.0.0.9", *["10.0.0.3"] * 100_000])) == ("10.0.0.2", False)


def test_networks_that_are_none() -> None:
    assert parse_networks(" ") == ()
    with pytest.raises(SettingsError, match=r"TENSORSPAN_TRUSTED_PROXIES=10\.0\.0\.1/8"):
        parse_networks("10.0.0.1/8")
