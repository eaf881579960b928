"""Offline runs outside a `capture(...)` block, where every request of one call asks for itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers
import transformers

from tests.integration.models import VOCAB, make_model
from tests.integration.server import server_environment
from tracer import Capture, config, open_capture
from tracer.export import Channel, process_channel
from tracer.records import GenerationStart, Record

__all__ = [
    "Answer",
    "Ask",
    "flush",
    "make_tokenized",
    "opened",
    "prompt",
    "rows_of",
    "run",
    "run_script",
    "runner_of",
    "spans_of",
    "watched",
]

FLUSH_SECONDS: Final = 60.0
GREEDY: Final[dict[str, Any]] = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens that are no special ones."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, 500, length)]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a batch; `capture` is the text of a `Trace-Capture` header."""

    prompt: list[int]
    capture: str = ""
    max_tokens: int = 8
    params: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and the capture if one was asked for."""

    tokens: list[int]
    text: str
    start: GenerationStart
    capture: Capture | None


def run(llm: Any, store: Path, asks: Sequence[Ask], **options: Any) -> list[Answer]:
    """One `llm.generate` call with all of `asks` and these further `options`; `n` must be 1."""
    from vllm import SamplingParams

    params = []
    for ask in asks:
        extra = {**({"trace_capture": ask.capture} if ask.capture else {}), **ask.extra}
        chosen = {**GREEDY, "max_tokens": ask.max_tokens, "extra_args": extra or None, **ask.params}
        params.append(SamplingParams(**chosen))
    with watched() as sent:
        outputs = llm.generate([{"prompt_token_ids": ask.prompt} for ask in asks], params, use_tqdm=False, **options)
    starts = [record for record in sent if isinstance(record, GenerationStart)]
    flush(sent)
    return [
        Answer(list(output.outputs[0].token_ids), output.outputs[0].text, start, opened(store, start))
        for output, start in zip(outputs, starts, strict=True)
    ]


def opened(store: Path, start: GenerationStart) -> Capture | None:
    """The capture of a generation; None, and no trace of one, if it asked for none."""
    if start.capture is None:
        assert not (store / start.trace_id).exists()
        return None
    return open_capture(store, f"{start.trace_id}/{start.span_id}")


@contextmanager
def watched() -> Iterator[list[Record]]:
    """Every record that this process hands to the exporter, with those of an engine inside it."""
    sent: list[Record] = []
    original = Channel.send

    def send(self: Channel, record: Record, payload: Sequence[memoryview] = ()) -> bool:
        written = original(self, record, payload)
        if written:
            sent.append(record)
        return written

    Channel.send = send  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        Channel.send = original  # type: ignore[method-assign]


def flush(sent: Sequence[Record]) -> None:
    """Wait until the exporter has put everything about these generations on disk."""
    ids = [record.span_id for record in sent if isinstance(record, GenerationStart)]
    assert process_channel(config.load()).flush(ids, FLUSH_SECONDS)


def rows_of(capture: Capture, layer: int) -> list[Any]:
    """float [head, key] of each step, cut to its valid keys."""
    block = np.asarray(capture.attention[layer])
    return [block[step.index, :, : step.kv_len] for step in capture.steps]


def spans_of(store: Path, trace_id: str) -> list[dict[str, Any]]:
    """OTLP-JSON spans of one trace; `attributes` as a plain dict of their values."""
    spans = []
    for path in (store / "spans").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            if trace_id not in line:
                continue
            message = json.loads(line)
            scopes = [scope for resource in message["resourceSpans"] for scope in resource["scopeSpans"]]
            spans += [span for scope in scopes for span in scope["spans"] if span["traceId"] == trace_id]
    for span in spans:
        span["attributes"] = {item["key"]: item["value"] for item in span["attributes"]}
    return spans


def run_script(path: Path, code: str, *arguments: object, **environment: str) -> Any:
    """Run `code` as the file `path` in a process of its own; the JSON after `RESULT` in its output."""
    path.write_text(code)
    command = [sys.executable, str(path), *map(str, arguments)]
    env = server_environment(VLLM_LOGGING_LEVEL="WARNING", **environment)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.rpartition("RESULT")[2].splitlines()[0])


def runner_of(llm: Any) -> Any:
    """vLLM's model runner of an engine inside this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def make_tokenized(family: str, root: Path) -> Path:
    """`make_model`, with a byte-level tokenizer of as many tokens as the model has."""
    path = make_model(family, root)
    if not (path / "tokenizer.json").exists():
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([f"The key {n} opens door {n * 7 % 1000}." for n in range(1000)], trainer)
        assert tokenizer.get_vocab_size() == VOCAB
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
        )
        fast.save_pretrained(path)
    return path
