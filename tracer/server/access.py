"""Who may read over HTTP: clients on this host without a key, all others with one."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Any, Final

from tracer.authorise import Gate
from tracer.clients import header_lines
from tracer.errors import TensorspanError
from tracer.keys import Key

__all__ = ["COOKIE", "READ_HEADER", "ReadDeniedError", "Reader", "Readers"]

READ_HEADER: Final = b"trace-read-key"
COOKIE: Final = "tensorspan_session"
SESSION_SECONDS: Final = 12 * 3600.0
MAX_SESSIONS: Final = 1024
"""The oldest one ends when there is another."""


class ReadDeniedError(TensorspanError):
    """This client may not read; the text says what it lacks."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Somebody who may read."""

    key: Key | None
    """None for a client on this host."""

    def may_open(self, owner: str) -> bool:
        """True if captures made with the key of that name may be seen."""
        return self.key is None or not self.key.only_own or owner == self.key.name


class Readers:
    """Judges requests; remembers browsers that have shown a key, in this process alone."""

    def __init__(self, gate: Gate, clock: Callable[[], float] = time.monotonic) -> None:
        self._gate = gate
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, tuple[Key, float]] = OrderedDict()

    def admit(self, scope: Mapping[str, Any]) -> Reader:
        """The reader behind the ASGI connection `scope`; raises ReadDeniedError.

        A local client must have asked for this host by a local name: a page from elsewhere whose name was pointed at
        this host (DNS rebinding) is a local client too, in the browser of somebody who is.
        """
        headers = scope["headers"]
        given = header_lines(headers, READ_HEADER)
        if given:
            key = self._gate.keys.find(given[0], "read") if len(given) == 1 else None
            if key is None:
                raise ReadDeniedError("the key in the header Trace-Read-Key is none of this server's reading keys")
            return Reader(key)
        if (session := self._session(headers)) is not None:
            return Reader(session)
        remote = self._gate.client(scope).remote
        if not remote and _is_local_name(header_lines(headers, b"host")):
            return Reader(None)
        cause = remote or "this one asked for the host by a name that is not local"
        raise ReadDeniedError(
            f"only clients on the server's host read without a key, and {cause}; repair: send a reading key in the "
            "header Trace-Read-Key, or open /tensorspan/login in a browser; the operator sets TENSORSPAN_READ_KEY or "
            "TENSORSPAN_KEYS_FILE"
        )

    def log_in(self, secret: str) -> str:
        """A new session's token for a reading key; raises ReadDeniedError."""
        key = self._gate.keys.find(secret, "read")
        if key is None:
            raise ReadDeniedError("this is none of this server's reading keys")
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._sessions[token] = (key, self._clock() + SESSION_SECONDS)
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return token

    def _session(self, headers: Any) -> Key | None:
        """The key that a session was begun with, as long as both last."""
        try:
            cookies = SimpleCookie("; ".join(header_lines(headers, b"cookie")))
        except CookieError:
            return None
        token = cookies[COOKIE].value if COOKIE in cookies else ""
        with self._lock:
            key, until = self._sessions.get(token, (None, 0.0))
        current = None if key is None or self._clock() > until else self._gate.keys.current(key)
        return current if current is not None and "read" in current.may else None


def _is_local_name(hosts: list[str]) -> bool:
    """True for the one `Host` of a request that was sent to `localhost` or a loopback address."""
    if len(hosts) != 1:
        return False
    name = hosts[0].strip().lower()
    host = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
