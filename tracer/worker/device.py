"""A GPU's queues and the memory that copies go through: the one seam between `GpuMaths` and torch's CUDA calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Area", "CudaDevice", "Device", "Mark", "indices", "lasting"]

GROWTH = 1.5
"""Room for a context that grows by a key a step: page-locked memory is slow to get."""

WORD = 8
"""Areas are whole words, so that all of one can be seen as any type."""


class Mark(Protocol):
    """A point in a queue of the device."""

    def synchronize(self) -> None:
        """Return once everything queued before that point is done."""


class Device(Protocol):
    """What a step needs of its device."""

    def empty(self, size: int) -> torch.Tensor:
        """uint8 [size] on the device."""

    def pinned(self, size: int) -> torch.Tensor:
        """uint8 [size] on the host, page-locked: copies to and from it wait for nobody."""

    def mark(self) -> Mark:
        """The end of what this thread has queued so far."""

    def aside(self, after: Mark, *, late: bool = False) -> AbstractContextManager[None]:
        """What is queued inside runs beside the model, once `after` is reached.

        late: in a second queue, which waits for no later step.
        """


class CudaDevice:
    """See `Device`: two streams beside the one that the model runs on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))

    def empty(self, size: int) -> torch.Tensor:
        """See `Device`."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def pinned(self, size: int) -> torch.Tensor:
        """See `Device`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        """See `Device`; who waits for it sleeps instead of spinning, as vLLM's own output thread does."""
        event: Any = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        mark: Mark = event
        return mark

    @contextmanager
    def aside(self, after: Mark, *, late: bool = False) -> Iterator[None]:
        """See `Device`."""
        stream: Any = self._streams[late]
        stream.wait_event(after)
        with torch.cuda.stream(stream):
            yield


@dataclass(slots=True)
class Area:
    """Memory on the device and its page-locked twin; both live on from step to step."""

    device: torch.Tensor
    host: torch.Tensor
    bytes: NDArray[np.uint8]
    """`host` as NumPy sees it."""
    used: int = 0

    @classmethod
    def of(cls, device: Device, size: int) -> Area:
        """An area of that many bytes."""
        host = lasting(device.pinned, size)
        return cls(lasting(device.empty, size), host, host.numpy())

    def room(self, device: Device, size: int) -> Area:
        """This area or, if it is too small, a larger one; `size` bytes are in use then."""
        area = self if len(self.bytes) >= size else Area.of(device, -(-int(size * GROWTH) // WORD) * WORD)
        area.used = size
        return area

    def upload(self) -> None:
        """Queue a copy of the used bytes to the device."""
        self.device[: self.used].copy_(self.host[: self.used], non_blocking=True)

    def fetch(self) -> None:
        """Queue a copy of the used bytes to the host."""
        if self.used:
            self.host[: self.used].copy_(self.device[: self.used], non_blocking=True)


def lasting(make: Callable[[int], torch.Tensor], size: int) -> torch.Tensor:
    """Memory that may be written to under vLLM's inference mode and outside of it, where hooks and `finish` may run."""
    with torch.inference_mode(False):
        return make(size)


def indices(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [values] on the device; from page-locked memory, because a plain copy would wait for the forward pass."""
    made = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)
