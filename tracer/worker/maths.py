"""Who computes a step's numbers: C kernels on CPUs, Triton kernels on GPUs, else torch; all the same to 1e-5."""

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
    """`native`, `triton` or `torch`, as `tensorspan doctor` shows it."""

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

    def copy(self, step: Step) -> None:
        """The forward pass is queued: start to bring its results to the host. Called once, whatever the step holds."""

    def sampled(self, step: Step, tokens: torch.Tensor) -> None:
        """Token IDs as the sampler leaves them on the device, not every runner says.

        tokens: [requests] or [requests, 1 + most drafts], negative after the last one that was accepted.
        """

    def finish(self, step: Step) -> None:
        """Tokens are known: fill each work's summaries and arrays."""

    def release(self, step: Step) -> None:
        """The step's arrays have been sent: its memory may be used again."""


def choose(layers: Sequence[Layer], device: torch.device, topk: int) -> Maths:
    """Compiled kernels for the device, where they can be built and agree with torch; else torch."""
    if device.type == "cuda":
        return _on_gpu(layers, device, topk)
    if device.type != "cpu":
        return TorchMaths(topk)
    try:
        with torch.no_grad():
            return NativeMaths(load(), layers, topk)
    except NativeError as error:
        LOG.warning("tensorspan: attention is computed by torch, which is slower: %s", error)
        return TorchMaths(topk)


def _on_gpu(layers: Sequence[Layer], device: torch.device, topk: int) -> Maths:
    try:
        from tracer.worker.device import CudaDevice
        from tracer.worker.gpu_maths import GpuMaths

        with torch.no_grad():
            return GpuMaths(CudaDevice(device), layers, topk)
    except Exception as error:  # noqa: BLE001 - no Triton, or whatever its compiler or the driver dislikes
        LOG.warning("tensorspan: attention is computed by torch, which is slower: %s: %s", type(error).__name__, error)
        return TorchMaths(topk)
