"""Arrays inside the payload that follows a record."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracer.records import ArraySlice

__all__ = ["view_array"]


def view_array(item: ArraySlice, payload: memoryview) -> NDArray[Any]:
    """The array of that slice, inside `payload`: no copy, and valid no longer than the payload.

    Raises TypeError if the payload is too short or NumPy does not know the dtype, ValueError for a negative shape.
    """
    return np.ndarray(item.shape, item.dtype, payload, item.offset)
