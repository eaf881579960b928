"""The files of one capture in a directory, as a Zarr store that can tell a hole from a fill value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import google_crc32c
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from tracer.damage import damaged
from tracer.errors import CaptureNotFoundError
from tracer.store_files import GROUP, is_plain

__all__ = ["CaptureFiles", "removed"]

CHUNK: Final = "c.0"
"""The only chunk of a small array."""


class CaptureFiles(LocalStore):
    """The directory of one capture; reads raise CaptureNotFoundError once it has been removed.

    To Zarr a file that is not there is a chunk of fill values. That is right only as long as the group is there, and
    for small arrays never: those whose checksum is known (`expect`) are compared with it, else DamagedError.
    """

    _expected: Mapping[str, int]

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self._expected = {}

    def expect(self, checksums: Any) -> None:
        """CRC-32C of each small array, as the capture's attributes have them; a capture of before has none."""
        if isinstance(checksums, Mapping):
            self._expected = {f"{name}/{CHUNK}": value for name, value in checksums.items()}

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As LocalStore's, of a capture that still exists."""
        self._check_place(key)
        return self._checked(key, await super().get(key, prototype, byte_range), byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As LocalStore's, of a capture that still exists."""
        self._check_place(key)
        return self._checked(key, super().get_sync(key, prototype=prototype, byte_range=byte_range), byte_range)

    def _check_place(self, key: str) -> None:
        """Raise DamagedError for a link out of the capture, and for a pipe, which would be waited for."""
        place = self.root
        for part in key.split("/"):
            place = place / part
            if os.path.lexists(place) and not is_plain(place):
                raise damaged(str(place), "it is a link, a pipe or a device")

    def _checked(self, key: str, value: Buffer | None, byte_range: ByteRequest | None) -> Buffer | None:
        if value is None and not (self.root / GROUP).exists():
            raise removed(str(self.root))
        if value is None and key.endswith(f"/{CHUNK}"):  # The one chunk of a flat array, there before its metadata.
            raise damaged(str(self.root / key), "the file is gone")
        expected = self._expected.get(key)
        if value is None or byte_range is not None or expected is None:
            return value
        if google_crc32c.value(value.to_bytes()) != expected:
            raise damaged(str(self.root / key), "it does not hold what was written (CRC-32C)")
        return value


def removed(location: str) -> CaptureNotFoundError:
    """The error of whoever still has a capture open that is gone."""
    return CaptureNotFoundError(
        f"no capture at {location} any more: it was removed or moved after it had been opened; "
        "`tensorspan list` shows the captures of a store"
    )
