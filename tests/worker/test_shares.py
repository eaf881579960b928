"""A tensor parallel rank's part: which heads it has, what it sends of them, and the layers it must refuse."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.worker.test_runner_v2 import Channel
from tracer import context
from tracer.records import (
    AttentionSpec,
    AttentionSummary,
    CaptureSpec,
    EngineInfo,
    LayerInfo,
    LogitsSpec,
    QKSpec,
    StepRecord,
    TraceRequest,
    WorkerEnd,
)
from tracer.worker import compat
from tracer.worker.attention import LayerMath
from tracer.worker.batch import Arrival, Row, StepPlan, StepView
from tracer.worker.emit import send_blocks, send_step
from tracer.worker.layers import Layer
from tracer.worker.shares import own_heads, shared, takes_part
from tracer.worker.step import StepTracer
from tracer.worker.torch_maths import TorchMaths
from tracer.worker.work import Own, Step, Traced, Work

LAYERS = tuple(LayerInfo(index, f"layer {index}", 8, 2, 4, 1.0) for index in range(2))


def engine(rank: int, ranks: int = 2, keys: int = 2) -> EngineInfo:
    layers = tuple(replace(layer, num_kv_heads=keys) for layer in LAYERS)
    return EngineInfo("m", "0", "V1", "cpu", "float32", 11, 64, layers, rank=rank, world_size=ranks)


@pytest.mark.parametrize(
    ("rank", "ranks", "wanted", "heads", "own"),
    [
        (0, 1, None, list(range(8)), Own()),
        (0, 2, None, [0, 1, 2, 3], Own(0, 2, 0, 0, 0)),
        (1, 2, None, [0, 1, 2, 3], Own(1, 2, 4, 4, 1)),
        (1, 2, (1, 2, 5, 7), [1, 3], Own(1, 2, 4, 2, 1)),
        (1, 2, (0, 3), [], Own(1, 2, 4, 2, 1)),
        (2, 4, None, [0, 1], Own(2, 4, 4, 4, 1)),  # Ranks 2 and 3 hold KV head 1, and rank 2 stores it.
        (3, 4, None, [0, 1], Own(3, 4, 6, 6, None)),
    ],
)
def test_what_a_rank_stores_of_a_request(
    rank: int, ranks: int, wanted: tuple[int, ...] | None, heads: list[int], own: Own
) -> None:
    qk_layer = None if ranks == 1 else 0
    assert own_heads(engine(rank, ranks), wanted, qk_layer) == (heads, own)


def test_ranks_after_the_first_send_nothing_where_no_layer_is_looked_at() -> None:
    assert takes_part(engine(0), None)
    assert not takes_part(engine(1), None)
    assert not takes_part(engine(1), CaptureSpec(LogitsSpec()))
    assert takes_part(engine(1), CaptureSpec(qk=QKSpec()))


# -- what is sent --------------------------------------------------------------------------------------------------


class Full(Channel):
    """A queue with room for records without arrays."""

    def send(self, record: Any, payload: Any = ()) -> bool:
        return not payload and super().send(record)


def work_of(own: Own, **changes: Any) -> tuple[Step, Work]:
    request = TraceRequest("ab" * 16, "cd" * 8, capture=CaptureSpec(attention=AttentionSpec(), qk=QKSpec()))
    row = Row("a", 0, 0, 1, 5, 4, samples=True)
    traced = Traced(request, {0: 0, 1: 1}, [0, 1, 2, 3], {0: 0, 1: 1}, own=own, **changes)
    work = Work(row, traced, attention=AttentionSummary(1, 0, 0, 0, 2, 0.5, 1, 3))
    work.arrays = [
        ("logits", np.zeros(11, np.float32), (0,)),
        ("attention", np.zeros((2, 4, 6), np.float16), (0, 0, 0)),
        ("attention_summary", np.zeros((2, 4, 4), np.float32), (0, 0, 0)),
        ("query", np.zeros((2, 4, 4), np.float16), (0, 0, 0)),
        ("key", np.zeros((2, 1, 4), np.float16), (0, 0, 0)),
    ]
    work.blocks = [(name, np.zeros((3, 2, 1, 4), np.float16), (7, 0, 0, 0)) for name in ("query_prompt", "key_prompt")]
    return Step(1, StepView((row,)), [work]), work


def test_arrays_go_to_their_places_among_all_heads() -> None:
    step, work = work_of(Own(1, 2, 4, 2, 1))
    channel: Any = Channel()
    send_blocks(channel, work)
    send_step(channel, step, work, 2)
    *blocks, record = channel.sent
    assert [item.start for block in blocks for item in block.arrays] == [(7, 0, 4, 0), (7, 0, 1, 0)]
    starts = {item.name: item.start for item in record.arrays}
    assert starts == {
        "logits": (0,), "attention": (0, 2, 0), "attention_summary": (0, 2, 0), "query": (0, 4, 0), "key": (0, 1, 0)
    }  # fmt: skip
    assert (record.rank, record.attention.top_head, record.attention.pairs) == (1, 7, 8)


def test_keys_that_another_rank_stores_are_not_sent() -> None:
    step, work = work_of(Own(3, 4, 6, 6, None))
    channel: Any = Channel()
    send_blocks(channel, work)
    send_step(channel, step, work, 2)
    *blocks, record = channel.sent
    names = [item.name for sent in (*blocks, record) for item in sent.arrays]
    assert names == ["query_prompt", "logits", "attention", "attention_summary", "query"]


def test_a_rank_names_itself_in_what_it_lost() -> None:
    step, work = work_of(Own(1, 2, 4, 2, None))
    work.traced.problems.append("qk: layer 1: no")
    channel: Any = Full()
    send_step(channel, step, work, 2)
    [record] = channel.sent
    assert record.dropped[:2] == ("qk: rank 1: layer 1: no", "logits: rank 1: queue full")
    assert "key: rank 1: queue full" not in record.dropped


# -- the step ------------------------------------------------------------------------------------------------------


class Runner:
    """Announces one request and runs it in one step."""

    version = "V1"

    def __init__(self, capture: CaptureSpec | None) -> None:
        self.demoted: list[bool] = []
        request = TraceRequest("ab" * 16, "cd" * 8, capture=capture)
        self._extra = {context.EXTRA_ARGS_KEY: context.to_extra_args(request)}

    def plan(self, what: Any) -> StepPlan:
        done = what == "finished"
        return StepPlan(
            () if done else (Arrival("a", self._extra),), frozenset(), frozenset("a" if done else ""),
            frozenset("" if done else "a"),
        )  # fmt: skip

    def view(self, *, exact: bool) -> StepView:
        return StepView((Row("a", 0, 0, 1, 5, 4, samples=True),))

    def demote(self, demoted: bool) -> None:
        self.demoted.append(demoted)


def tracer_of(rank: int, capture: CaptureSpec | None) -> tuple[StepTracer, Channel, Runner]:
    channel, runner = Channel(), Runner(capture)
    layers = [Layer(info, None, LayerMath(1.0), None) for info in LAYERS]
    return StepTracer(channel, runner, layers, engine(rank), TorchMaths(3)), channel, runner  # type: ignore[arg-type]


class AsyncOutput:
    """An output that gives its tokens once, as vLLM's do."""

    def __init__(self) -> None:
        self._left = [SimpleNamespace(req_ids=["a"], sampled_token_ids=[[3]])]

    def get_output(self) -> Any:
        return self._left.pop()


