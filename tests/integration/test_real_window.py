"""A real model with windows: Gemma-3-270M, a prompt longer than its window of 512, against Transformers eager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.model import gemma_model
from tests.cpus import EAGER_TOLERANCE
from tests.integration.oracle import oracle
from tracer import config, open_capture
from tracer.export import engine_infos

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WINDOW, PROMPT, FULL = 512, 640, (5, 11, 17)
MAPPED = (4, 5)
"""A layer with a window and one without, whose whole prompt is looked at."""
TOLERANCE = EAGER_TOLERANCE
TEXT = Path(__file__).parents[2] / "LICENSE"


def prompt(model: Path) -> list[int]:
    """English text of `PROMPT` tokens, the first one the mark without which this model only stutters."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    return [int(tokenizer.bos_token_id), *map(int, tokens[: PROMPT - 1])]


def test_attention_of_a_real_model_with_windows_equals_eager(
    offline: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    model = gemma_model()
    tokens = prompt(model)
    with offline(model, max_model_len=1024, kv_cache_memory_bytes=1 << 28) as (llm, record):
        layers = engine_infos(config.load())[0].layers
        with record("logits;dtype=f32, attention;dtype=f32") as run:
            [answer] = generate(llm, [tokens])
        with record(f"attention=({MAPPED[0]} {MAPPED[1]});rows=all;dtype=f32") as mapped:
            [again] = generate(llm, [tokens], max_tokens=1)
    assert again == answer[:1]
    assert [layer.sliding_window for layer in layers] == [None if i in FULL else WINDOW for i in range(18)]
    want, cap = oracle(model, tokens + answer), open_capture(run.store, run.span_ids[0])
    assert cap.complete, cap.missing
    assert list(cap.attention) == list(range(18))
    for layer in range(18):
        for step in range(len(answer)):
            row = np.stack([cap.row(step=step, layer=layer, head=head) for head in range(4)])
            last = PROMPT - 1 + step
            expected = want.attention[layer, :, last, : last + 1]
            np.testing.assert_allclose(row, expected, rtol=0, atol=TOLERANCE, err_msg=f"layer {layer}, step {step}")
            assert bool((row[:, : last + 1 - WINDOW] == 0).all()) is (layer not in FULL)
    logits = np.asarray(cap.logits)
    assert logits.argmax(axis=1).tolist() == answer == want.logits[PROMPT - 1 : -1].argmax(axis=1).tolist()
    whole = open_capture(mapped.store, mapped.span_ids[0])
    assert whole.complete, whole.missing
    for layer in MAPPED:
        got = np.asarray(whole.attention_prefill[layer])[..., :PROMPT]
        expected = want.attention[layer][:, :PROMPT, :PROMPT]
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE, err_msg=f"layer {layer}")
