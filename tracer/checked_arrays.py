"""The arrays of one opened capture, read through Zarr and xarray with every error named and every chunk bounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from xarray.backends import ZarrStore
from xarray.backends.zarr import ZarrArrayWrapper
from xarray.core import indexing

from tracer.bounded_codecs import bounded_array
from tracer.capture_files import removed
from tracer.damage import MAX_TOKENS, damaged, reading
from tracer.errors import DamagedError

__all__ = ["CheckedArray", "open_arrays"]

GROWING = "step"


class CheckedArray:
    """One Zarr array of a capture."""

    def __init__(self, location: str, group: zarr.Group, name: str) -> None:
        """Raise DamagedError if it is none, or declares what no capture has."""
        self.location = f"{location}/{name}"
        with reading(self.location):
            self._array = bounded_array(self.location, group[name])

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return self._array.shape

    @property
    def shards(self) -> tuple[int, ...]:
        """Sizes of what one file holds."""
        return self._array.shards or self._array.chunks

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """As NumPy's; DamagedError if the bytes are not the array's."""
        with reading(self.location):
            return np.asarray(self._array[key])


class _Lazy(ZarrArrayWrapper):
    """What xarray reads later, when the capture's user asks for values."""

    __slots__ = ("_location",)

    def __init__(self, location: str, array: zarr.Array[Any]) -> None:
        super().__init__(array)  # type: ignore[no-untyped-call]
        self._location = location

    def __getitem__(self, key: Any) -> Any:
        with reading(self._location):
            return super().__getitem__(key)  # type: ignore[no-untyped-call]


class _Store(ZarrStore):
    """The arrays of a group, each checked as it is opened."""

    def open_store_variable(self, name: str) -> xr.Variable:
        location = f"{self.zarr_group.store_path}/{name}"
        with reading(location):
            array = bounded_array(location, self.members[name])
            found = super().open_store_variable(name)  # type: ignore[no-untyped-call]
            data = indexing.LazilyIndexedArray(_Lazy(location, array))
            return xr.Variable(found.dims, data, found.attrs, found.encoding)


def open_arrays(location: str, group: zarr.Group) -> xr.Dataset:
    """All arrays, lazy, without dask: chunk bookkeeping would cost more than the rows."""
    try:
        data = _open(location, group)
    except FileNotFoundError as error:
        raise removed(location) from error
    except DamagedError:
        # A writer that is (or was, when it died) between two zarr.json leaves arrays of different lengths.
        data = _open_one_by_one(location, group)
    if data.sizes.get(GROWING, 0) > MAX_TOKENS:
        raise damaged(location, f"its arrays declare more than {MAX_TOKENS} steps")
    return data


def _open(location: str, group: zarr.Group, **options: Any) -> xr.Dataset:
    with reading(location):
        # Not the directory: xarray looks for consolidated metadata at the root of a store alone.
        store = _Store(group, mode="r", use_zarr_fill_value_as_mask=False)
        return xr.open_dataset(store, engine="store", chunks=None, cache=False, **options)


def _open_one_by_one(location: str, group: zarr.Group) -> xr.Dataset:
    with reading(location):
        names = list(group.array_keys())
        parts = [_open(location, group, drop_variables=[o for o in names if o != name]) for name in names]
        shortest: dict[Any, int] = {}
        for part in parts:
            shortest |= {dim: min(size, shortest.get(dim, size)) for dim, size in part.sizes.items()}
        cut = [part.isel({dim: slice(shortest[dim]) for dim in part.sizes}) for part in parts]
        return xr.merge(cut, compat="override", join="override", combine_attrs="override")
