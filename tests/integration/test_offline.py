"""vLLM's `LLM` in scripts: with a `capture(...)` block, with `extra_args` alone, and with the engine elsewhere."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cpus import EAGER_TOLERANCE
from tests.integration.models import make_model
from tests.integration.runs import Ask, prompt, rows_of, run, run_script, spans_of
from tracer import capture, find_captures, open_capture
from tracer.errors import SettingsError

pytestmark = pytest.mark.engine

TOLERANCE = EAGER_TOLERANCE
WHOLE = "logits;dtype=f32, attention;rows=all;dtype=f32, summary"


def test_a_block_gives_paths_that_open(
    models: Path, offline: Callable[..., Any], generate: Callable[..., Any], store: Path
) -> None:
    prompts = [prompt(12, 1), prompt(30, 2)]
    with offline(make_model("llama", models)) as (llm, record):
        with record(WHOLE) as run_:
            answers = generate(llm, prompts)
        with record("") as silent:
            assert generate(llm, prompts) == answers
    assert len(run_.paths) == len(run_.span_ids) == 2
    assert run_.store == store
    for path, span_id, tokens, answer in zip(run_.paths, run_.span_ids, prompts, answers, strict=True):
        cap = open_capture(path)
        assert cap.complete, cap.missing
        assert cap.span_id == span_id
        assert cap.attrs["model"] == str(models / "llama")
        assert [token.id for token in cap.tokens] == tokens + answer
        step = open_capture(run_.store, cap.steps[3].span_id)
        assert (step.location, step.step_index) == (str(path), 3)
    assert len(silent.span_ids) == 2
    assert not any(path.exists() for path in silent.paths)
    assert len({path.parent for path in run_.paths + silent.paths}) == 4, "offline generations share a trace"


def test_a_plain_llm_needs_no_block(models: Path, offline: Callable[..., Any], store: Path) -> None:
    with offline(make_model("llama", models)) as (llm, _):
        captured, silent = run(llm, store, [Ask(prompt(12), "logits, attention"), Ask(prompt(13))])
    assert captured.capture is not None
    assert captured.capture.complete, captured.capture.missing
    for answer in (captured, silent):
        spans = {span["spanId"]: span for span in spans_of(store, answer.start.trace_id)}
        generation = spans.pop(answer.start.span_id)
        assert not generation.get("parentSpanId")
        assert all(span["parentSpanId"] == answer.start.span_id for span in spans.values())
        assert sorted(span["name"] for span in spans.values()) == ["decode"] * 7 + ["prefill"]
    by_step = {step.span_id for step in captured.capture.steps}
    assert by_step <= {span["spanId"] for span in spans_of(store, captured.start.trace_id)}


def test_another_store_in_the_same_process_is_refused(
    models: Path, offline: Callable[..., Any], tmp_path: Path
) -> None:
    with (
        offline(make_model("llama", models)),
        pytest.raises(SettingsError, match=r"store=.* cannot take effect; use the same value, or a new process"),
        capture("logits", store=tmp_path / "other"),
    ):
        pytest.fail("the block ran")


def test_captures_open_with_plain_libraries(
    models: Path, offline: Callable[..., Any], generate: Callable[..., Any], tmp_path: Path
) -> None:
    with offline(make_model("gemma2", models)) as (llm, record), record(WHOLE) as run_:
        generate(llm, [prompt(40)])
    cap = open_capture(run_.paths[0])
    wanted = int(str(cap.steps[5].span_id), 16)
    seen = run_script(tmp_path / "read.py", PLAIN, run_.paths[0], wanted)
    assert seen["clean"], "the reader imported our code"
    assert seen["step"] == 5
    np.testing.assert_array_equal(np.float32(seen["zarr"]["logits"]), np.asarray(cap.logits)[5])
    np.testing.assert_array_equal(np.float32(seen["xarray"]["logits"]), np.asarray(cap.logits)[5])
    row = cap.row(step=5, layer=2, head=3)
    np.testing.assert_array_equal(np.float32(seen["zarr"]["attention"]), row)
    np.testing.assert_array_equal(np.float32(seen["xarray"]["attention"]), row)
    assert seen["xarray"]["dims"] == ["step", "layer", "head", "key_pos"]


PLAIN = """
import json, sys
import xarray, zarr

