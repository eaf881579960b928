"""The test of an unknown vLLM on the real V2 runner class; tests/integration/test_versions.py has the V1 engine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.worker.test_runner_v2 import LOGITS, VOCAB, Channel, CpuRunner, Engine, arrival, make, scheduled
from tracer import export, records
from tracer.worker.rehearsal import RehearsalError, Stage, rehearse, rehearse_when_warm
from tracer.worker.runner_v2 import RunnerV2
from tracer.worker.step import StepTracer
from tracer.worker.torch_maths import TorchMaths

__all__ = ["make"]


class Worker:
    """What a rehearsal needs of vLLM's worker."""

    def __init__(self, runner: CpuRunner, **limits: int) -> None:
        self.model_runner: Any = runner
        groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=block)) for block in (16, 8)]
        runner.kv_cache_config = SimpleNamespace(num_blocks=limits.get("blocks", 32), kv_cache_groups=groups)
        scheduler = SimpleNamespace(
            max_num_seqs=limits.get("requests", 4), max_num_batched_tokens=limits.get("tokens", 32)
        )
        model = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: VOCAB)
        self.vllm_config = SimpleNamespace(scheduler_config=scheduler, model_config=model, kv_transfer_config=None)
        self.execute_model, self.sample_tokens = runner.execute_model, runner.sample_tokens
        self.warmed = False

    def compile_or_warm_up_model(self) -> str:
        self.warmed = True
        return "times"


@pytest.fixture
def staged(make: Callable[..., Engine]) -> Callable[..., tuple[Worker, Stage, Channel]]:
    def stage(**limits: int) -> tuple[Worker, Stage, Channel]:
        runner, channel = make().runner, Channel()
        adapter = RunnerV2(runner)
        made = Stage(cast(export.Channel, channel), adapter)
        engine = records.EngineInfo("m", "0", "V2", "cpu", "float32", VOCAB, 64)
        adapter.install(StepTracer(cast(export.Channel, made), made, [], engine, TorchMaths(3)))
        return Worker(runner, **limits), made, channel

    return stage


def captured(worker: Worker, name: str) -> None:
    worker.execute_model(scheduled({name: 3}, (arrival(name, 3, LOGITS),)))
    worker.sample_tokens(None).get_output()


def test_nothing_is_captured_until_it_has_passed(staged: Callable[..., Any]) -> None:
    worker, stage, channel = staged()
    told: list[str | None] = []
    rehearse_when_warm(worker, stage, [], told.append)
    captured(worker, "early")
    assert (channel.sent, told) == ([], [])
    assert worker.compile_or_warm_up_model() == "times"
    assert (worker.warmed, told, channel.sent) == (True, [None], [])
    assert list(worker.model_runner.req_states.req_id_to_index) == ["early"], "made-up requests are gone"
    captured(worker, "late")
    assert [record.step for record in channel.steps] == [0]


@pytest.mark.parametrize(
    ("limits", "says"),
    [({"tokens": 8}, "fewer than 16 tokens"), ({"blocks": 5}, "5 blocks only")],
)
def test_an_engine_with_no_room_for_it_is_not_captured(
    staged: Callable[..., Any], limits: dict[str, int], says: str
) -> None:
    worker, stage, channel = staged(**limits)
    told: list[str | None] = []
    rehearse_when_warm(worker, stage, [], told.append)
    worker.compile_or_warm_up_model()
    assert says in str(told[0])
    captured(worker, "late")
    assert channel.sent == []


def test_an_engine_of_one_request_rehearses_with_one(staged: Callable[..., Any]) -> None:
    worker, stage, _ = staged(requests=1, blocks=6)
    rehearse(worker, stage, [])


def test_lost_logits_are_found(staged: Callable[..., Any]) -> None:
    worker, stage, _ = staged()
    del worker.model_runner.model.compute_logits
    with pytest.raises(RehearsalError, match="nothing was stored of logits"):
        rehearse(worker, stage, [])
    assert worker.model_runner.req_states.req_id_to_index == {}


def test_a_worker_that_cannot_be_warmed_up_is_not_rehearsed(staged: Callable[..., Any]) -> None:
    _, stage, _ = staged()
    with pytest.raises(AttributeError):
        rehearse_when_warm(SimpleNamespace(), stage, [], lambda problem: None)
