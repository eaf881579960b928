from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.exporters.synthetic import NOTHING, Synthetic, attributes, engine, exporter, opened, wipe
from tracer.records import AttentionSpec, CaptureSpec

PROMPT_ONLY = CaptureSpec(None, AttentionSpec(rows="all"))


def generation(prompt: int, **changes: Any) -> Synthetic:
    return Synthetic(steps=1, prompt=prompt, spec=PROMPT_ONLY, **changes)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_chunking_of_the_prompt_gives_the_same_map(data: st.DataObject) -> None:
    prompt = data.draw(st.integers(1, 600), label="prompt")
    cuts = sorted(data.draw(st.sets(st.integers(1, max(prompt - 1, 1)), max_size=8), label="cuts"))
    work = generation(prompt, layers=2)
    with TemporaryDirectory() as folder:
        out = exporter(Path(folder), codec="none")
        for record, payload in work.records([cut for cut in cuts if cut < prompt]):
            out.export(record, payload)
            wipe(payload)
        group = opened(work.path(Path(folder)))
        np.testing.assert_array_equal(group["attention_prefill"][...], work.prefill)
        assert group.attrs["complete"] is True


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 299), st.integers(1, 300)), min_size=1, max_size=12))
def test_the_last_block_of_any_overlapping_sequence_wins(blocks: list[tuple[int, int, int]]) -> None:
    works = [generation(300, layers=2, seed=seed) for seed in range(len(blocks))]
    expected = np.zeros_like(works[0].prefill)
    seen = np.zeros((2, 300), np.bool_)
    with TemporaryDirectory() as folder:
        out = exporter(Path(folder))
        out.export(engine(2, 2), NOTHING)
        out.export(works[0].start(), NOTHING)
        for attempt, (work, (layer, first, count)) in enumerate(zip(works, blocks, strict=True)):
            stop = min(first + count, 300)
            out.export(*work.block(layer, first, stop, attempt + 1))
            expected[layer, :, first:stop] = work.prefill[layer, :, first:stop]
            seen[layer, first:stop] = True
        out.export(*works[0].step(0))
        out.export(works[0].end(), NOTHING)
        group = opened(works[0].path(Path(folder)))
        np.testing.assert_array_equal(group["attention_prefill"][...], expected)
        assert group.attrs["complete"] is bool(seen.all())


def test_only_causal_blocks_are_stored(tmp_path: Path) -> None:
    work = generation(600)
    out = exporter(tmp_path, codec="none")
    for record, payload in work.records():
        out.export(record, payload)
    path = work.path(tmp_path) / "attention_prefill"
    sizes = [(path / f"c.0.0.{i}.0").stat().st_size for i in range(3)]
    chunk, index = 2 * 64 * 256 * 2 + 4, 3 * 4 * 3 * 16 + 4
    assert sizes == [3 * 4 * chunk + index, 3 * 4 * 2 * chunk + index, 3 * 2 * 3 * chunk + index]
    data = xr.open_zarr(work.path(tmp_path), chunks=None)
    assert data["attention_prefill"].sizes == {"layer": 3, "head": 2, "query_pos": 600, "key_pos": 600}


def test_finished_query_shards_show_while_the_prompt_is_read(tmp_path: Path) -> None:
    work, out = generation(600), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(work.start(), NOTHING)
    shown = []
    for first, stop in ((0, 100), (100, 300), (300, 512), (512, 600)):
        for layer in range(3):
            out.export(*work.block(layer, first, stop))
        shown.append(opened(work.path(tmp_path))["attention_prefill"][...])
    assert [array.shape[2] for array in shown] == [0, 256, 512, 600]
    for array in shown:
        np.testing.assert_array_equal(array, work.prefill[:, :, : array.shape[2]])


def test_rows_from_the_prefix_cache_are_named_as_such(tmp_path: Path) -> None:
    work, out = generation(100), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(work.start(), NOTHING)
    for layer in range(3):
        out.export(*work.block(layer, 48, 90 if layer == 1 else 100))
    out.export(*work.step(0))
    out.export(work.end(cached_tokens=48), NOTHING)
    group = opened(work.path(tmp_path))
    cached = {"array": "attention_prefill", "reason": "prefix cache hit: no query was computed"}
    assert group.attrs["missing"] == [
        {**cached, "what": "layers 0, 2: rows 0-47"},
        {**cached, "what": "layer 1: rows 0-47"},
        {"array": "attention_prefill", "what": "layer 1: rows 90-99", "reason": "not received"},
    ]
    assert not group["attention_prefill"][:, :, :48].any()
    np.testing.assert_array_equal(group["attention_prefill"][0, :, 48:], work.prefill[0, :, 48:])
    assert group.attrs["complete"] is False


def test_a_map_that_never_came_is_missing(tmp_path: Path) -> None:
    work, out = generation(10), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(work.start(), NOTHING)
    out.export(*work.step(0, dropped=("attention_prefill: queue full",)))
    out.export(work.end(), NOTHING)
    missing = attributes(work.path(tmp_path))["missing"]
    assert {"array": "attention_prefill", "what": "rows 0-9", "reason": "queue full"} in missing


def test_fewer_heads_than_the_largest_layer_leave_fill(tmp_path: Path) -> None:
    work, out = generation(10), exporter(tmp_path)
    out.export(engine(3, 4), NOTHING)
    out.export(work.start(), NOTHING)
    for layer in range(3):
        out.export(*work.block(layer, 0, 10))
    out.export(work.end(0), NOTHING)
    stored = opened(work.path(tmp_path))["attention_prefill"][...]
    assert stored.shape == (3, 4, 10, 10)
    np.testing.assert_array_equal(stored[:, :2], work.prefill)
    assert not stored[:, 2:].any()


@pytest.mark.parametrize("start", [(9, 0, 0, 0), (0, 0, 95, 0), (0,)])
def test_a_block_outside_the_map_is_refused(tmp_path: Path, start: tuple[int, ...]) -> None:
    work, out = generation(100), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(work.start(), NOTHING)
    record, payload = work.block(0, 0, 10)
    out.export(replace(record, arrays=(replace(record.arrays[0], start=start),)), payload)
    out.export(work.end(0), NOTHING)
    assert "does not fit" in attributes(work.path(tmp_path))["dropped"]["entries"][0]["cause"]
