"""Taps: they stay in a compiled graph, see what passes there, and tell nobody who did not ask in that thread."""

from __future__ import annotations

import threading

import torch

from tracer.worker.taps import tap, watch


class Seen:
    def __init__(self) -> None:
        self.passed: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []

    def tapped(self, place: int, first: torch.Tensor, second: torch.Tensor | None) -> None:
        self.passed.append((place, first.clone(), None if second is None else second.clone()))


def model(x: torch.Tensor) -> torch.Tensor:
    first = x * 2
    tap(first, None, 0)
    second = torch.sin(first)
    tap(second, first, 1)
    return second + first


def test_a_compiled_graph_keeps_its_taps_and_its_result() -> None:
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="inductor")
    seen, x = Seen(), torch.randn(5, 3)
    with torch.no_grad():
        quiet = compiled(x)
        watch(seen)
        try:
            loud = compiled(x)
        finally:
            watch(None)
        compiled(x)
    assert torch.equal(quiet, loud)
    torch.testing.assert_close(loud, model(x))
    assert [place for place, _, _ in seen.passed] == [0, 1]
    assert torch.equal(seen.passed[0][1], x * 2)
    torch.testing.assert_close(seen.passed[1][1], torch.sin(x * 2))
    assert seen.passed[1][2] is not None
    assert torch.equal(seen.passed[1][2], x * 2)


def test_another_threads_pass_is_not_seen() -> None:
    seen = Seen()
    watch(seen)
    try:
        other = threading.Thread(target=model, args=(torch.ones(1, 2),))
        other.start()
        other.join()
        assert seen.passed == []
        model(torch.ones(1, 2))
    finally:
        watch(None)
    assert len(seen.passed) == 2
