"""Tensor parallel ranks that write one capture together, and data parallel engines behind one server."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import transformers

from tests.cpus import EAGER_TOLERANCE
from tests.integration.models import FAMILIES, VOCAB, make_model
from tests.integration.oracle import oracle
from tests.integration.receiver import Receiver, attributes
from tests.integration.runs import make_tokenized, prompt, run_script
from tests.integration.server import Server, server_environment
from tracer import Capture, open_capture

pytestmark = pytest.mark.engine

TOLERANCE: Final = EAGER_TOLERANCE
TWO_CORES: Final = "0|1"
STEPS: Final = 6
WHOLE: Final = "logits;dtype=f32, attention;rows=all;dtype=f32, qk;rows=all"
OPTIONS: Final = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--no-enable-prefix-caching")


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered request."""

    ids: list[int]
    """Prompt and answer."""
    trace_id: str
    capture: Capture | None
    spans: list[Any]


@contextmanager
def serving(model: Path, folder: Path, receiver: Receiver, *options: str) -> Iterator[Server]:
    """A server on two cores whose store is `folder/store`."""
    environment = server_environment(
        TENSORSPAN_STORE=str(folder / "store"), VLLM_CPU_OMP_THREADS_BIND=TWO_CORES,
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OTEL_EXPORTER_OTLP_INSECURE="true",
    )  # fmt: skip
    running = Server.vllm(model, folder / "log", environment, *OPTIONS, *options)
    try:
        yield running
    finally:
        running.stop()


def ask(server: Server, receiver: Receiver, store: Path, captures: list[str]) -> list[Reply]:
    """All requests at once, each with a prompt of its own length."""

    def one(number: int) -> Reply:
        tokens = prompt(70 + number, number)
        body = {"model": "demo", "prompt": tokens, "max_tokens": STEPS, "temperature": 0, "ignore_eos": True}
        headers = {"Trace-Capture": captures[number]} if captures[number] else {}
        status, found, answer = server.post("/v1/completions", {**body, "return_token_ids": True}, headers)
        assert status == 200, answer
        trace_id = found["traceresponse"].split("-")[1]
        spans = receiver.trace(trace_id)  # The request's span goes out after its capture is closed.
        ref = found.get("trace-capture-ref")
        capture = open_capture(store, ref) if ref else None
        return Reply([*tokens, *answer["choices"][0]["token_ids"]], trace_id, capture, spans)

    with ThreadPoolExecutor(len(captures)) as pool:
        return list(pool.map(one, range(len(captures))))


def check_rows(cap: Capture, want: Any, heads: list[int]) -> None:
    """Decode rows are eager's."""
    assert cap.complete, cap.missing
    assert list(cap.attention) == list(range(len(want)))
    for layer in cap.attention:
        assert cap.attention[layer]["head"].to_numpy().tolist() == heads
        for step in cap.steps:
            got = np.asarray(cap.attention[layer].isel(step=step.index))[:, : step.kv_len]
            wanted = want[layer][heads, step.position, : step.kv_len]
            np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


