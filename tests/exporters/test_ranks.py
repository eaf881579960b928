"""Several ranks write one capture: their parts of rows, in any order, some of them lost, some of them late."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters import journal
from exporters.shards import Placed
from exporters.span_ranks import StepRanks, join_steps
from exporters.zarr_writer import ZarrExporter
from tests.exporters.synthetic import (
    DECODE,
    FULL,
    NOTHING,
    Array,
    Synthetic,
    attributes,
    engine,
    exporter,
    opened,
    pack,
)
from tests.exporters.test_zarr_qk import WHOLE
from tracer import open_capture, schema
from tracer.records import (
    ArrayRecord,
    AttentionSpec,
    AttentionSummary,
    CaptureSpec,
    LogitsSpec,
    QKSpec,
    Record,
    StepRecord,
)

LAYERS, HEADS, RANKS = 3, 4, 2


@dataclass
class Shared(Synthetic):
    """A generation of 4 heads on two ranks; `own` says which of the stored heads are whose."""

    heads: int = HEADS
    own: tuple[slice, slice] = (slice(0, 2), slice(2, 4))

    def part(self, rank: int, step: int, **changes: Any) -> tuple[StepRecord, memoryview]:
        """What that rank sends of a step."""
        own, arrays = self.own[rank], self.arrays(step)
        mine = {name: np.ascontiguousarray(row[:, own]) for name, row in arrays.items() if name.startswith("attention")}
        logits = {} if rank else {name: row for name, row in arrays.items() if name.startswith("logits")}
        slices, payload = pack({**logits, **mine})
        slices = tuple(replace(item, start=(0, own.start, 0)) if len(item.shape) == 3 else item for item in slices)
        record, _ = self.step(step, rank=rank, arrays=slices, **changes)
        return (replace(record, logits=None, token_id=None) if rank else record), payload

    def strip(self, rank: int, layer: int, first: int, stop: int) -> tuple[ArrayRecord, memoryview]:
        """What that rank sends of the prompt's map of a layer."""
        own = self.own[rank]
        block = np.ascontiguousarray(self.prefill[layer, own, first:stop, :stop])
        slices, payload = pack({"attention_prefill": block}, (layer, own.start, first, 0))
        return ArrayRecord(self.trace_id, self.span_id, 1, slices), payload

    def greeted(self, root: Path, **settings: Any) -> ZarrExporter:
        """An exporter that knows both ranks and the start."""
        out = exporter(root, **settings)
        for rank in (1, 0):
            out.export(engine(LAYERS, HEADS, rank=rank, world_size=RANKS), NOTHING)
        out.export(self.start(), NOTHING)
        return out

    def all_records(self, ahead: int) -> Iterator[tuple[Record, memoryview]]:
        """The prompt's map in chunks, then the steps: rank 0 that many steps ahead of rank 1."""
        if self.spec.attention is not None and self.spec.attention.rows == "all":
            for rank in (1, 0):
                for first, stop in ((0, 30), (30, self.prompt)):
                    for layer in range(LAYERS):
                        yield self.strip(rank, layer, first, stop)
        for step in range(self.steps + ahead):
            if step < self.steps:
                yield self.part(0, step)
            if step >= ahead:
                yield self.part(1, step - ahead)


def check(work: Shared, root: Path) -> None:
    """The capture is as if one rank had written it, but for its chunks."""
    group = opened(work.path(root))
    assert group.attrs["complete"], group.attrs["missing"]
    for step in range(work.steps):
        keys = work.prompt + step
        np.testing.assert_array_equal(group["attention"][step, ..., :keys], work.rows[step])
        assert not group["attention"][step, ..., keys:].any()
    np.testing.assert_array_equal(group["attention_summary"][...], work.summaries)
    if "attention_prefill" in group:
        np.testing.assert_array_equal(group["attention_prefill"][..., : work.prompt], work.prefill)
    if work.spec.logits is not None:
        np.testing.assert_array_equal(group["logits"][...], work.logits)
    assert group["token_id"][...].tolist() == list(range(work.steps))
    assert group["logprob"][1] == np.float32(-1.5), "the numbers are rank 0's"


