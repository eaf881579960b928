"""Arrays as the payload of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from numpy.typing import NDArray

from tracer.records import ArraySlice
from tracer.worker.work import Stored

__all__ = ["DTYPES", "pack"]

DTYPES: Final = {"f16": torch.float16, "f32": torch.float32}


def pack(arrays: Sequence[Stored]) -> tuple[tuple[ArraySlice, ...], list[memoryview]]:
    """Descriptions and bytes of arrays, laid out one after the other; NumPy arrays are not copied."""
    slices, payload = [], []
    offset = 0
    for name, values, start in arrays:
        host = _on_host(values)
        slices.append(ArraySlice(name, host.dtype.name, host.shape, offset, start))
        payload.append(host.data)
        offset += host.nbytes
    return tuple(slices), payload


def _on_host(values: NDArray[Any] | torch.Tensor) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        host: NDArray[Any] = values.contiguous().cpu().numpy()
        return host
    return values
