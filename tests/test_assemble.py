"""Order and ends of generations, whatever order the processes speak in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tracer.assemble import LATE_SECONDS, UNSEEN_SECONDS, Assembler
from tracer.records import CaptureSpec, EngineInfo, GenerationEnd, GenerationStart, Record, StepRecord, WorkerEnd

TRACE, SPAN = "a" * 32, "b" * 16
API, WORKER, OTHER_WORKER = 1, 2, 3
START = GenerationStart(TRACE, SPAN, None, True, 1, "r", "m", "chat")
END = GenerationEnd(TRACE, SPAN, 99, "ok", "stop", 2)


def step(number: int | None) -> StepRecord:
    return StepRecord(TRACE, SPAN, "c" * 16, number, "decode", 1, 5, 1, 6, 2, 3)


class Scene:
    """An assembler with a clock of its own and a list of what came out."""

    def __init__(self) -> None:
        self.out: list[Record] = []
        self.now = 0.0
        self.assembler = Assembler(lambda record, _: self.out.append(record), lambda: self.now)

    def say(self, source: int, *records: Record) -> None:
        for record in records:
            self.assembler.take(source, record)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.assembler.expire()


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_the_end_waits_for_the_last_step(scene: Scene) -> None:
    scene.say(API, START)
    scene.say(WORKER, step(0))
    scene.say(API, END)
    assert scene.out == [START, step(0)]
    scene.say(WORKER, step(1))
    assert scene.out == [START, step(0), step(1), END]


def test_an_aborted_generation_waits_for_the_worker(scene: Scene) -> None:
    aborted = GenerationEnd(TRACE, SPAN, 99, "aborted", "abort", 1)
    scene.say(API, START)
    scene.say(WORKER, step(0), step(1))
    scene.say(API, aborted)
    assert scene.assembler.is_open(SPAN)
    scene.say(WORKER, WorkerEnd(TRACE, SPAN))
    assert scene.out[-2:] == [WorkerEnd(TRACE, SPAN), aborted]


def test_a_surplus_step_after_the_end_is_dropped(scene: Scene) -> None:
    scene.say(API, START)
    scene.say(WORKER, step(0), step(1))
    scene.say(API, END)
    scene.say(WORKER, step(2), WorkerEnd(TRACE, SPAN))
    assert scene.out == [START, step(0), step(1), END]


def test_a_worker_that_ends_first_does_not_end_the_generation(scene: Scene) -> None:
    scene.say(API, START)
    scene.say(WORKER, step(0), WorkerEnd(TRACE, SPAN))
    assert END not in scene.out
    scene.say(API, END)
    assert scene.out[-1] == END


def test_every_worker_must_have_finished(scene: Scene) -> None:
    scene.say(API, START)
    scene.say(WORKER, step(0))
    scene.say(OTHER_WORKER, step(0))
    scene.say(API, END)
    scene.say(WORKER, WorkerEnd(TRACE, SPAN))
    assert scene.assembler.is_open(SPAN)
    scene.say(OTHER_WORKER, WorkerEnd(TRACE, SPAN))
    assert not scene.assembler.is_open(SPAN)


def test_a_silent_worker_is_waited_for_only_so_long(scene: Scene) -> None:
    scene.say(API, START)
    scene.say(WORKER, step(0))
    scene.say(API, END)
    scene.wait(LATE_SECONDS - 1)
    assert scene.assembler.is_open(SPAN)
    scene.wait(2)
    assert scene.out[-1] == END


def test_a_generation_that_never_ran_ends_soon(scene: Scene) -> None:
    scene.say(API, START, END)
    scene.wait(UNSEEN_SECONDS + 0.1)
    assert scene.out == [START, END]


def test_a_dead_worker_releases_the_end(scene: Scene) -> None:
    scene.say(API, START)
    scene.say(WORKER, step(0))
    scene.say(API, END)
    scene.assembler.lost_source(WORKER)
    assert scene.out[-1] == END


def test_a_dead_api_process_ends_its_generations_as_errors(scene: Scene) -> None:
    scene.say(API, START)
    scene.say(WORKER, step(0), step(1), WorkerEnd(TRACE, SPAN))
    scene.assembler.lost_source(API)
    end = scene.out[-1]
    assert isinstance(end, GenerationEnd)
    assert (end.status, end.output_tokens) == ("error", 2)


def test_records_of_unknown_generations_are_counted(scene: Scene) -> None:
    scene.say(WORKER, step(0))
    scene.say(API, END)
    assert scene.out == []
    assert scene.assembler.orphans == 2


def test_closing_ends_everything(scene: Scene) -> None:
    scene.say(API, START)
    scene.assembler.close()
    assert isinstance(scene.out[-1], GenerationEnd)


def test_a_rank_that_has_sent_nothing_yet_is_waited_for_where_layers_are_captured(scene: Scene) -> None:
    captured = replace(START, capture=CaptureSpec(summary=True))
    done = replace(END, output_tokens=1)
    for rank in (0, 1):
        scene.say(WORKER + rank, EngineInfo("m", "0", "V1", "cpu", "float32", 1, 1, rank=rank, world_size=2))
    scene.say(API, captured, done)
    scene.say(WORKER, step(0))
    assert scene.assembler.is_open(SPAN)
    scene.say(OTHER_WORKER, replace(step(0), rank=1))
    assert scene.out[-1] == done
    scene.say(API, captured, done)
    scene.say(WORKER, step(0))
    scene.wait(LATE_SECONDS + 1)
    assert scene.out[-1] == done, "a rank that never speaks delays the end by no more than that"
    scene.say(API, START, done)
    scene.say(WORKER, step(0))
    assert scene.out[-1] == done, "of other generations rank 0 alone reports"