@pytest.mark.parametrize("codec", ["blosc", "none"])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_ranks_write_one_capture_whoever_is_ahead(ahead: int, codec: str, tmp_path: Path) -> None:
    work = Shared(steps=70, prompt=70, spec=FULL)
    out = work.greeted(tmp_path, codec=codec)
    for record, payload in work.all_records(ahead):
        out.export(record, payload)
    out.export(work.end(), NOTHING)
    assert out.problem is None
    check(work, tmp_path)
    shape = opened(work.path(tmp_path))["attention"].metadata.codecs[0].chunk_shape
    assert shape == (1, LAYERS, 2, 128)
    assert not list(tmp_path.rglob("*.part"))


def test_chosen_heads_that_fall_unevenly_to_the_ranks(tmp_path: Path) -> None:
    spec = CaptureSpec(None, AttentionSpec(heads=(0, 2, 3), rows="all"))
    work = Shared(steps=4, prompt=70, heads=3, spec=spec, own=(slice(0, 1), slice(1, 3)))
    out = work.greeted(tmp_path)
    for record, payload in work.all_records(1):
        out.export(record, payload)
    out.export(work.end(), NOTHING)
    check(work, tmp_path)
    group = opened(work.path(tmp_path))
    assert group["head"][...].tolist() == [0, 2, 3]
    assert group["attention_prefill"].metadata.codecs[0].chunk_shape == (1, 1, 64, 256)


def test_a_rank_without_any_of_the_heads_is_not_missed(tmp_path: Path) -> None:
    spec = CaptureSpec(None, AttentionSpec(heads=(0, 1)))
    work = Shared(steps=3, heads=2, spec=spec, own=(slice(0, 2), slice(2, 2)))
    out = work.greeted(tmp_path)
    for step in range(3):
        out.export(*work.part(0, step))
        record, _ = work.part(1, step)
        out.export(replace(record, arrays=()), NOTHING)
    out.export(work.end(), NOTHING)
    check(work, tmp_path)


def test_what_a_rank_did_not_bring_is_named_by_its_heads(tmp_path: Path) -> None:
    work = Shared(steps=6, prompt=70, spec=FULL)
    out = work.greeted(tmp_path)
    for rank, first, stop in ((0, 0, 70), (1, 0, 40)):
        for layer in range(LAYERS):
            out.export(*work.strip(rank, layer, first, stop))
    for step in range(6):
        out.export(*work.part(0, step))
        if step == 2:
            full = ("attention: rank 1: queue full", "attention_summary: rank 1: queue full")
            out.export(replace(work.part(1, step)[0], arrays=(), dropped=full), NOTHING)
        elif step < 4:
            out.export(*work.part(1, step))
    out.export(work.end(), NOTHING)
    found = attributes(work.path(tmp_path))
    assert found["complete"] is False
    assert found["missing"] == [
        {"array": "attention", "what": "heads 2-3: step 2", "reason": "rank 1: queue full"},
        {"array": "attention", "what": "heads 2-3: steps 4-5", "reason": "rank 1: not received"},
        {"array": "attention_prefill", "what": "heads 2-3: rows 40-69", "reason": "rank 1: not received"},
        {"array": "attention_summary", "what": "reported at step 2", "reason": "rank 1: queue full"},
    ]
    group = opened(work.path(tmp_path))
    np.testing.assert_array_equal(group["attention"][5, :, :2, :75], work.rows[5][:, :2])
    assert not group["attention"][5, :, 2:].any()


def test_a_step_is_shown_when_every_rank_has_brought_it(tmp_path: Path) -> None:
    work = Shared(steps=70, spec=DECODE)
    out = work.greeted(tmp_path)
    for step in range(66):
        out.export(*work.part(0, step))
    assert opened(work.path(tmp_path))["attention"].shape[0] == 0
    for step in range(64):
        assert opened(work.path(tmp_path))["attention"].shape[0] == 0
        out.export(*work.part(1, step))
    group = opened(work.path(tmp_path))
    assert group["attention"].shape[0] == group["logits"].shape[0] == 64
    np.testing.assert_array_equal(group["attention"][63, ..., :70], work.rows[63])


