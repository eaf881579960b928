"""The shared-memory queue: order, bounds, wrap-around, two processes."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.ring import HOT_BYTES, Ring


def view(data: bytes) -> memoryview:
    return memoryview(data)


def test_a_frame_comes_back_as_it_was_sent() -> None:
    ring = Ring.create(4096)
    assert ring.write(3, b"meta", [view(b"one"), view(b"two")])
    frame = ring.read()
    assert frame is not None
    assert (frame.kind, bytes(frame.meta), bytes(frame.payload)) == (3, b"meta", b"onetwo")


def test_a_frame_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    ring = Ring.create(1024)
    assert ring.write(1, b"a" * 500)
    used = ring.used
    assert not ring.write(1, b"b" * 600)
    assert ring.used == used
    assert not ring.write(1, b"c" * 10_000)


def test_released_space_is_used_again_across_the_end() -> None:
    ring = Ring.create(1024)
    for number in range(200):
        assert ring.write(1, bytes([number % 256]) * (number % 300))
        frame = ring.read()
        assert frame is not None
        assert bytes(frame.meta) == bytes([number % 256]) * (number % 300)
        ring.release()
    assert ring.used == 0
    assert ring.read() is None


def test_an_empty_ring_starts_again_at_hot_memory() -> None:
    ring, block = Ring.create(64 << 20), bytes(1 << 20)
    for _ in range(100):
        assert ring.write(1, b"", [view(block)])
        assert ring.read() is not None
        ring.release()
    touched = os.fstat(ring.fd).st_blocks * 512
    assert touched < HOT_BYTES + (4 << 20), "memory past the hot part was used although nothing waited"
    backlog = [ring.write(1, bytes([number]), [view(block)]) for number in range(80)]
    assert sum(backlog) >= 60, "the cold part is there when it is needed"
    for number in range(sum(backlog)):
        frame = ring.read()
        assert frame is not None
        assert bytes(frame.meta) == bytes([number])
        frame = None
        ring.release()
    assert ring.used == 0


def test_a_ring_that_starts_again_has_all_its_room() -> None:
    ring, block = Ring.create(4 * HOT_BYTES), view(bytes(1 << 20))
    for _ in range(HOT_BYTES // (1 << 20) + 1):
        assert ring.write(1, b"", [block])
        assert ring.read() is not None
        ring.release()
    burst = [ring.write(1, b"", [block]) for _ in range(70)]
    assert burst.count(True) == 63, "all that fits beside the frames' heads, before the consumer has woken up"


@given(st.lists(st.one_of(st.none(), st.binary(max_size=400)), max_size=200))
def test_any_mix_of_writes_and_reads_keeps_order(actions: list[bytes | None]) -> None:
    ring, expected = Ring.create(2048), []
    for action in actions:
        if action is not None:
            if ring.write(1, b"", [view(action)]):
                expected.append(action)
        elif (frame := ring.read()) is not None:
            assert bytes(frame.payload) == expected.pop(0)
            ring.release()
    while (frame := ring.read()) is not None:
        assert bytes(frame.payload) == expected.pop(0)
        ring.release()
    assert expected == []


def test_waiting_flag_and_emptiness() -> None:
    ring = Ring.create(1024)
    assert ring.set_waiting(True)
    assert ring.waiting
    ring.write(1, b"x")
    assert not ring.set_waiting(False)
    assert not ring.waiting


@pytest.mark.filterwarnings("ignore:This process")
def test_another_process_reads_what_was_written() -> None:
    ring = Ring.create(1 << 16)
    child = os.fork()
    if child == 0:
        written = 0
        while written < 2000:
            written += ring.write(2, written.to_bytes(4, "big"), [view(b"p" * (written % 997))])
        os._exit(0)
    seen = 0
    while seen < 2000:
        frame = ring.read()
        if frame is not None:
            assert int.from_bytes(frame.meta, "big") == seen
            assert len(frame.payload) == seen % 997
            ring.release()
            seen += 1
    assert os.waitpid(child, 0)[1] == 0
