"""The files of one capture as Zarr reads them, noticing when the capture is removed."""

from __future__ import annotations

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from tracer.errors import CaptureNotFoundError
from tracer.store_files import GROUP

__all__ = ["CaptureFiles", "removed"]


class CaptureFiles(LocalStore):
    """The directory of one capture; reads raise CaptureNotFoundError once it has been removed.

    To Zarr a file that is not there is a chunk of fill values. That is right only as long as the group is there.
    """

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As LocalStore's, of a capture that still exists."""
        return self._checked(await super().get(key, prototype, byte_range))

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As LocalStore's, of a capture that still exists."""
        return self._checked(super().get_sync(key, prototype=prototype, byte_range=byte_range))

    def _checked(self, value: Buffer | None) -> Buffer | None:
        if value is None and not (self.root / GROUP).exists():
            raise removed(str(self.root))
        return value


def removed(location: str) -> CaptureNotFoundError:
    """The error of whoever still has a capture open that is gone."""
    return CaptureNotFoundError(
        f"no capture at {location} any more: it was removed or moved after it had been opened; "
        "`tensorspan list` shows the captures of a store"
    )