def test_without_rank_0_a_step_has_heads_and_no_numbers(tmp_path: Path) -> None:
    work = Shared(steps=3, spec=DECODE)
    out = work.greeted(tmp_path)
    for step in range(3):
        out.export(*work.part(1, step))
        if step != 1:
            out.export(*work.part(0, step))
    out.export(work.end(), NOTHING)
    missing = attributes(work.path(tmp_path))["missing"]
    assert {"array": "span_id", "what": "step 1", "reason": "not received"} in missing
    assert {"array": "attention", "what": "heads 0-1: step 1", "reason": "rank 0: not received"} in missing


def test_parts_that_a_killed_writer_had_stored_are_recovered(tmp_path: Path) -> None:
    work, root = Shared(steps=80, prompt=70, spec=FULL), tmp_path / "store"
    child = os.fork()
    if not child:
        out = work.greeted(root)
        for record, payload in work.all_records(2):
            out.export(record, payload)
            if isinstance(record, StepRecord) and record.rank == 0 and record.step == 75:
                os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert [path.name for path in exporter(root).recover()] == [work.span_id]
    group = opened(work.path(root))
    assert (group.attrs["status"], group.attrs["output_tokens"]) == ("interrupted", 76)
    assert {
        "array": "attention", "what": "heads 2-3: steps 73-75", "reason": "rank 1: not received"
    } in group.attrs["missing"]  # fmt: skip
    for step in range(76):
        heads = 4 if step < 73 else 2
        got = group["attention"][step, ..., : work.prompt + step]
        np.testing.assert_array_equal(got[:, :heads], work.rows[step][:, :heads])
        assert not got[:, heads:].any()
    np.testing.assert_array_equal(group["attention_prefill"][..., :70], work.prefill)
    assert not list(root.rglob("*.part"))


def test_more_parts_than_a_journals_record_can_count() -> None:
    rows = [journal.RowEntry(1, 0, Placed(64 * at, (60,)), at) for at in range(600)]
    entry = journal.StepEntry(3, None, rows[:255])
    assert entry.kind == journal.PARTS
    assert journal.StepEntry.unpack(entry.pack(), journal.PARTS) == entry._replace(drops=[])
    written: list[Any] = []
    quiet = journal.Journal(Path("/nowhere"), -1)
    quiet._write = written.append  # type: ignore[method-assign,assignment]
    quiet.step(journal.StepEntry(3, None, rows))
    found = [content for _, content in journal.entries(journal.MAGIC + b"".join(written))]
    assert [row for content in found for row in content.rows] == rows


@dataclass
class SharedKeys(Shared):
    """Queries of 4 heads, and one KV head that rank 0 stores and both hold."""

    spec: CaptureSpec = WHOLE

    def __post_init__(self) -> None:
        super().__post_init__()
        random, positions = np.random.default_rng(4), self.prompt + self.steps - 1
        self.queries: Array = random.normal(0, 2, (positions, LAYERS, HEADS, 8)).astype(np.float16)
        self.keys: Array = random.normal(0, 2, (positions, LAYERS, 1, 8)).astype(np.float16)

    def of(self, rank: int, name: str) -> Sequence[tuple[str, Array, int]]:
        """(array, values by position, first head) of what that rank stores."""
        out = [(f"query{name}", self.queries[:, :, self.own[rank]], self.own[rank].start)]
        return out if rank else [*out, (f"key{name}", self.keys, 0)]


