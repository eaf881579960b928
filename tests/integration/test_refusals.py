"""What cannot be captured is refused with its reason, and the engine serves on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.integration.models import VOCAB, make_model
from tests.integration.oracle import oracle
from tests.integration.runs import (
    Ask,
    make_tokenized,
    prompt,
    rows_of,
    run,
    spans_of,
    watched,
)
from tracer import capture, config, open_capture
from tracer._guard import Guard
from tracer.context import EXTRA_ARGS_KEY
from tracer.errors import CaptureRequestError, StoreError
from tracer.export import Channel, engine_infos, process_channel
from tracer.records import StepRecord
from tracer.ring import Ring
from tracer.worker.native_maths import NativeMaths

pytestmark = pytest.mark.engine

WHOLE = "logits;dtype=f32, attention;dtype=f32"
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0
}  # fmt: skip


def mamba2() -> Any:
    """State-space layers only."""
    return transformers.Mamba2Config(**COMMON, state_size=16, num_hidden_layers=2, num_heads=8, head_dim=32, n_groups=1)


def deepseek() -> Any:
    """Multi-head latent attention."""
    return transformers.DeepseekV2Config(
        **COMMON, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, first_k_dense_replace=2, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64,
        qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4, max_position_embeddings=512,
    )  # fmt: skip


def falcon_h1() -> Any:
    """State-space layers beside softmax attention."""
    return transformers.FalconH1Config(
        **COMMON, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        mamba_d_ssm=128, mamba_n_heads=4, mamba_d_head=32, mamba_n_groups=1, mamba_d_state=16,
        max_position_embeddings=512,
    )  # fmt: skip


def saved(config_: Any, root: Path) -> Path:
    """A random checkpoint of that configuration."""
    path = root / str(config_.model_type)
    if not path.exists():
        torch.manual_seed(3)
        transformers.AutoModelForCausalLM.from_config(config_, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.mark.parametrize(("make", "kind"), [(mamba2, "MambaMixer2"), (deepseek, "MLAAttention")])
def test_a_model_without_softmax_attention_refuses_it_and_serves(
    make: Callable[[], Any], kind: str, models: Path, offline: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    tokens = prompt(12)
    with offline(saved(make(), models)) as (llm, record):
        for text in ("attention", "summary", "logits, attention=(0)"):
            with pytest.raises(CaptureRequestError, match=f"{kind} is not causal softmax attention"), record(text):
                generate(llm, [tokens])
        assert not llm.llm_engine.has_unfinished_requests()
        with record("logits;dtype=f32") as run_:
            [answer] = generate(llm, [tokens])
    cap = open_capture(run_.store, run_.span_ids[0])
    assert cap.complete, cap.missing
    assert np.asarray(cap.logits).argmax(axis=1).tolist() == answer
    assert len(answer) == 8


def test_a_hybrid_gives_what_it_has_and_names_the_rest(
    models: Path, offline: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    path, tokens = saved(falcon_h1(), models), prompt(30)
    with offline(path) as (llm, record):
        with record(WHOLE) as run_:
            [answer] = generate(llm, [tokens])
        layers = engine_infos(config.load())[0].layers
    cap = open_capture(run_.store, run_.span_ids[0])
    refused = [layer.index for layer in layers if layer.unsupported]
    able = [layer.index for layer in layers if not layer.unsupported]
    assert len(refused) == len(able) == 2
    assert list(cap.attention) == able
    assert not cap.complete
    assert [entry["what"] for entry in cap.missing] == [f"layer {index}" for index in refused]
    assert all("MambaMixer2 is not causal softmax attention" in entry["reason"] for entry in cap.missing)
    want = oracle(path, tokens + answer)
    for place, layer in enumerate(able):
        for step, row in enumerate(rows_of(cap, layer)):
            np.testing.assert_allclose(row, want.attention[place, :, 29 + step, : 30 + step], rtol=0, atol=1e-5)


def test_an_embedding_model_serves_and_says_that_it_cannot(models: Path, offline: Callable[..., Any]) -> None:
    path = models / "bert"
    torch.manual_seed(3)
    bert = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    transformers.AutoModel.from_config(bert, dtype=torch.float32).save_pretrained(path)
    for file in make_tokenized("llama", models).glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    with offline(path, runner="pooling", skip_tokenizer_init=False) as (llm, record):
        [info] = engine_infos(config.load())
        with record(WHOLE) as run_:
            [output] = llm.embed([{"prompt_token_ids": [5, 6, 7]}], use_tqdm=False)
    assert len(output.outputs.embedding) == 128
    assert run_.span_ids == ()
    assert info.attention_unsupported == info.logits_unsupported == "unavailable: the model does not generate"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attention=(3)", "layer 3 is out of range; allowed: this model has layers 0-2"),
        ('attention;heads="4"', "head 4 is out of range; allowed: this model has heads 0-3"),
        ("logits;top=513", "exceeds the vocabulary"),
        ("logits, hidden_states", "unknown member"),
        ("attention=(", "not an RFC 9651 Dictionary"),
        ("logits;dtype=f64", r"dtype=f64; allowed: dtype=f16\|f32"),
    ],
)
def test_a_bad_request_is_refused_before_anything_runs(text: str, says: str, llama_engine: Any, store: Path) -> None:
    good, bad = Ask(prompt(10), WHOLE), Ask(prompt(11), text)
    with watched() as sent, pytest.raises(CaptureRequestError, match=says):
        run(llama_engine, store, [bad])
    assert sent == []
    with pytest.raises(CaptureRequestError, match=says):
        run(llama_engine, store, [good, bad])
    assert not llama_engine.llm_engine.has_unfinished_requests()
    [answer] = run(llama_engine, store, [good])
    assert answer.capture is not None
    assert answer.capture.complete


@pytest.fixture(scope="module")
def shared() -> Iterator[dict[str, Any]]:
    """One engine for several tests of this file, and what ends it."""
    out: dict[str, Any] = {}
    yield out
    if "context" in out:
        out["context"].__exit__(None, None, None)


@pytest.fixture
def llama_engine(shared: dict[str, Any], models: Path, offline: Callable[..., Any]) -> Any:
    """An engine on the tiny Llama, started by the first test that needs it."""
    if "llm" not in shared:
        shared["context"] = offline(make_model("llama", models))
        shared["llm"], _ = shared["context"].__enter__()
    return shared["llm"]


def test_a_bad_text_in_a_block_is_refused_at_its_head(store: Path) -> None:
    with pytest.raises(CaptureRequestError, match="unknown member"), capture("hidden", store=store):
        pytest.fail("the block ran")


def test_an_unwritable_store_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StoreError, match=f"{tmp_path}/file/captures.*Not a directory"),
        capture("logits", store=tmp_path / "file" / "captures"),
    ):
        pytest.fail("the block ran")


def test_a_clients_own_trace_request_is_not_trusted(llama_engine: Any, store: Path) -> None:
    forged = {
        "trace_id": "ab" * 16, "span_id": "cd" * 8, "sampled": True,
        "capture": {"logits": [None, "f16"], "attention": [None, None, "all", "f16"], "summary": True},
    }  # fmt: skip
    asks = [Ask(prompt(9), extra={EXTRA_ARGS_KEY: forged}), Ask(prompt(9), "logits", extra={EXTRA_ARGS_KEY: forged})]
    with watched() as sent:
        silent, captured = run(llama_engine, store, asks)
    assert not (store / ("ab" * 16)).exists()
    assert all(getattr(record, "trace_id", "") != "ab" * 16 for record in sent)
    assert silent.capture is None
    assert captured.capture is not None
    assert "attention" not in captured.capture.arrays
    assert silent.tokens == captured.tokens


@contextmanager
def tiny_queue(capacity: int, *, drained: bool) -> Iterator[Channel]:
    """The worker's queue replaced by one of `capacity` bytes, of which the exporter knows or not."""
    channel = process_channel(config.load(), "worker")
    before, channel.ring = channel.ring, Ring.create(capacity)
    if drained:
        channel.close()
        assert channel.connect()
    try:
        yield channel
    finally:
        channel.ring = before
        if drained:
            channel.close()
            assert channel.connect()


