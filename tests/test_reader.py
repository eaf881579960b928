from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from tests.exporters.synthetic import DECODE, FULL, NOTHING, SPAN, TRACE, Synthetic, engine, exporter, write
from tracer.errors import CaptureNotFoundError, FormatError
from tracer.reader import Capture, Token, find_captures, open_capture
from tracer.records import AttentionSpec, CaptureSpec, LogitsSpec, Region

GOLDEN = Path(__file__).parent / "data" / "golden-v1"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write(tmp_path, Synthetic(steps=70, prompt=300))
    return tmp_path


def unfinished(root: Path, steps: int, spec: CaptureSpec = DECODE) -> Synthetic:
    """What `kill -9` of the writer leaves after `steps` steps."""
    generation, out = Synthetic(steps=130, spec=spec), exporter(root)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    for step in range(steps):
        out.export(*generation.step(step))
    return generation


# -- finding ---------------------------------------------------------------------------------------------------


def test_a_capture_opens_by_path_generation_step_trace_and_reference(store: Path) -> None:
    generation = Synthetic(steps=70, prompt=300)
    path = generation.path(store)
    for found in (
        open_capture(path),
        open_capture(f"{path}/"),
        open_capture(store, SPAN),
        open_capture(store, SPAN.upper()),
        open_capture(store, TRACE),
        open_capture(store, f"{TRACE}/{SPAN}"),
        open_capture(store),
        open_capture(path.parent),
        open_capture(f"file://{path}"),
        open_capture(f"file://{store}", SPAN),
    ):
        assert (found.trace_id, found.span_id, found.step_index) == (TRACE, SPAN, None)
    for step in (0, 69):
        assert open_capture(store, generation.step_span(step)).step_index == step
        assert open_capture(f"file://{store}", generation.step_span(step)).step_index == step


def test_errors_name_what_exists(store: Path) -> None:
    with pytest.raises(CaptureNotFoundError, match=f"it holds 1: {TRACE}/{SPAN}"):
        open_capture(store, "00000000000000ff")
    with pytest.raises(CaptureNotFoundError, match="neither a span ID"):
        open_capture(store, "seven")
    with pytest.raises(CaptureNotFoundError, match="neither a span ID"):
        open_capture(store, f"../{SPAN}")
    with pytest.raises(CaptureNotFoundError, match=r"no capture at .*nowhere"):
        open_capture(store / "nowhere")
    with pytest.raises(CaptureNotFoundError, match="it holds none"):
        open_capture(store / "nowhere", SPAN)
    write(store, Synthetic(span_id="00000000000000aa"))
    with pytest.raises(CaptureNotFoundError, match=f"it holds 2: {TRACE}/00000000000000aa, {TRACE}/{SPAN}"):
        open_capture(store, TRACE)


def test_a_store_lists_its_captures_newest_first(tmp_path: Path) -> None:
    write(tmp_path, Synthetic())
    out = exporter(tmp_path)
    out.export(Synthetic(trace_id="f" * 32, span_id="a" * 16).start(start_ns=5_000), NOTHING)
    newest, oldest = find_captures(tmp_path)
    assert (newest.span_id, newest.status, newest.output_tokens, newest.complete) == ("a" * 16, "open", None, False)
    assert (oldest.span_id, oldest.status, oldest.output_tokens, oldest.complete) == (SPAN, "ok", 5, True)
    assert oldest.arrays == ("attention", "attention_prefill", "attention_summary", "logits")
    assert open_capture(oldest.path).complete
    assert find_captures(tmp_path / "nowhere") == []


def test_other_formats_are_refused_with_the_reason(store: Path) -> None:
    path = Synthetic().path(store)
    content = json.loads((path / "zarr.json").read_text())
    content["attributes"]["version"] = 99
    (path / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="format version 99; this release reads version 1: upgrade"):
        open_capture(store, SPAN)
    assert find_captures(store) == []
    content["attributes"] = {}
    (path / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="not a tensorspan capture"):
        open_capture(path)
    (path / "zarr.json").write_text("{")
    with pytest.raises(FormatError, match="not a Zarr v3 group"):
        open_capture(path)


# -- tokens and numbers ----------------------------------------------------------------------------------------


