"""Named secrets: who may capture, who may read, how much, and whose captures they see.

`TENSORSPAN_CAPTURE_KEY` and `TENSORSPAN_READ_KEY` hold one secret each; `TENSORSPAN_KEYS_FILE` names any number:

    [alice]
    sha256 = "…"                    # of the secret, in hexadecimal; or key = "…", the secret itself
    may = ["capture", "read"]       # both if left out
    reads = "own"                   # only what was captured with this key; "all" if left out
    captures_per_minute = 60        # 0 or left out: no limit of its own
    capture_mb_per_hour = 2000
"""

from __future__ import annotations

import hmac
import logging
import re
import stat
import tomllib
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from tracer.config import Settings
from tracer.errors import SettingsError

__all__ = ["Key", "KeyRing"]

LOG: Final = logging.getLogger("vllm.tensorspan")
RIGHTS: Final = ("capture", "read")
NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""A key's name is written into spans and captures."""
HEX: Final = re.compile(r"[0-9a-fA-F]{64}")
FIELDS: Final = ("key", "sha256", "may", "reads", "captures_per_minute", "capture_mb_per_hour")


@dataclass(frozen=True, slots=True)
class Key:
    """What the holder of one secret may do; the secret itself is forgotten."""

    name: str
    digest: bytes
    """SHA-256 of the secret."""
    may: frozenset[str]
    only_own: bool = False
    """True if it reads only what was captured with it."""
    captures_per_minute: float = 0.0
    """0: no limit of its own."""
    capture_mb_per_hour: float = 0.0


class KeyRing:
    """The keys of one process; the file is read again when it has changed."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError if the file cannot be used."""
        self._path = Path(settings.keys_file).expanduser() if settings.keys_file else None
        self._fixed = tuple(
            Key("default", _digest(secret), frozenset({right}))
            for secret, right in ((settings.capture_key, "capture"), (settings.read_key, "read"))
            if secret
        )
        self._stamp: tuple[int, int, int] | None = None
        self._named: tuple[Key, ...] = ()
        if self._path is not None:
            self._stamp, self._named = _stamp(self._path), read_keys(self._path)

    def find(self, secret: str, right: str) -> Key | None:
        """The key that `secret` opens, if it has that right; takes the same time whichever key it is, or none."""
        given, found = _digest(secret), None
        for key in self._keys():
            if hmac.compare_digest(given, key.digest) and right in key.may:
                found = key
        return found

    def current(self, key: Key) -> Key | None:
        """What that key may do now; None if it was taken away."""
        return next((now for now in self._keys() if (now.name, now.digest) == (key.name, key.digest)), None)

    def has(self, right: str) -> bool:
        """True if any key has that right."""
        return any(right in key.may for key in self._keys())

    def _keys(self) -> tuple[Key, ...]:
        if self._path is not None:
            self._look(self._path)
        return (*self._fixed, *self._named)

    def _look(self, path: Path) -> None:
        """A changed file counts at once; one that cannot be used changes nothing, and the log says so once."""
        try:
            stamp = _stamp(path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._named = read_keys(path)
        except SettingsError as error:
            LOG.error("tensorspan: %s; the keys that were read before stay", error)  # noqa: TRY400 - no trace: a file is at fault


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; SettingsError names what is wrong with it, never a secret."""
    try:
        mode = path.stat().st_mode
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        # The decoder's own words quote the line, and the line may hold a secret.
        cause = error.strerror if isinstance(error, OSError) else "it is not TOML in UTF-8"
        raise SettingsError(f"TENSORSPAN_KEYS_FILE={path}: {cause}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"TENSORSPAN_KEYS_FILE={path} can be read by others; repair: chmod 600 {path}")
    return tuple(_key(path, name, entry) for name, entry in content.items())


def _key(path: Path, name: str, entry: Any) -> Key:
    where = f"TENSORSPAN_KEYS_FILE={path}, [{name[:64]}]"
    if NAME.fullmatch(name) is None or name == "default":
        raise SettingsError(f"{where}: a key's name is 1 to 64 letters, digits, dots, dashes, and not `default`")
    if not isinstance(entry, dict) or not set(entry) <= set(FIELDS):
        raise SettingsError(f"{where}: a key has only {', '.join(FIELDS)}")
    may, reads = entry.get("may", list(RIGHTS)), entry.get("reads", "all")
    if not isinstance(may, list) or not set(map(str, may)) <= set(RIGHTS):
        raise SettingsError(f"{where}: `may` lists {' and '.join(RIGHTS)}")
    if reads not in ("all", "own"):
        raise SettingsError(f'{where}: `reads` is "all" or "own"')
    limits = [entry.get(limit, 0) for limit in FIELDS[4:]]
    if any(type(limit) not in (int, float) or not 0 <= limit < float("inf") for limit in limits):
        raise SettingsError(f"{where}: `captures_per_minute` and `capture_mb_per_hour` are numbers, 0 for no limit")
    return Key(name, _secret(where, entry), frozenset(may), reads == "own", *map(float, limits))


def _secret(where: str, entry: dict[str, Any]) -> bytes:
    plain, hashed = entry.get("key"), entry.get("sha256")
    if isinstance(plain, str) and plain and hashed is None:
        return _digest(plain)
    if isinstance(hashed, str) and HEX.fullmatch(hashed) and plain is None:
        return bytes.fromhex(hashed)
    raise SettingsError(f"{where}: either `key`, a secret, or `sha256`, its 64 hexadecimal digits")


def _digest(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise SettingsError(f"TENSORSPAN_KEYS_FILE={path}: {error.strerror}") from None
    return found.st_mtime_ns, found.st_size, found.st_ino