def test_a_full_queue_costs_arrays_and_says_so(llama_engine: Any, store: Path) -> None:
    ask = Ask(prompt(20), "logits;dtype=f32, attention;rows=all;dtype=f32", 12)
    [free] = run(llama_engine, store, [ask])
    # A step's record fits, its arrays (2 kB of logits and 1 kB of attention) and the prompt's map do not.
    with tiny_queue(2048, drained=True):
        [full] = run(llama_engine, store, [ask])
    assert free.capture is not None
    assert free.capture.complete
    assert full.tokens == free.tokens
    assert full.capture is not None
    assert not full.capture.complete
    assert full.capture.attrs["dropped"]["count"] > 0
    assert {"logits", "attention", "attention_prefill"} <= {entry["array"] for entry in full.capture.missing}
    assert any(entry["reason"] == "queue full" for entry in full.capture.missing)
    spans = spans_of(store, full.start.trace_id)
    said = [str(value) for span in spans for value in span["attributes"].values() if "queue full" in str(value)]
    assert said
    [generation] = [span for span in spans if span["spanId"] == full.start.span_id]
    assert "queue full" in str(generation["attributes"]), "the generation span says nothing"


def test_a_queue_that_nobody_reads_costs_the_trace_and_nothing_else(llama_engine: Any, store: Path) -> None:
    ask = Ask(prompt(20), WHOLE, 40)
    [free] = run(llama_engine, store, [ask])
    with tiny_queue(4096, drained=False) as channel:
        lost = channel.lost
        [full] = run(llama_engine, store, [ask])
        assert channel.lost > lost
    assert full.tokens == free.tokens
    assert full.capture is not None
    assert full.capture.closed
    assert not full.capture.complete
    assert {"array": "logits", "what": "steps 0-39", "reason": "not received"} in full.capture.missing
    [after] = run(llama_engine, store, [ask])
    assert after.capture is not None
    assert after.capture.complete


