"""What a `Capture` is made of: tokens, steps, alternatives and attention by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

__all__ = ["Alternative", "AttentionLayers", "Step", "Token", "join_text"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the prompt or of the output."""

    position: int
    """Absolute: 0 is the first prompt token."""
    id: int
    text: str | None
    """The token alone, broken UTF-8 shown as U+FFFD; None if the capture holds no token bytes."""
    bytes: bytes | None
    region: str | None
    """Role of the message or template part it belongs to; None for output tokens."""
    generated: bool
    step: int | None
    """The step whose rows predict this token; None for prompt tokens."""
    logprob: float
    """NaN for prompt tokens."""
    entropy: float


@dataclass(frozen=True, slots=True)
class Step:
    """The numbers of one step; -1, NaN and `NaT` where they are not (yet) stored."""

    index: int
    span_id: str | None
    token_id: int
    position: int
    attempt: int
    kv_len: int
    time: np.datetime64
    logprob: float
    entropy: float
    margin: float
    varentropy: float
    rank: int


@dataclass(frozen=True, slots=True)
class Alternative:
    """One candidate of a step."""

    token_id: int
    text: str | None
    """Known only for tokens that occur in the capture."""
    logit: float
    logprob: float
    """NaN if the capture holds only the best logits and the sampled token is not among them."""


class AttentionLayers(Mapping[int, xr.DataArray]):
    """Captured layers by the model's index, each a lazy array without the axis of layers."""

    def __init__(self, name: str, array: xr.DataArray | None, reason: str, axis: str = "layer") -> None:
        self._name = name
        self._array = array
        self._reason = reason
        self._axis = axis

    def __getitem__(self, layer: int) -> xr.DataArray:
        """One layer; KeyError names the layers that exist."""
        layers = list(self)
        if self._array is None:
            raise KeyError(f"this capture holds no {self._name}: {self._reason}")
        if layer not in layers:
            raise KeyError(f"layer {layer} is not in this capture's {self._name}; it has {layers}")
        return self._array.isel({self._axis: layers.index(layer)})

    def __iter__(self) -> Iterator[int]:
        """The model's layer indices, ascending."""
        return iter(() if self._array is None else self._array[self._axis].to_numpy().tolist())

    def __len__(self) -> int:
        """How many layers were captured."""
        return 0 if self._array is None else self._array.sizes[self._axis]

    def __repr__(self) -> str:
        """Layers, sizes and type, or why there are none."""
        if self._array is None:
            return f"<no {self._name}: {self._reason}>"
        return f"<{self._name} of layers {list(self)}: {dict(self._array.sizes)} {self._array.dtype}>"


def join_text(tokens: Iterator[Token]) -> str | None:
    """The tokens' bytes as one text, so that split characters are whole; None if any is not known."""
    parts = [token.bytes for token in tokens]
    known = [part for part in parts if part is not None]
    return b"".join(known).decode(errors="replace") if len(known) == len(parts) else None