def test_a_rank_whose_output_nobody_fetches_still_sends_its_step() -> None:
    tracer, channel, _ = tracer_of(1, CaptureSpec(LogitsSpec(), AttentionSpec(heads=(0,))))
    sent = threading.Event()
    keep = channel.send

    def send(record: Any, payload: Any = ()) -> bool:
        kept = keep(record, payload)
        sent.set()
        return kept

    channel.send = send  # type: ignore[method-assign]
    assert tracer.begin("step")
    tracer.forward_done(torch.zeros(1, 11))
    step, output = tracer.take_step(), AsyncOutput()
    assert step is not None
    assert tracer.finish(step, output) is output
    assert sent.wait(10)
    [record] = channel.sent
    assert isinstance(record, StepRecord)
    assert (record.rank, record.logits, record.token_id, record.arrays) == (1, None, 3, ())
    assert output.get_output().sampled_token_ids == [[3]], "who asks after us gets them, too"
    sent.clear()
    tracer.begin("finished")
    assert sent.wait(10)
    assert channel.sent[-1] == WorkerEnd("ab" * 16, "cd" * 8, 1)


def test_ranks_without_a_chosen_head_demote_the_step_all_the_same() -> None:
    """The ranks of one engine must run one kind of graph: their collectives are in it."""
    for rank in (0, 1):
        tracer, _, runner = tracer_of(rank, CaptureSpec(attention=AttentionSpec(heads=(0,))))
        assert tracer.begin("step")
        assert runner.demoted == [True]
        assert tracer.wants_attention is (rank == 0)


