"""Tensors as the payload of a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from tracer.records import ArraySlice

__all__ = ["DTYPES", "pack"]

DTYPES: Final = {"f16": torch.float16, "f32": torch.float32}


def pack(
    arrays: Sequence[tuple[str, torch.Tensor, tuple[int, ...]]],
) -> tuple[tuple[ArraySlice, ...], list[memoryview]]:
    """Descriptions and bytes of tensors, laid out one after the other."""
    slices, payload = [], []
    offset = 0
    for name, start, host in _on_host(arrays):
        view = memoryview(host)
        slices.append(ArraySlice(name, str(host.dtype), host.shape, offset, start))
        payload.append(view)
        offset += view.nbytes
    return tuple(slices), payload


def _on_host(arrays: Sequence[tuple[str, torch.Tensor, tuple[int, ...]]]) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    for name, tensor, start in arrays:
        yield name, start, tensor.contiguous().cpu().numpy()