path, wanted = sys.argv[1], int(sys.argv[2])
group = zarr.open_group(path, mode="r")
step = int((group["span_id"][:] == wanted).nonzero()[0][0])
keys = int(group["kv_len"][step])
data = xarray.open_zarr(path, chunks=None)
row = data.set_xindex("span_id").sel(span_id=wanted)
print("RESULT", json.dumps({
    "step": step,
    "zarr": {"logits": group["logits"][step].tolist(), "attention": group["attention"][step, 2, 3, :keys].tolist()},
    "xarray": {
        "logits": row["logits"].values.tolist(),
        "attention": row["attention"].sel(layer=2, head=3).values[:keys].tolist(),
        "dims": list(data["attention"].dims),
    },
    "clean": not any(name.split(".")[0] in ("tracer", "exporters", "vllm", "torch") for name in sys.modules),
}))
"""

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=8,
                            extra_args={"trace_capture": sys.argv[2]})
    llm = LLM(sys.argv[1], dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=256,
              kv_cache_memory_bytes=1 << 26, enable_prefix_caching=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in json.loads(sys.argv[3])]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert "tracer.offline" not in sys.modules
    print("RESULT", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def test_an_engine_in_processes_of_its_own_gives_the_same(
    models: Path, store: Path, offline: Callable[..., Any], tmp_path: Path
) -> None:
    path, prompts, elsewhere = make_model("llama", models), [prompt(70, 1), prompt(20, 2)], tmp_path / "captures"
    with offline(path) as (llm, _):
        here = run(llm, store, [Ask(tokens, WHOLE) for tokens in prompts])
    answers = run_script(
        tmp_path / "script.py", SCRIPT, path, WHOLE, prompts,
        TENSORSPAN_STORE=str(elsewhere), VLLM_ENABLE_V1_MULTIPROCESSING="1", XDG_RUNTIME_DIR=str(tmp_path),
    )  # fmt: skip
    wait_for_exporter(tmp_path)
    assert answers == [answer.tokens for answer in here]
    entries = sorted(find_captures(elsewhere), key=lambda entry: entry.start_ns)
    assert [entry.status for entry in entries] == ["ok", "ok"]
    for entry, answer in zip(entries, here, strict=True):
        there, mine = open_capture(entry.path), answer.capture
        assert mine is not None
        assert there.complete, there.missing
        assert there.arrays == mine.arrays
        assert [token.id for token in there.tokens] == [token.id for token in mine.tokens]
        np.testing.assert_allclose(np.asarray(there.logits), np.asarray(mine.logits), rtol=0, atol=TOLERANCE)
        for layer in mine.attention:
            for one, other in zip(rows_of(there, layer), rows_of(mine, layer), strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)
            maps = (np.asarray(there.attention_prefill[layer]), np.asarray(mine.attention_prefill[layer]))
            np.testing.assert_allclose(*maps, rtol=0, atol=TOLERANCE)
        assert len(spans_of(elsewhere, there.trace_id)) == 1 + 8


def wait_for_exporter(runtime: Path) -> None:
    """Until the exporter process of a script that has ended is gone too: it holds its lock so long."""
    for path in runtime.glob("tensorspan-*/*.lock"):
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
    assert not list(runtime.glob("tensorspan-*/*.sock"))


def test_installed_is_not_enabled(models: Path, tmp_path: Path) -> None:
    code = SCRIPT.replace('"tracer.offline"', '"tracer.export"')
    answers = run_script(
        tmp_path / "script.py", code, make_model("llama", models), "logits", [prompt(5)],
        VLLM_ENABLE_V1_MULTIPROCESSING="0", XDG_RUNTIME_DIR=str(tmp_path),
    )  # fmt: skip
    assert len(answers[0]) == 8
    assert not list(tmp_path.glob("tensorspan-*"))
