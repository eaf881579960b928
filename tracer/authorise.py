"""Who may capture: the policy `TENSORSPAN_CAPTURE`, keys, and what they have left of their budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tracer.budgets import Budgets
from tracer.clients import Client, find_client, header_lines, parse_networks
from tracer.config import Settings
from tracer.errors import SettingsError, TensorspanError
from tracer.keys import Key, KeyRing

__all__ = ["KEY_HEADER", "CaptureBudgetError", "CaptureDeniedError", "Gate"]

KEY_HEADER: Final = b"trace-capture-key"


class CaptureDeniedError(TensorspanError):
    """The server's settings do not let this client capture; the text names the setting."""


class CaptureBudgetError(TensorspanError):
    """Nothing is left of a budget; the text names it."""

    def __init__(self, detail: str, seconds: int) -> None:
        super().__init__(detail)
        self.seconds = seconds
        """Until it is worth to ask again."""


@dataclass(frozen=True, slots=True)
class Gate:
    """The policy of one server process."""

    settings: Settings
    keys: KeyRing
    budgets: Budgets
    proxies: tuple[Any, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Gate:
        """Raises SettingsError if captures need a key and there is none, or a setting cannot be used."""
        keys = KeyRing(settings)
        if settings.capture == "key" and not keys.has("capture"):
            raise SettingsError(
                "TENSORSPAN_CAPTURE=key needs a secret; set TENSORSPAN_CAPTURE_KEY, or TENSORSPAN_KEYS_FILE with a key "
                "that may capture"
            )
        return cls(settings, keys, Budgets(settings), parse_networks(settings.trusted_proxies))

    def client(self, scope: Mapping[str, Any]) -> Client:
        """Who sent the request of the ASGI connection `scope`."""
        return find_client(scope, self.proxies)

    def authorise(self, scope: Mapping[str, Any]) -> Key | None:
        """The key with which the client of `scope` may capture; None where the policy asks for none.

        A reverse proxy on the same host that adds no forwarding header cannot be told from a local client: behind one,
        the operator needs the policy `key`. Raises CaptureDeniedError.
        """
        policy = self.settings.capture
        if policy == "off":
            raise CaptureDeniedError("captures are switched off by TENSORSPAN_CAPTURE=off on this server")
        if policy == "loopback" and (cause := self.client(scope).remote):
            raise CaptureDeniedError(
                f"TENSORSPAN_CAPTURE=loopback lets only clients on the server's host capture, and {cause}; "
                "repair: send the request from that host, or let the operator set TENSORSPAN_CAPTURE=key or all"
            )
        return self._key(scope) if policy == "key" else None

    def _key(self, scope: Mapping[str, Any]) -> Key:
        lines = header_lines(scope["headers"], KEY_HEADER)
        found = self.keys.find(_text(lines[0]), "capture") if len(lines) == 1 else None
        if found is None:
            given = "another value" if lines else "no such header"
            raise CaptureDeniedError(
                "TENSORSPAN_CAPTURE=key expects one of this server's capture keys in the header Trace-Capture-Key, "
                f"and the request has {given}"
            )
        return found

    def admit(self, key: Key | None) -> None:
        """Take one capture from the budgets; raises CaptureBudgetError if one has nothing left."""
        spent = self.budgets.admit(key)
        if spent is not None:
            raise CaptureBudgetError(
                f"nothing is left of {spent.whose}; repair: repeat the request in {spent.seconds} s, or without the "
                "capture, or let the operator raise the limit",
                spent.seconds,
            )


def _text(value: str) -> str:
    """A header's value as the client wrote it: most write UTF-8, which a server reads as Latin-1."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return value
