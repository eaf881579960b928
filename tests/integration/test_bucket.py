"""The real engine with a store in a bucket of a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.exporters.seaweed import Seaweed
from tests.integration.models import make_model
from tests.integration.runs import prompt, run_script
from tracer import find_captures, open_capture

pytestmark = pytest.mark.engine

WHOLE = "logits;dtype=f32, attention;rows=all;dtype=f32, summary"

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from tracer import capture, open_capture

if __name__ == "__main__":
    model, store, what, prompts = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=8)
    with capture(what, store=store) as run:
        llm = LLM(model, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=256,
                  kv_cache_memory_bytes=1 << 26, enable_prefix_caching=False)
        outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)
    complete = [open_capture(run.store, span_id).complete for span_id in run.span_ids]
    print("RESULT", json.dumps({
        "complete": complete, "locations": run.locations, "tokens": [list(o.outputs[0].token_ids) for o in outputs],
    }))
"""


def test_a_block_leaves_captures_in_the_bucket_that_equal_those_of_a_directory(
    models: Path, seaweed: Seaweed, tmp_path: Path
) -> None:
    path, prompts = make_model("llama", models), [prompt(70, 1), prompt(20, 2)]
    bucket, directory, spool = f"s3://captures/{tmp_path.name}", tmp_path / "captures", tmp_path / "spool"
    spooled = {"TENSORSPAN_SPOOL": str(spool), "XDG_RUNTIME_DIR": str(tmp_path), **seaweed.environment()}
    script = tmp_path / "script.py"
    there = run_script(script, SCRIPT, path, bucket, WHOLE, prompts, **spooled)
    here = run_script(script, SCRIPT, path, directory, WHOLE, prompts, XDG_RUNTIME_DIR=str(tmp_path))
    assert there["complete"] == here["complete"] == [True, True]
    assert there["tokens"] == here["tokens"]
    assert len(find_captures(bucket)) == 2
    for remote, local in zip(there["locations"], here["locations"], strict=True):
        mine, theirs = open_capture(local), open_capture(remote)
        assert theirs.location.startswith(bucket)
        assert theirs.arrays == mine.arrays
        assert [token.id for token in theirs.tokens] == [token.id for token in mine.tokens]
        ours, data = mine.to_xarray(), theirs.to_xarray()
        for name in ("logits", "attention", "attention_prefill", "attention_summary"):
            np.testing.assert_allclose(data[name].to_numpy(), ours[name].to_numpy(), rtol=0, atol=1e-5)
        assert open_capture(bucket, theirs.steps[3].span_id).step_index == 3
    assert json.loads((next(spool.iterdir()) / "zarr.json").read_text())["attributes"]["kind"] == "store"
    assert not [item for item in next(spool.iterdir()).glob("*/*") if item.suffix != ".jsonl"]