def test_tokens_need_no_tokenizer(tmp_path: Path) -> None:
    capture = open_capture(write(tmp_path, Synthetic(steps=2, prompt=3)))
    first, output = capture.tokens[0], capture.tokens[3]
    assert (first.position, first.id, first.text, first.bytes, first.region) == (0, 100, "p0 ", b"p0 ", "system")
    assert (first.generated, first.step) == (False, None)
    assert np.isnan([first.logprob, first.entropy]).all()
    assert capture.tokens[2].region == "user"
    assert output == Token(3, 0, "o0", b"o0", None, generated=True, step=0, logprob=-0.5, entropy=0.5)
    assert capture.text == "o0o1"
    assert capture.prompt_text == "p0 p1 p2 "
    assert capture.regions == (Region("system", 0, 2), Region("user", 2, 3))


def test_without_token_bytes_there_are_ids(tmp_path: Path) -> None:
    capture = open_capture(write(tmp_path, Synthetic(steps=2), capture_text=False))
    assert (capture.text, capture.prompt_text) == (None, None)
    assert [token.id for token in capture.tokens[-2:]] == [0, 1]
    assert capture.topk(0, 1)[0].text is None


def test_steps_have_span_ids_positions_and_times(store: Path) -> None:
    step = open_capture(store, SPAN).steps[3]
    assert (step.index, step.span_id, step.token_id, step.position, step.kv_len) == (3, "f000000000000003", 3, 302, 303)
    assert (step.logprob, step.entropy, step.margin, step.varentropy, step.rank) == (-3.5, 3.5, 0.125, 0.25, 3)
    assert step.time == np.datetime64(3_003, "ns")


# -- arrays ----------------------------------------------------------------------------------------------------


