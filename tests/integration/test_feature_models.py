"""Models that are more than a decoder over its own keys: shared caches, images, an encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.integration.comparing import WHOLE, check
from tests.integration.feature_models import IMAGE, IMAGE_TOKENS, make_blip2, make_sharing, make_whisper
from tests.integration.oracle import Oracle, oracle
from tests.integration.runs import Ask, flush, make_tokenized, opened, prompt, run, watched
from tracer import config
from tracer.errors import CaptureUnavailableError
from tracer.export import engine_infos
from tracer.records import GenerationStart

pytestmark = pytest.mark.engine


def test_layers_that_read_another_layers_keys(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    path = make_sharing(models)
    asks = [Ask(prompt(70, 1), WHOLE + ", qk", 12), Ask(prompt(41, 2), WHOLE, 16)]
    with offline(path, block_size=32, max_num_batched_tokens=48, max_num_seqs=4) as (llm, _):
        [info] = engine_infos(config.load())
        answers = run(llm, store, asks)
    assert [layer.sliding_window for layer in info.layers] == [24, None, 24, None]
    for ask, answer in zip(asks, answers, strict=True):
        check(answer.capture, len(ask.prompt), oracle(path, ask.prompt + answer.tokens))


def test_rows_over_an_image(models: Path, store: Path, offline: Callable[..., Any]) -> None:
    from vllm import SamplingParams

    path = make_blip2(make_tokenized("llama", models), models)
    image = Image.fromarray(np.random.default_rng(7).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    seen, unseen = prompt(30, 1), prompt(41, 2)
    inputs = [{"prompt_token_ids": seen, "multi_modal_data": {"image": image}}, {"prompt_token_ids": unseen}]
    extra = {"trace_capture": WHOLE}
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=8, extra_args=extra)
    with offline(path, skip_tokenizer_init=False, max_num_batched_tokens=64) as (llm, _), watched() as sent:
        outputs = llm.generate(inputs, params, use_tqdm=False)
        flush(sent)
    starts = [record for record in sent if isinstance(record, GenerationStart)]
    pixels = transformers.AutoImageProcessor.from_pretrained(path)(images=image, return_tensors="pt")["pixel_values"]
    prompts = [IMAGE] * IMAGE_TOKENS + seen, unseen
    for tokens, start, output, values in zip(prompts, starts, outputs, (pixels, None), strict=True):
        capture, answer = opened(store, start), list(output.outputs[0].token_ids)
        assert capture is not None
        assert [token.id for token in capture.tokens] == tokens + answer
        check(capture, len(tokens), blip2(path, tokens + answer, values))
        if values is not None:
            assert [token.text for token in capture.tokens[:IMAGE_TOKENS]] == ["<image>"] * IMAGE_TOKENS


def blip2(path: Path, tokens: list[int], pixels: torch.Tensor | None) -> Oracle:
    """Eager attention and logits of the language model, over the image's embeddings if there is one."""
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.tensor([tokens])
    with torch.no_grad():
        if pixels is None:
            out = model.language_model(ids, output_attentions=True, use_cache=False)
        else:
            out = model(pixels, ids, output_attentions=True, use_cache=False).language_model_outputs
    return Oracle(np.stack([layer[0].numpy() for layer in out.attentions]), out.logits[0].numpy())


def test_an_encoder_decoder_serves_and_says_that_it_cannot(
    models: Path, store: Path, offline: Callable[..., Any]
) -> None:
    from vllm import SamplingParams

    path = make_whisper(make_tokenized("llama", models), models)
    sound = np.sin(np.arange(16000) / 20).astype(np.float32)
    inputs = {
        "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": (sound, 16000)}},
        "decoder_prompt": {"prompt_token_ids": [1, 5, 6]},
    }
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=5)
    with offline(path, skip_tokenizer_init=False, max_model_len=64) as (llm, record):
        [info] = engine_infos(config.load())
        with pytest.raises(CaptureUnavailableError, match="encoder-decoder models are not supported"), record("logits"):
            llm.generate([inputs], params, use_tqdm=False)
        [output] = llm.generate([inputs], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5
    assert info.logits_unsupported == "unavailable: encoder-decoder models are not supported by this release"
