"""Who computes a step's numbers: torch on any device, or the C kernels on CPUs. Both give the same within 1e-5."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from tracer.worker.layers import Layer
from tracer.worker.native import NativeError, load
from tracer.worker.native_maths import NativeMaths
from tracer.worker.torch_maths import TorchMaths
from tracer.worker.work import Step, Work

__all__ = ["Maths", "choose"]

LOG = logging.getLogger("vllm.tensorspan")


class Maths(Protocol):
    """The arithmetic of one worker's steps; called in this order, `finish` possibly on another thread."""

    name: str
    """`native` or `torch`, as `tensorspan doctor` shows it."""

    def attention(
        self, step: Step, layer: Layer, works: Sequence[Work], query: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> None:
        """The last rows of `works` in one layer; raises for a step it does not understand.

        query: [tokens, heads, head_size]; cache: as vLLM gives it to the layer; metadata: the backend's.
        """

    def collect(
        self, step: Step, layer: Layer, works: Sequence[Work], query: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> None:
        """Queries and keys of `works` in one layer, as `Work.queries` and `Work.keys` say."""

    def logits(self, step: Step, sampling: Sequence[Work], logits: torch.Tensor) -> None:
        """Copy and count the raw logits [batch rows, vocab] of these rows before anything changes them."""

    def finish(self, step: Step) -> None:
        """Tokens are known: fill each work's summaries and arrays."""

    def release(self, step: Step) -> None:
        """The step's arrays have been sent: its memory may be used again."""


def choose(layers: Sequence[Layer], device: torch.device, topk: int) -> Maths:
    """The C kernels on a CPU where they can be built and agree with torch; else torch."""
    if device.type != "cpu":
        return TorchMaths(topk)
    try:
        with torch.no_grad():
            return NativeMaths(load(), layers, topk)
    except NativeError as error:
        LOG.warning("tensorspan: attention is computed by torch, which is slower: %s", error)
        return TorchMaths(topk)