def check_whole(cap: Capture, model: Path, tokens: list[int]) -> None:
    """Everything of a capture of `WHOLE` is eager's, as it was stored and as it is rebuilt."""
    want, last = oracle(model, tokens), cap.prompt_tokens
    assert [token.id for token in cap.tokens] == tokens
    check_rows(cap, want.attention, list(range(want.attention.shape[1])))
    for layer in cap.attention:
        wanted = want.attention[layer][:, :last, :last]
        for got in (cap.attention_prefill[layer][..., :last], cap.qk_prefill[layer]):
            np.testing.assert_allclose(np.asarray(got), wanted, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(np.asarray(cap.qk[layer]), np.asarray(cap.attention[layer]), rtol=0, atol=TOLERANCE)
    logits = np.asarray(cap.logits)
    assert logits.argmax(axis=1).tolist() == tokens[last:]
    np.testing.assert_allclose(logits, want.logits[last - 1 : -1], rtol=0, atol=1e-3)


def check_spans(reply: Reply) -> list[dict[str, Any]]:
    """One span per step and request; attributes of those that sampled, in order."""
    steps = [span for span in reply.spans if span.name in ("prefill", "decode")]
    sampled = [facts for span in steps if "tensorspan.step.index" in (facts := attributes(span))]
    assert [facts["tensorspan.step.index"] for facts in sampled] == list(range(STEPS))
    assert len({span.span_id for span in reply.spans}) == len(reply.spans) == len(steps) + 2
    assert not any("tensorspan.dropped.causes" in attributes(span) for span in reply.spans)
    assert all(facts["tensorspan.logits.entropy"] > 0 for facts in sampled)
    return sampled


def test_two_ranks_write_one_capture(
    models: Path,
    receiver: Receiver,
    tmp_path: Path,
    offline: Callable[..., Any],
    generate: Callable[..., Any],
) -> None:
    model = make_tokenized("llama", models)
    some, one = 'attention;heads="1-2";dtype=f32', 'attention=(1 2);heads="0";rows=all;dtype=f32'
    captures = [WHOLE, some, one, "logits;dtype=f32", "summary", ""]
    options = ("--tensor-parallel-size", "2", "--max-num-batched-tokens", "64")  # Prompts come in chunks.
    with serving(model, tmp_path, receiver, *options) as server:
        status, _, problem = server.post("/v1/completions", {"model": "demo", "prompt": [5], "max_tokens": 1},
                                         {"Trace-Capture": 'attention;heads="4"'})  # fmt: skip
        assert (status, "heads 0-3" in problem["detail"]) == (400, True)
        whole, two, zero, logits, summary, plain = ask(server, receiver, tmp_path / "store", captures)
    assert whole.capture is not None
    check_whole(whole.capture, model, whole.ids)
    check_summaries(check_spans(whole), whole.capture)
    assert two.capture is not None
    check_rows(two.capture, oracle(model, two.ids).attention, [1, 2])
    check_one_head(zero, model)
    for reply in (logits, summary):
        assert reply.capture is not None
        assert reply.capture.complete, reply.capture.missing
        check_spans(reply)
    assert summary.capture is not None
    check_summaries(check_spans(summary), summary.capture)
    assert plain.capture is None
    check_spans(plain)
    with offline(model) as (llm, record), record(WHOLE) as run:
        [answer] = generate(llm, [whole.ids[:-STEPS]], STEPS)
    alone = open_capture(run.store, run.span_ids[0])
    assert answer == whole.ids[-STEPS:]
    for layer in alone.attention:
        for name in ("attention", "attention_prefill", "qk"):
            one_rank, two_ranks = (np.asarray(getattr(cap, name)[layer]) for cap in (alone, whole.capture))
            np.testing.assert_allclose(two_ranks, one_rank, rtol=0, atol=TOLERANCE)


def check_summaries(sampled: list[dict[str, Any]], cap: Capture) -> None:
    """A span's attention attributes are means over the heads of all ranks."""
    stored = np.asarray(cap.to_xarray()["attention_summary"])
    assert np.isfinite(stored).all()
    for step, facts in enumerate(sampled):
        got = [facts[f"tensorspan.attention.{name}"] for name in ("entropy", "sink_mass", "prompt_mass", "self_weight")]
        np.testing.assert_allclose(got, stored[step].mean(axis=(0, 1)), rtol=0, atol=1e-5)
        if "attention" in cap.arrays:
            layer, head = facts["tensorspan.attention.top.layer"], facts["tensorspan.attention.top.head"]
            weights = [np.asarray(cap.attention[layer].isel(step=step))[:, 1:] for layer in cap.attention]
            assert facts["tensorspan.attention.top.weight"] == pytest.approx(max(rows.max() for rows in weights))
            assert weights[layer][head].max() == pytest.approx(facts["tensorspan.attention.top.weight"])


def check_one_head(reply: Reply, model: Path) -> None:
    """A head that one rank alone has."""
    cap = reply.capture
    assert cap is not None
    assert cap.complete, cap.missing
    want, last = oracle(model, reply.ids).attention, cap.prompt_tokens
    assert list(cap.attention) == [1, 2]
    for layer in cap.attention:
        got = np.asarray(cap.attention_prefill[layer])[..., :last]
        np.testing.assert_allclose(got, want[layer][:1, :last, :last], rtol=0, atol=TOLERANCE)
        row = cap.row(step=STEPS - 1, layer=layer, head=0)
        np.testing.assert_allclose(row, want[layer][0, -2, :-1], rtol=0, atol=TOLERANCE)
    check_spans(reply)


SCRIPT: Final = """
import json, os, sys
from tests.integration.runs import prompt
from tracer import capture
from tracer.errors import CaptureUnavailableError
from tracer.worker import hooks

if os.environ.get("BROKEN"):  # Workers import this file too.
    hook = hooks._hook
    def broken(worker, *rest):
        if worker.vllm_config.parallel_config.rank == 1:
            raise RuntimeError("no hooks here")
        return hook(worker, *rest)
    hooks._hook = broken

def main(store, whole, *models):
    from vllm import LLM, SamplingParams
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=6, detokenize=False)

    def start(model):
        with capture("", store=store):
            return LLM(model, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=256,
                       tensor_parallel_size=2, kv_cache_memory_bytes=1 << 26, disable_log_stats=True)

    def ask(llm, what):
        with capture(what, store=store) as run:
            [answer] = llm.generate([{"prompt_token_ids": prompt(70)}], params, use_tqdm=False)
        return [run.span_ids[0], list(answer.outputs[0].token_ids)]

    out = []
    for model in models:
        llm = start(model)
        out.append(ask(llm, whole))
        llm.llm_engine.engine_core.shutdown()
    os.environ["BROKEN"] = "1"
    llm = start(models[0])
    try:
        ask(llm, "attention")
    except CaptureUnavailableError as error:
        refused = str(error)
    print("RESULT" + json.dumps({"whole": out, "refused": refused, "logits": ask(llm, "logits;dtype=f32")}))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def odd_llama() -> Any:
    """One KV head, which both ranks hold, and a vocabulary that does not divide evenly."""
    config = transformers.LlamaConfig(**FAMILIES["llama"]().to_diff_dict())
    config.num_key_value_heads, config.vocab_size, config.num_hidden_layers = 1, 509, 2
    return config


@pytest.fixture(scope="module")
def two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], Any]:
    """Store, models and what happened: one engine of two ranks after the other, the last with one rank unhooked."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "odd", odd_llama)
        made = [make_model(family, models) for family in ("odd", "bloom", "gpt_oss")]
    found = run_script(
        folder / "run.py", SCRIPT, folder / "store", WHOLE, *made,
        VLLM_CPU_OMP_THREADS_BIND=TWO_CORES, VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )  # fmt: skip
    return folder / "store", made, found


@pytest.mark.parametrize(("place", "key_heads", "vocab"), [(0, 1, 509), (1, 4, VOCAB), (2, 2, VOCAB)])
def test_what_each_rank_has_a_part_of(
    place: int, key_heads: int, vocab: int, two_ranks: tuple[Path, list[Path], Any]
) -> None:
    """A KV head that both hold and a vocabulary that is padded; ALiBi slopes; learned sinks and a window."""
    store, made, found = two_ranks
    span_id, answer = found["whole"][place]
    cap = open_capture(store, span_id)
    check_whole(cap, made[place], [*prompt(70), *answer])
    assert cap.to_xarray().sizes["kv_head"] == key_heads
    assert cap.logits.sizes["vocab"] == vocab


def test_a_rank_that_cannot_be_hooked(two_ranks: tuple[Path, list[Path], Any]) -> None:
    """Attention is refused with its name, logits are stored as ever, and the engine serves."""
    store, _, found = two_ranks
    assert "rank 1 of 2: hooking the worker failed: RuntimeError: no hooks here" in found["refused"]
    span_id, answer = found["logits"]
    cap = open_capture(store, span_id)
    assert cap.complete, cap.missing
    assert np.asarray(cap.logits).argmax(axis=1).tolist() == answer


def test_two_engines_behind_one_server(models: Path, receiver: Receiver, tmp_path: Path) -> None:
    model = make_tokenized("llama", models)
    with serving(model, tmp_path, receiver, "--data-parallel-size", "2") as server:
        replies = ask(server, receiver, tmp_path / "store", [WHOLE] * 6)
        with urllib.request.urlopen(server.url + "/metrics", timeout=30) as metrics:
            lines = metrics.read().decode().splitlines()
    served = [line for line in lines if line.startswith("vllm:request_success_total") and 'reason="length"' in line]
    assert [float(line.split()[-1]) > 0 for line in served] == [True, True], "both engines had requests"
    assert sum(float(line.split()[-1]) for line in served) == 6
    for reply in replies:
        assert reply.capture is not None
        check_whole(reply.capture, model, reply.ids)
        check_spans(reply)
