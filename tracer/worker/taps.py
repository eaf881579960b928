"""Taps: where the model's own tensors pass by, in eager mode and inside a compiled graph.

A tap is called with one or two tensors and a number that says where it sits. In a compiled graph it is an operator of
our own, opaque to the compiler; traced eagerly it is a function call. It looks for whoever watches in its own thread:
a forward pass runs in the thread that called `execute_model`, and another engine's pass in another thread must not be
taken for it. Nobody watches on steps without a request that asked: then a tap is one look at a thread's variable.
"""

from __future__ import annotations

import threading
from typing import Any, Final, Protocol

import torch

__all__ = ["OPERATOR", "Watcher", "tap", "watch"]

OPERATOR: Final = "tensorspan::tap"


class Watcher(Protocol):
    """Who is told of the tensors that pass."""

    def tapped(self, place: int, first: torch.Tensor, second: torch.Tensor | None) -> None:
        """Must not keep either tensor: what they hold is written over. Never raises."""


class _Thread(threading.local):
    watcher: Watcher | None = None


_THREAD: Final = _Thread()


def watch(watcher: Watcher | None) -> None:
    """Tell `watcher` of every tensor that passes a tap in this thread, until None is given."""
    _THREAD.watcher = watcher


def tap(first: torch.Tensor, second: torch.Tensor | None, place: int) -> None:
    """Where a tensor passes; `first` is not changed."""
    if torch.compiler.is_compiling():
        torch.ops.tensorspan.tap(first, second, place)
    else:
        _passed(first, second, place)


def _passed(first: torch.Tensor, second: torch.Tensor | None, place: int) -> None:
    watcher = _THREAD.watcher
    if watcher is not None:
        watcher.tapped(place, first, second)


def _shape_only(first: torch.Tensor, second: torch.Tensor | None, place: int) -> None:
    """What the compiler runs in its place."""


# The claim that `first` is changed keeps the compiler from removing an operator without a result, and in its place.
_LIBRARY: Final[Any] = torch.library.Library("tensorspan", "DEF")
_LIBRARY.define("tap(Tensor(a!) first, Tensor? second, int place) -> ()")
_LIBRARY.impl("tap", _passed, "CompositeExplicitAutograd")
_LIBRARY._register_fake("tap", _shape_only)  # noqa: SLF001 - torch's own way for libraries
