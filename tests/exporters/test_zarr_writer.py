from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import xarray as xr
import zarr

from tests.exporters.synthetic import (
    DECODE,
    FULL,
    NOTHING,
    Synthetic,
    attributes,
    engine,
    exporter,
    opened,
    wipe,
    write,
)
from tracer.records import AttentionSpec, CaptureSpec, LogitsSpec


def check(generation: Synthetic, load: Any) -> None:
    """`load(name)` returns the stored array whole; compare it bit for bit."""
    np.testing.assert_array_equal(load("logits"), generation.logits)
    stored = load("attention")
    keys = generation.prompt + generation.steps - 1
    assert stored.shape == (generation.steps, generation.layers, generation.heads, keys)
    for step, row in enumerate(generation.rows):
        np.testing.assert_array_equal(stored[step, ..., : row.shape[-1]], row)
        assert not stored[step, ..., row.shape[-1] :].any()
    prefill = load("attention_prefill")
    np.testing.assert_array_equal(prefill[..., : generation.prompt], generation.prefill)
    assert not prefill[..., generation.prompt :].any()
    np.testing.assert_array_equal(load("attention_summary"), generation.summaries)
    assert load("span_id").tolist() == [int(generation.step_span(i), 16) for i in range(generation.steps)]


@pytest.mark.parametrize("codec", ["blosc", "zstd", "none"])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_plain_zarr_reads_every_bit(tmp_path: Path, codec: str, dtype: Any) -> None:
    spec = CaptureSpec(LogitsSpec(dtype=dtype), AttentionSpec(rows="all", dtype=dtype))
    generation = Synthetic(steps=70, prompt=300, spec=spec)
    group = opened(write(tmp_path, generation, codec=codec))
    check(generation, lambda name: group[name][:])
    assert group.attrs["complete"] is True
    assert group.attrs["missing"] == []


def test_zarrs_pipeline_reads_every_bit(tmp_path: Path) -> None:
    generation = Synthetic(steps=70, prompt=300)
    path = write(tmp_path, generation)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        group = opened(path)
        check(generation, lambda name: group[name][:])


def test_tensorstore_reads_every_array(tmp_path: Path) -> None:
    generation = Synthetic(steps=70, prompt=300)
    path = write(tmp_path, generation)

    def load(name: str) -> Any:
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / name}/"}}
        return ts.open(store, read=True).result().read().result()

    check(generation, load)
    for name in (entry.name for entry in path.iterdir() if entry.is_dir()):
        load(name)


def test_xarray_reads_names_coordinates_and_times(tmp_path: Path) -> None:
    generation = Synthetic(steps=5)
    data = xr.open_zarr(write(tmp_path, generation), chunks=None)
    check(generation, lambda name: data[name].to_numpy())
    assert data["attention"].dims == ("step", "layer", "head", "key_pos")
    assert data["attention_prefill"].dims == ("layer", "head", "query_pos", "key_pos")
    assert data["time"].dtype == "datetime64[ns]"
    assert data["time"][2] == np.datetime64(3_002, "ns")
    assert {"span_id", "token_id", "kv_len", "layer", "head"} <= set(data.coords)
    assert data["token_id"].to_numpy().tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(data["logprob"], np.array([-0.5, -1.5, -2.5, -3.5, -4.5], np.float32))
    picked = data.set_xindex("span_id").sel(span_id=int(generation.step_span(3), 16))
    np.testing.assert_array_equal(picked["logits"], generation.logits[3])


@pytest.mark.filterwarnings("ignore:Object at index:zarr.errors.ZarrUserWarning")
def test_the_whole_root_opens_as_a_data_tree(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path, Synthetic(span_id=f"{number + 1:016x}"))
    tree = xr.open_datatree(tmp_path, engine="zarr", chunks=None, consolidated=False)
    assert len([node for node in tree.leaves if "logits" in node]) == 2


