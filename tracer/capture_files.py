"""The files of one capture in a directory, as a Zarr store that can tell a hole from a fill value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from tracer.errors import CaptureNotFoundError, DamagedError, TensorspanError
from tracer.store_files import GROUP

__all__ = ["CaptureFiles", "read", "removed"]

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
        return self._checked(key, await super().get(key, prototype, byte_range), byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As LocalStore's, of a capture that still exists."""
        return self._checked(key, super().get_sync(key, prototype=prototype, byte_range=byte_range), byte_range)

    def _checked(self, key: str, value: Buffer | None, byte_range: ByteRequest | None) -> Buffer | None:
        if value is None and not (self.root / GROUP).exists():
            raise removed(str(self.root))
        expected = self._expected.get(key)
        if expected is not None and byte_range is None:
            found = None if value is None else google_crc32c.value(value.to_bytes())
            if found != expected:
                what = "is missing" if value is None else "does not hold what was written (CRC-32C)"
                raise DamagedError(f"{self.root / key} {what}; repair: take the capture from a copy, or remove it")
        return value


def read(array: zarr.Array[Any], key: Any) -> NDArray[Any]:
    """`array[key]`; DamagedError where a chunk cannot be decoded or is not what its checksum says."""
    try:
        return np.asarray(array[key])
    except (RuntimeError, ValueError) as error:
        if isinstance(error, TensorspanError):
            raise
        raise DamagedError(
            f"{array.store_path} cannot be decoded: {error}; repair: take the capture from a copy, or remove it"
        ) from error


def removed(location: str) -> CaptureNotFoundError:
    """The error of whoever still has a capture open that is gone."""
    return CaptureNotFoundError(
        f"no capture at {location} any more: it was removed or moved after it had been opened; "
        "`tensorspan list` shows the captures of a store"
    )