def test_queries_of_each_rank_and_keys_of_one(tmp_path: Path) -> None:
    work = SharedKeys(steps=5, prompt=20)
    out = work.greeted(tmp_path)
    for rank in (1, 0):
        for name, values, head in work.of(rank, "_prompt"):
            slices, payload = pack({name: np.ascontiguousarray(values[:19])}, (0, 0, head, 0))
            out.export(ArrayRecord(work.trace_id, work.span_id, 1, slices), payload)
    for step in range(5):
        for rank in (0, 1):
            items = work.of(rank, "")
            slices, payload = pack({name: np.ascontiguousarray(values[19 + step]) for name, values, _ in items})
            starts = [(0, head, 0) for _, _, head in items]
            slices = tuple(replace(item, start=start) for item, start in zip(slices, starts, strict=True))
            out.export(work.step(step, rank=rank, arrays=slices)[0], payload)
    out.export(work.end(), NOTHING)
    capture = open_capture(work.path(tmp_path))
    assert capture.complete, capture.missing
    group = opened(work.path(tmp_path))
    np.testing.assert_array_equal(group["query"][...], work.queries[19:])
    np.testing.assert_array_equal(group["query_prompt"][...], work.queries[:19])
    np.testing.assert_array_equal(group["key_prompt"][...], work.keys[:19])
    assert np.asarray(capture.qk[1]).shape == (5, 4, 24)


def test_a_part_that_is_nobodys_is_refused(tmp_path: Path) -> None:
    work = Shared(steps=1, spec=DECODE)
    out = work.greeted(tmp_path)
    record, payload = work.part(1, 0)
    moved = tuple(replace(item, start=(0, 1, 0)) for item in record.arrays)
    out.export(replace(record, arrays=moved), payload)
    out.export(*work.part(0, 0))
    out.export(work.end(), NOTHING)
    found = attributes(work.path(tmp_path))
    assert "at (0, 1, 0) does not fit the array" in str(found["dropped"])
    assert "heads 2-3: step 0" in str(found["missing"])


def test_golden_layout_of_one_rank_is_unchanged(tmp_path: Path) -> None:
    work = Synthetic(spec=CaptureSpec(LogitsSpec(), AttentionSpec(rows="all"), qk=QKSpec()))
    out = exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(work.start(), NOTHING)
    out.export(*work.step(0))
    out.export(*work.block(0, 0, 7))
    out.export(work.end(1), NOTHING)
    group = opened(work.path(tmp_path))
    assert group["attention"].metadata.codecs[0].chunk_shape == (1, 3, 2, 128)
    assert group["attention_prefill"].metadata.codecs[0].chunk_shape == (1, 2, schema.QUERY_BLOCK, schema.KEY_BLOCK)


# -- spans ---------------------------------------------------------------------------------------------------------


def summary(entropy: float, top: float, head: int, pairs: int) -> AttentionSummary:
    return AttentionSummary(entropy, 0.1, 0.2, 0.3, 4, top, 1, head, pairs)


def test_a_span_has_the_means_of_all_heads_and_the_first_ranks_logits() -> None:
    work = Shared(spec=DECODE)
    first = replace(work.part(0, 1)[0], attention=summary(1.0, 0.5, 1, 6), dropped=("logits: rank 0: queue full",))
    second = replace(work.part(1, 1)[0], attention=summary(2.0, 0.75, 3, 3), dropped=("attention: rank 1: no",))
    for joined in (join_steps(first, second), join_steps(second, first)):
        found = joined.attention
        assert found is not None
        assert found.entropy == pytest.approx(12 / 9)
        assert (found.sink_mass, found.prompt_mass, found.self_weight) == pytest.approx((0.1, 0.2, 0.3))
        assert (found.top_weight, found.top_head, found.pairs) == (0.75, 3, 9)
        assert (joined.logits, joined.token_id, joined.rank) == (first.logits, 1, 0)
        assert joined.dropped == ("logits: rank 0: queue full", "attention: rank 1: no")


def test_a_step_waits_for_its_ranks_and_says_who_did_not_come() -> None:
    work = Shared(spec=DECODE)
    ranks = StepRanks(2)
    waiting: list[StepRecord] = []
    for step in range(3):
        assert ranks.join(waiting, work.part(1, step)[0]) is None
    assert ranks.whole(waiting) == 0
    for step in range(2):
        ranks.join(waiting, work.part(0, step)[0])
    assert ranks.whole(waiting) == 2
    assert [record.step for record in waiting] == [0, 1, 2]
    taken = ranks.take(waiting)
    assert [record.dropped for record in taken] == [(), (), ("logits: rank 0: not received in time",)]
    late = work.part(0, 2)[0]
    assert ranks.join([], late) is late, "its span has been made"
