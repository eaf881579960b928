"""The test of an unknown vLLM on the real V2 runner class; tests/integration/test_versions.py has the V1 engine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.worker.test_runner_v2 import LOGITS, VOCAB, Channel, CpuRunner, Engine, arrival, make, scheduled
from tracer import export, records
from tracer.worker.rehearsal import HOOKED, Outlet, RehearsalError, rehearse, unhooking, when_warm
from tracer.worker.runner_v2 import RunnerV2
from tracer.worker.step import StepTracer
from tracer.worker.torch_maths import TorchMaths

__all__ = ["make"]


class Worker:
    """What a rehearsal needs of vLLM's worker."""

    def __init__(self, runner: CpuRunner, **limits: int) -> None:
        self.model_runner = cast(Any, runner)
        groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=block)) for block in (16, 8)]
        self.model_runner.kv_cache_config = SimpleNamespace(num_blocks=limits.get("blocks", 32), kv_cache_groups=groups)
        scheduler = SimpleNamespace(
            max_num_seqs=limits.get("requests", 4), max_num_batched_tokens=limits.get("tokens", 32)
        )
        model = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: VOCAB)
        self.vllm_config = SimpleNamespace(
            scheduler_config=scheduler, model_config=model, kv_transfer_config=None, speculative_config=None
        )
        self.execute_model, self.sample_tokens = runner.execute_model, runner.sample_tokens
        self.model_runner.ec_connector = self  # a step without tokens asks it
        self.warmed = False

    def no_forward(self, scheduler_output: Any) -> Any:
        return SimpleNamespace(ec_connector_output=None)

    def compile_or_warm_up_model(self) -> str:
        self.warmed = True
        return "times"


@pytest.fixture
def staged(make: Callable[..., Engine]) -> Callable[..., tuple[Worker, RunnerV2, Outlet, Channel]]:
    def stage(**limits: int) -> tuple[Worker, RunnerV2, Outlet, Channel]:
        runner, channel = make().runner, Channel()
        adapter, outlet = RunnerV2(runner), Outlet(cast(export.Channel, channel))
        engine = records.EngineInfo("m", "0", "V2", "cpu", "float32", VOCAB, 64)
        adapter.install(StepTracer(cast(export.Channel, outlet), adapter, [], engine, TorchMaths(3)))
        return Worker(runner, **limits), adapter, outlet, channel

    return stage


def test_it_leaves_no_record_and_no_request(staged: Callable[..., Any]) -> None:
    worker, adapter, outlet, channel = staged()
    rehearse(worker, adapter, [], outlet)
    assert channel.sent == []
    assert worker.model_runner.req_states.req_id_to_index == {}
    worker.execute_model(scheduled({"late": 3}, (arrival("late", 3, LOGITS),)))
    worker.sample_tokens(None).get_output()
    assert [record.step for record in channel.steps] == [0]


@pytest.mark.parametrize(
    ("limits", "says"),
    [({"tokens": 8}, "fewer than 16 tokens"), ({"blocks": 5}, "5 blocks only")],
)
def test_an_engine_with_no_room_for_it_fails(staged: Callable[..., Any], limits: dict[str, int], says: str) -> None:
    worker, adapter, outlet, _ = staged(**limits)
    with pytest.raises(RehearsalError, match=says):
        rehearse(worker, adapter, [], outlet)


def test_an_engine_of_one_request_rehearses_with_one(staged: Callable[..., Any]) -> None:
    worker, adapter, outlet, _ = staged(requests=1, blocks=6)
    rehearse(worker, adapter, [], outlet)


def test_lost_logits_are_found_and_the_requests_are_ended(staged: Callable[..., Any]) -> None:
    worker, adapter, outlet, channel = staged()
    del worker.model_runner.model.compute_logits
    with pytest.raises(RehearsalError, match="nothing was stored of logits"):
        rehearse(worker, adapter, [], outlet)
    assert worker.model_runner.req_states.req_id_to_index == {}
    assert (outlet.kept, channel.sent) == (None, [])


def test_hooks_are_set_after_the_warm_up_and_can_be_taken_away(make: Callable[..., Engine]) -> None:
    engine = make()
    runner = engine.runner
    impl = SimpleNamespace(forward=len)
    layers = {"layer": SimpleNamespace(impl=impl), "other": SimpleNamespace()}
    worker = Worker(runner)
    worker.vllm_config.compilation_config = SimpleNamespace(static_forward_context=layers)
    told: list[bool] = []
    when_warm(worker, lambda: told.append(worker.warmed))
    assert told == []
    assert (worker.compile_or_warm_up_model(), told) == ("times", [True])
    parts = (runner, runner.model, runner.cudagraph_manager, impl)
    before = [{name: vars(part).get(name) for name in HOOKED} for part in parts]
    unhook = unhooking(worker)
    engine.adapter.install(engine.tracer)
    impl.forward = abs
    assert [{name: vars(part).get(name) for name in HOOKED} for part in parts] != before
    unhook()
    assert [{name: vars(part).get(name) for name in HOOKED} for part in parts] == before