@pytest.mark.parametrize("where", ["layer", "record"])
def test_a_mistake_of_ours_costs_one_capture_and_no_answer(
    where: str, llama_engine: Any, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Ask(prompt(20, 1), WHOLE)
    [before] = run(llama_engine, store, [alone])
    attend = NativeMaths.attention

    def broken_layer(self: Any, step: Any, layer: Any, works: Any, *rest: Any) -> Any:
        if layer.info.index == 1:
            raise ValueError("a mistake")
        return attend(self, step, layer, works, *rest)

    def broken_record(channel: Any, step: Any, work: Any, end_ns: int) -> None:
        raise ValueError("a mistake")

    if where == "layer":
        monkeypatch.setattr(NativeMaths, "attention", broken_layer)
    else:
        monkeypatch.setattr("tracer.worker.step.send_step", broken_record)
    # Our tests make the guard strict: here it must do what it does in production.
    monkeypatch.setattr(Guard, "strict", False)
    [hit] = run(llama_engine, store, [alone])
    monkeypatch.undo()
    assert hit.tokens == before.tokens
    assert before.capture is not None
    assert hit.capture is not None
    assert hit.capture.closed
    assert not hit.capture.complete
    wanted = "layer 1: a mistake" if where == "layer" else "not received"
    assert wanted in {entry["reason"] for entry in hit.capture.missing}
    if where == "layer":
        assert not hit.capture.attention, "a row with a layer missing is no row"
        np.testing.assert_array_equal(np.asarray(hit.capture.logits), np.asarray(before.capture.logits))
    [after] = run(llama_engine, store, [alone])
    assert after.capture is not None
    assert after.capture.complete, after.capture.missing


def test_ids_are_unique_across_starts(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    ask, path, ids, numbers = Ask(prompt(10), "logits"), make_model("llama", models), [], []
    for _ in range(2):
        with offline(path) as (llm, _record), watched() as sent:
            numbers.append(random.getrandbits(64))
            for answer in run(llm, store, [ask, ask, Ask(prompt(4))]):
                ids += [answer.start.trace_id, answer.start.span_id]
        ids += [record.step_span_id for record in sent if isinstance(record, StepRecord)]
    assert numbers[0] == numbers[1], "vLLM did not seed `random`: the test shows nothing"
    assert len(ids) == 2 * (3 * 2 + 3 * 8)
    assert len(set(ids)) == len(ids)
