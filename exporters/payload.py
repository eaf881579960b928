"""Arrays inside the payload that follows a record."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracer.records import ArraySlice

__all__ = ["view_array"]


def view_array(item: ArraySlice, payload: memoryview) -> NDArray[Any]:
    """The array of that slice, inside `payload`: no copy, and valid no longer than the payload.

    Raises ValueError if the payload is too short and TypeError if NumPy does not know the dtype.
    """
    flat = np.frombuffer(payload, np.dtype(item.dtype), prod(item.shape), item.offset)
    return flat.reshape(item.shape)