def test_a_stranger_needs_none_of_our_code(tmp_path: Path) -> None:
    generation = Synthetic(steps=3)
    path = write(tmp_path, generation)
    code = (
        "import sys, xarray, zarr\n"
        "group = zarr.open_group(sys.argv[1], mode='r')\n"
        "data = xarray.open_zarr(sys.argv[1], chunks=None)\n"
        "assert not any(name.startswith(('tracer', 'exporters')) for name in sys.modules)\n"
        "assert (data['logits'].values == group['logits'][:]).all()\n"
        "edges = group['token_offset'][:]\n"
        "print(bytes(group['token_bytes'][edges[group.attrs['prompt_tokens']]:]).decode())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == "o0o1o2\n"


def test_top_k_instead_of_whole_rows(tmp_path: Path) -> None:
    generation = Synthetic(steps=4, spec=CaptureSpec(LogitsSpec(top=5)))
    group = opened(write(tmp_path, generation))
    assert "logits" not in group
    ids = group["logits_topk_id"][:]
    np.testing.assert_array_equal(np.take_along_axis(generation.logits, ids, 1), group["logits_topk"][:])
    assert group.attrs["complete"] is True


def test_a_subset_of_layers_and_heads_keeps_the_models_indices(tmp_path: Path) -> None:
    spec = CaptureSpec(None, AttentionSpec(layers=(1, 4), heads=(0, 3, 5)))
    generation = Synthetic(layers=2, heads=3, spec=spec)
    out = exporter(tmp_path)
    out.export(engine(6, 8), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(*generation.step(0))
    out.export(generation.end(1), NOTHING)
    data = xr.open_zarr(generation.path(tmp_path), chunks=None)
    assert data["layer"].to_numpy().tolist() == [1, 4]
    assert data["head"].to_numpy().tolist() == [0, 3, 5]
    assert data.attrs["complete"] is True


def test_only_authorised_captures_are_written(tmp_path: Path) -> None:
    out = exporter(tmp_path)
    generation = Synthetic()
    out.export(generation.start(capture=None), NOTHING)
    out.export(*generation.step(0))
    out.export(generation.end(), NOTHING)
    assert list(tmp_path.iterdir()) == []


def test_modes_are_private(tmp_path: Path) -> None:
    path = write(tmp_path / "new", Synthetic())
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    for found in [path.parent, path, *path.rglob("*"), tmp_path / "new" / "zarr.json"]:
        assert stat.S_IMODE(found.stat().st_mode) == (0o700 if found.is_dir() else 0o600), found


def test_text_can_be_left_out(tmp_path: Path) -> None:
    group = opened(write(tmp_path, Synthetic(), capture_text=False))
    assert "token_bytes" not in group
    assert group["prompt_token_id"][0] == 100
    assert group.attrs["complete"] is True


def test_unknown_token_bytes_leave_the_text_out(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=1), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(prompt_token_bytes=()), NOTHING)
    out.export(*generation.step(0))
    out.export(generation.end(), NOTHING)
    assert "token_bytes" not in opened(generation.path(tmp_path))


def test_a_reader_sees_whole_finished_shards_while_steps_arrive(tmp_path: Path) -> None:
    generation = Synthetic(steps=130, spec=DECODE)
    out = exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    path = generation.path(tmp_path)
    seen = []
    for step in range(130):
        out.export(*generation.step(step))
        if step % 10 == 0 or step in {63, 64}:
            data = xr.open_zarr(path, chunks=None, consolidated=False)
            seen.append(data.sizes["step"])
            np.testing.assert_array_equal(data["logits"], generation.logits[: data.sizes["step"]])
            assert not data.attrs["complete"]
    assert seen == [0] * 7 + [64] * 8
    out.export(generation.end(), NOTHING)
    assert xr.open_zarr(path, chunks=None).sizes["step"] == 130
    assert not list(path.rglob("*.part"))


def test_infinite_logits_are_counted(tmp_path: Path) -> None:
    generation = Synthetic(steps=3, spec=CaptureSpec(LogitsSpec()))
    generation.logits[1, 4] = np.inf
    generation.logits[2, 5:7] = -np.inf
    path = write(tmp_path, generation)
    assert attributes(path)["stored"]["logits"] == {
        "source_dtype": "bfloat16",
        "stored_dtype": "float16",
        "overflow": 3,
    }


def test_two_captures_at_once_do_not_mix(tmp_path: Path) -> None:
    ones = Synthetic(steps=6, span_id="00000000000000aa", seed=1)
    twos = Synthetic(steps=6, span_id="00000000000000bb", seed=2)
    out = exporter(tmp_path)
    for (a, pa), (b, pb) in zip(ones.records(), twos.records(), strict=True):
        out.export(a, pa)
        wipe(pa)
        out.export(b, pb)
        wipe(pb)
    for generation in (ones, twos):
        group = opened(generation.path(tmp_path))
        check(generation, lambda name, group=group: group[name][:])


def test_no_engine_facts_still_store_decode_rows(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=2, spec=FULL), exporter(tmp_path)
    for record, payload in list(generation.records())[1:]:
        out.export(record, payload)
    group = opened(generation.path(tmp_path))
    np.testing.assert_array_equal(group["logits"][:], generation.logits)
    assert group["layer"][:].tolist() == [0, 1, 2]
    assert "attention_prefill" not in group
    assert group.attrs["complete"] is False
