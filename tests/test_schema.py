from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from zarr.core.metadata.v3 import ArrayV3Metadata

from tracer import schema
from tracer.records import AttentionSpec, CaptureSpec, LogitsSpec

LAYOUTS = (
    schema.logits_layout(49152, "f16"),
    schema.logits_layout(50, "f32"),
    schema.logits_topk_layout(5, "f16"),
    schema.logits_topk_id_layout(5),
    schema.attention_layout(30, 9, 400, 464, "f16"),
    schema.attention_prefill_layout(30, 9, 400, "f32"),
    schema.attention_summary_layout(30, 9),
)


@pytest.mark.parametrize("codec", ["blosc", "zstd", "none"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_metadata_is_what_zarr_itself_would_write(layout: schema.ArrayLayout, codec: str) -> None:
    shape = tuple(size * 2 for size in layout.shard)
    ours: Any = json.loads(json.dumps(layout.metadata(shape, codec), allow_nan=False))
    theirs = ArrayV3Metadata.from_dict(ours).to_dict()
    assert json.loads(json.dumps(theirs, default=str)) == ours


def test_shards_hold_whole_chunks() -> None:
    for layout in LAYOUTS:
        assert tuple(c * g for c, g in zip(layout.chunk, layout.grid, strict=True)) == layout.shard


@pytest.mark.parametrize(
    ("row_bytes", "steps"), [(98_304, 64), (304_128, 64), (3_200_000, 16), (1 << 24, 4), (1 << 30, 1), (8, 64)]
)
def test_steps_per_shard_keep_it_below_64_mib(row_bytes: int, steps: int) -> None:
    assert schema.shard_steps(row_bytes) == steps


def test_attention_shards_do_not_shrink_because_the_model_allows_long_outputs() -> None:
    short = schema.attention_layout(30, 9, 400, 464, "f16")
    long = schema.attention_layout(30, 9, 400, 131_072, "f16")
    assert short.shard == (64, 30, 9, 512)
    assert long.shard == (64, 30, 9, 131_072)


@pytest.mark.parametrize(
    ("prompt", "capacity", "keys"),
    [(7, 600, 128), (256, 384, 128), (256, 8192, 128), (2000, 4096, 256), (4000, 8192, 256), (20, 131_072, 256)],
)
def test_short_rows_have_small_blocks_and_no_row_has_many(prompt: int, capacity: int, keys: int) -> None:
    layout = schema.attention_layout(30, 9, prompt, capacity, "f16")
    assert layout.chunk == (1, 30, 9, keys)
    assert layout.shard[-1] // keys <= max(64, capacity // 256)


def test_float32_attention_uses_byte_shuffle() -> None:
    def shuffle(layout: schema.ArrayLayout) -> Any:
        sharding = layout.metadata(layout.shard, "blosc")["codecs"][0]["configuration"]
        return sharding["codecs"][1]["configuration"]["shuffle"]

    assert shuffle(schema.attention_layout(1, 1, 1, 1, "f32")) == "shuffle"
    assert shuffle(schema.attention_layout(1, 1, 1, 1, "f16")) == "bitshuffle"
    assert shuffle(schema.logits_layout(8, "f32")) == "bitshuffle"


def test_asked_arrays_follow_the_request() -> None:
    assert schema.asked_arrays(CaptureSpec()) == ()
    assert schema.asked_arrays(CaptureSpec(LogitsSpec(top=5), summary=True)) == (
        "logits_topk",
        "logits_topk_id",
        "attention_summary",
    )
    everything = CaptureSpec(LogitsSpec(), AttentionSpec(rows="all"))
    assert schema.asked_arrays(everything) == ("logits", "attention", "attention_prefill")


def test_shard_keys_have_no_directories() -> None:
    assert LAYOUTS[4].key(3) == "c.3.0.0.0"
    assert LAYOUTS[5].key(0, 0, 2) == "c.0.0.2.0"


def test_ids() -> None:
    assert schema.is_trace_id("0af7651916cd43dd8448eb211c80319c")
    assert schema.is_span_id("b7ad6b7169203331")
    assert not schema.is_span_id("../../etc/passwd")
    assert not schema.is_span_id("B7AD6B7169203331")


def test_importing_the_schema_loads_neither_numpy_nor_zarr() -> None:
    code = "import sys, tracer.schema; print(sorted({'numpy', 'zarr', 'xarray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