def test_other_ranks_leave_plain_requests_to_rank_0() -> None:
    assert not tracer_of(1, None)[0].begin("step")
    assert tracer_of(0, None)[0].begin("step")


# -- layers --------------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):  # type: ignore[misc]
    """What `QKVParallelLinear` knows."""

    def __init__(self, rank: int = 1, ranks: int = 2, heads: int = 8, keys: int = 2) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.total_num_heads, self.total_num_kv_heads = rank, ranks, heads, keys


class WithLora(torch.nn.Module):  # type: ignore[misc]
    """A wrapper as LoRA puts it around a layer."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.base_layer = linear


def refusals(monkeypatch: pytest.MonkeyPatch, *linears: torch.nn.Module, keys: int = 1) -> tuple[Any, Any]:
    """The one layer's reason as this rank and as the whole model has it."""
    monkeypatch.setattr(compat, "qkv_linear_class", lambda: Linear)
    block, attention = torch.nn.Module(), torch.nn.Module()
    attention.num_heads, attention.num_kv_heads = 4, keys
    block.attn, model = attention, torch.nn.Module()
    for at, linear in enumerate(linears):
        block.add_module(f"linear {at}", linear)
    model.layer = block
    parallel = SimpleNamespace(tensor_parallel_size=2, rank=1)
    worker = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel), get_model=lambda: model)
    layer = Layer(LayerInfo(0, "layer", 4, keys, 4, 1.0), attention, LayerMath(1.0))
    [mine], [whole] = shared([layer], worker)
    assert (mine.math is None) is (whole.unsupported is not None)
    return mine.info, whole


def test_a_layer_says_itself_how_its_heads_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for linear in (Linear(), WithLora(Linear())):
        mine, whole = refusals(monkeypatch, linear)
        assert (mine.num_heads, mine.num_kv_heads, mine.unsupported) == (4, 1, None)
        assert (whole.num_heads, whole.num_kv_heads, whole.unsupported) == (8, 2, None)


@pytest.mark.parametrize(
    ("linears", "keys", "reason"),
    [
        ([], 1, "no QKVParallelLinear beside it"),
        ([Linear(), Linear()], 1, "no QKVParallelLinear beside it"),
        ([Linear(0, 1, 4)], 1, "not divided among the ranks"),
        ([Linear(0)], 1, "not divided among the ranks"),
        ([Linear(heads=12)], 1, "query heads are not divided evenly"),
        ([Linear(keys=2)], 2, "KV heads are not divided evenly"),
    ],
)
def test_layers_whose_heads_may_be_anybodys_are_refused(
    linears: list[Linear], keys: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, whole = refusals(monkeypatch, *linears, keys=keys)
    assert reason in mine.unsupported
    assert whole.unsupported == mine.unsupported