def test_arrays_are_lazy_and_exact(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generation, capture = Synthetic(steps=70, prompt=300), open_capture(store, SPAN)
    read: list[str] = []
    original = Path.open

    def spy(path: Path, *args: Any, **options: Any) -> Any:
        read.append(path.name)
        return original(path, *args, **options)

    monkeypatch.setattr(Path, "open", spy)
    logits, layer, prefill = capture.logits, capture.attention[1], capture.attention_prefill[2]
    assert not [name for name in read if name.startswith("c.") and name.count(".") > 1]
    assert logits.dims == ("step", "vocab")
    assert layer.dims == ("step", "head", "key_pos")
    assert prefill.dims == ("head", "query_pos", "key_pos")
    np.testing.assert_array_equal(logits[69], generation.logits[69])
    np.testing.assert_array_equal(layer.isel(step=5, key_pos=slice(305)), generation.rows[5][1])
    np.testing.assert_array_equal(prefill[..., :300], generation.prefill[2])
    assert list(capture.attention) == [0, 1, 2]
    assert len(capture.attention) == 3
    assert "layers [0, 1, 2]" in repr(capture.attention)


def test_a_row_has_exactly_its_keys(store: Path) -> None:
    generation, capture = Synthetic(steps=70, prompt=300), open_capture(store, SPAN)
    for step in (0, 64, 69):
        row = capture.row(step=step, layer=2, head=1)
        assert row.shape == (300 + step,)
        np.testing.assert_array_equal(row, generation.rows[step][2, 1])


def test_errors_name_layers_heads_and_steps_that_exist(tmp_path: Path) -> None:
    spec = CaptureSpec(None, AttentionSpec(layers=(1, 4), heads=(0, 3)))
    generation, out = Synthetic(steps=2, layers=2, spec=spec), exporter(tmp_path)
    out.export(engine(6, 8), NOTHING)
    for record, payload in list(generation.records())[1:]:
        out.export(record, payload)
    capture = open_capture(generation.path(tmp_path))
    np.testing.assert_array_equal(capture.row(step=1, layer=4, head=3), generation.rows[1][1, 1])
    with pytest.raises(KeyError, match=r"layer 2 is not in this capture's attention; it has \[1, 4\]"):
        capture.attention[2]
    with pytest.raises(KeyError, match=r"head 1 is not in this capture's attention; it has \[0, 3\]"):
        capture.row(step=0, layer=1, head=1)
    with pytest.raises(KeyError, match="step 2 is not in this capture; it has 2 steps"):
        capture.row(step=2, layer=1, head=0)
    with pytest.raises(KeyError, match="holds no logits: it was not asked for"):
        _ = capture.logits
    with pytest.raises(KeyError, match="holds no attention_prefill: it was not asked for"):
        capture.attention_prefill[1]
    with pytest.raises(KeyError, match="no logits_topk"):
        capture.topk(0, 3)


def test_missing_rows_are_errors_not_zeros(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=3, spec=DECODE), exporter(tmp_path)
    for record, payload in generation.records():
        if getattr(record, "step", None) != 1:
            out.export(record, payload)
    capture = open_capture(generation.path(tmp_path))
    with pytest.raises(KeyError, match="attention of step 1 was not stored"):
        capture.row(step=1, layer=0, head=0)
    with pytest.raises(KeyError, match="logits of step 1 was not stored"):
        capture.topk(1)
    assert "missing logits: step 1: not received" in repr(capture)
    assert capture.steps[1].span_id is None
    assert np.isnat(capture.steps[1].time)


def test_topk_from_whole_rows(store: Path) -> None:
    generation, capture = Synthetic(steps=70, prompt=300), open_capture(store, SPAN)
    row = generation.logits[7].astype(np.float64)
    order = np.argsort(-row, kind="stable")[:5]
    top = capture.topk(7, 5)
    assert [item.logit for item in top] == row[order].tolist()
    log_p = row - np.log(np.exp(row).sum())
    assert [item.logprob for item in top] == pytest.approx(log_p[[item.token_id for item in top]].tolist())
    assert len(capture.topk(7, 500)) == 50
    assert {item.text for item in capture.topk(7, 50)} == {f"o{token}" for token in range(50)}


def test_topk_from_stored_best(tmp_path: Path) -> None:
    generation = Synthetic(steps=50, spec=CaptureSpec(LogitsSpec(top=5)))
    capture = open_capture(write(tmp_path, generation))
    known = 0
    for step in range(50):
        top = capture.topk(step, 5)
        assert [item.logit for item in top] == np.sort(generation.logits[step])[::-1][:5].tolist()
        sampled = [item for item in top if item.token_id == step]
        if sampled:
            known += 1
            assert sampled[0].logprob == pytest.approx(-0.5 - step)
        else:
            assert np.isnan(top[0].logprob)
    assert known
    with pytest.raises(KeyError, match="the 5 best logits of a step, not 6"):
        capture.topk(0, 6)


def test_to_xarray_is_chunked_along_the_shards(store: Path) -> None:
    data = open_capture(store, SPAN).to_xarray()
    assert data["logits"].chunks == ((64, 6), (50,))
    assert data["attention"].chunks == ((64, 6), (3,), (2,), (369,))
    assert data["attention_prefill"].chunks == ((3,), (2,), (256, 44), (369,))
    assert data.chunks["step"] == (64, 6)
    np.testing.assert_array_equal(data["logits"], Synthetic(steps=70, prompt=300).logits)
    picked = data.set_xindex("span_id").sel(span_id=0xF000000000000005)
    assert int(picked["token_id"]) == 5


def test_to_xarray_without_dask_is_lazy_numpy(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.capture_data.find_spec", lambda name: None)
    data = open_capture(store, SPAN).to_xarray()
    assert data["logits"].chunks is None
    np.testing.assert_array_equal(data["logits"], Synthetic(steps=70, prompt=300).logits)


def test_the_repr_tells_what_one_has(store: Path) -> None:
    shown = repr(open_capture(store, SPAN))
    assert f"{TRACE}/{SPAN}: complete" in shown
    assert "300 prompt, 70 steps" in shown
    assert "logits  {'step': 70, 'vocab': 50} float16" in shown


# -- captures that are not closed ------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "readable"), [(0, 0), (10, 0), (64, 64), (100, 64), (129, 128)])
def test_a_killed_writer_leaves_a_correct_prefix(tmp_path: Path, written: int, readable: int) -> None:
    generation = unfinished(tmp_path, written)
    capture = open_capture(tmp_path, SPAN)
    assert (capture.complete, capture.closed, capture.num_steps) == (False, False, readable)
    assert capture.missing == [
        {"array": "*", "what": f"all from step {readable} on", "reason": "the capture is not closed"}
    ]
    assert [token.id for token in capture.tokens] == list(range(100, 107))
    assert len(capture.steps) == readable
    assert "not closed" in repr(capture)
    if readable:
        np.testing.assert_array_equal(capture.logits, generation.logits[:readable])
        np.testing.assert_array_equal(
            capture.row(step=readable - 1, layer=1, head=0), generation.rows[readable - 1][1, 0]
        )
        assert capture.steps[5].kv_len == 12
    assert find_captures(tmp_path)[0].status == "open"


def test_a_writer_that_died_between_two_metadata_files_still_opens(tmp_path: Path) -> None:
    generation = unfinished(tmp_path, 128)
    metadata = generation.path(tmp_path) / "logits" / "zarr.json"
    content = json.loads(metadata.read_text())
    content["shape"][0] = 64
    metadata.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="conflicting sizes"):
        xr.open_zarr(generation.path(tmp_path), chunks=None, consolidated=False)
    capture = open_capture(tmp_path, SPAN)
    assert capture.num_steps == 64
    np.testing.assert_array_equal(capture.logits, generation.logits[:64])
    np.testing.assert_array_equal(capture.row(step=63, layer=0, head=0), generation.rows[63][0, 0])


# -- the golden capture ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> Capture:
    return open_capture(GOLDEN, SPAN)


def test_the_golden_capture_still_opens(golden: Capture) -> None:
    assert (golden.attrs["version"], golden.complete, golden.closed) == (1, True, True)
    assert golden.num_steps == 3
    assert golden.text == "café"
    assert [token.text for token in golden.tokens[-3:]] == ["caf", "�", "�"]
    assert golden.prompt_text == "p0 p1 p2 p3 p4 "
    assert golden.attrs["engine"]["layers"][1]["scale"] == 0.35
    assert golden.steps[2].time == np.datetime64("2023-11-14T22:13:20.000000002")
    assert open_capture(GOLDEN, "f000000000000001").step_index == 1


def test_the_golden_values_are_known(golden: Capture) -> None:
    np.testing.assert_array_equal(golden.logits, np.arange(48).reshape(3, 16) / 8 - 3)
    for step in range(3):
        np.testing.assert_array_equal(golden.row(step=step, layer=1, head=0), np.full(5 + step, (step + 1) / 8))
    expected = np.tril(np.arange(100).reshape(2, 2, 5, 5) / 64)
    np.testing.assert_array_equal(golden.attention_prefill[1][..., :5], expected[1])
    np.testing.assert_array_equal(golden.to_xarray()["attention_summary"], np.arange(48).reshape(3, 2, 2, 4))
    assert [item.token_id for item in golden.topk(0, 2)] == [15, 14]


def test_today_s_writer_still_writes_the_golden_format(tmp_path: Path) -> None:
    group = json.loads((GOLDEN / TRACE / SPAN / "zarr.json").read_text())
    path = write(tmp_path, Synthetic(steps=3, prompt=5, vocab=16, layers=2, heads=2, spec=FULL, max_tokens=8))
    now = json.loads((path / "zarr.json").read_text())
    assert set(now["attributes"]) == set(group["attributes"]) | {"checksums"}, "which came later"
    arrays = now["consolidated_metadata"]["metadata"]
    # How many keys an inner chunk of `attention` holds is the writer's choice; readers take it from here.
    chunk = arrays["attention"]["codecs"][0]["configuration"]["chunk_shape"]
    assert chunk == [1, 2, 2, 128]
    chunk[-1] = 256
    for name, metadata in group["consolidated_metadata"]["metadata"].items():
        # Token bytes differ in length; everything else is the same to the letter.
        if not name.startswith("token_"):
            assert arrays[name] == metadata, name


def test_reading_needs_no_exporter() -> None:
    code = "import sys, tracer.reader; print([n for n in sys.modules if n.startswith(('exporters', 'torch', 'vllm'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_attention_of_the_golden_queries_and_keys_by_the_documented_formula() -> None:
    """Element by element in float64, from plain zarr: docs/store-format.md and nothing of ours."""
    root = GOLDEN.with_name("golden-v1-qk")
    capture = open_capture(root)
    group: Any = zarr.open_group(capture.location, mode="r")
    queries = np.concatenate([group["query_prompt"][:], group["query"][:]]).astype(float)
    keys = np.concatenate([group["key_prompt"][:], group["key"][:]]).astype(float)
    scale = group.attrs["engine"]["layers"][0]["scale"]
    for position, layer, head in itertools.product(range(7), (0, 1), range(4)):
        scores = [
            scale * float(queries[position, layer, head] @ keys[j, layer, head // 2]) for j in range(position + 1)
        ]
        weights = np.exp(np.array(scores) - max(scores))
        if position >= 4:
            got = capture.row(step=position - 4, layer=layer, head=head)
        else:
            got = np.asarray(capture.attention_prefill[layer])[head, position, : position + 1]
        np.testing.assert_allclose(got, weights / weights.sum(), rtol=0, atol=1e-6)
