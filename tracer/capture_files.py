"""The files of one capture as Zarr reads them, noticing when the capture is removed."""

from __future__ import annotations

import os

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from tracer.damage import damaged
from tracer.errors import CaptureNotFoundError
from tracer.store_files import GROUP, is_plain

__all__ = ["CaptureFiles", "removed"]


class CaptureFiles(LocalStore):
    """The directory of one capture; reads raise CaptureNotFoundError once it has been removed.

    To Zarr a file that is not there is a chunk of fill values. That is right only as long as the group is there.
    """

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As LocalStore's, of a capture that still exists."""
        self._check_place(key)
        return self._checked(key, await super().get(key, prototype, byte_range))

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As LocalStore's, of a capture that still exists."""
        self._check_place(key)
        return self._checked(key, super().get_sync(key, prototype=prototype, byte_range=byte_range))

    def _check_place(self, key: str) -> None:
        """Raise DamagedError for a link out of the capture, and for a pipe, which would be waited for."""
        place = self.root
        for part in key.split("/"):
            place = place / part
            if os.path.lexists(place) and not is_plain(place):
                raise damaged(str(place), "it is a link, a pipe or a device")

    def _checked(self, key: str, value: Buffer | None) -> Buffer | None:
        if value is None and not (self.root / GROUP).exists():
            raise removed(str(self.root))
        if value is None and key.endswith("/c.0"):  # The one chunk of a flat array, which is there before its metadata.
            raise damaged(str(self.root / key), "the file is gone")
        return value


def removed(location: str) -> CaptureNotFoundError:
    """The error of whoever still has a capture open that is gone."""
    return CaptureNotFoundError(
        f"no capture at {location} any more: it was removed or moved after it had been opened; "
        "`tensorspan list` shows the captures of a store"
    )
