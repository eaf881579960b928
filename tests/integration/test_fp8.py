"""Captured weights against what the engine's own kernel computed, and against a plain reading of an fp8 cache.

Three oracles: the softmax of the engine's queries and of the keys that the bytes of its cache stand for; the kernel's
output, which our weights and the cached values must give again; and Transformers on the keys as they were.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from tests.cpus import AVX512
from tests.integration.models import make_model
from tests.integration.oracle import oracle
from tests.integration.runs import prompt, rows_of, runner_of
from tracer import config, open_capture
from tracer.export import engine_infos

pytestmark = pytest.mark.engine

TOLERANCE: Final = 1e-5
WHOLE: Final = "attention;rows=all;dtype=f32, qk;rows=all"
PROMPT: Final = 70
BLOCK: Final = 32
"""vLLM's CPU kernels have fp8 caches on x86 with AVX-512 only."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer's kernel for the one request there is."""

    query: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    blocks: torch.Tensor
    """The request's blocks of the cache, in order."""


@contextmanager
def watched(llm: Any) -> Iterator[dict[int, list[Call]]]:
    """Every call of every attention kernel, by layer."""
    calls: dict[int, list[Call]] = defaultdict(list)

    def watch(index: int, module: Any) -> None:
        inner = module.impl.forward

        def forward(layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, **options: Any) -> Any:
            result = inner(layer, query, key, value, cache, metadata, **options)
            if metadata is not None:
                count, length = metadata.num_actual_tokens, int(metadata.seq_lens[0])
                blocks = cache[metadata.block_table[0, : -(-length // BLOCK)].long()].clone()
                tensors = [tensor[:count].float() for tensor in (query, value, options["output"])]
                calls[index].append(Call(tensors[0], tensors[1], tensors[2], blocks))
            return result

        module.impl.forward = forward

    for index, module in enumerate(layers_of(llm)):
        watch(index, module)
    yield calls


def layers_of(llm: Any) -> list[Any]:
    """The engine's attention layers; its experts are registered beside them."""
    modules = runner_of(llm).compilation_config.static_forward_context.values()
    return [module for module in modules if hasattr(module, "kv_cache")]


def plain_cache(blocks: torch.Tensor, dtype: torch.dtype, scales: tuple[float, float]) -> tuple[Any, Any]:
    """Keys and values [kv_heads, tokens, head_size] of a cache of bytes: K is [head_size, block] in it, V [block, ...].

    Written from the layout of vLLM's vector kernels, not from ours.
    """
    count, heads, block, both = blocks.shape
    numbers = blocks.view(dtype).float().reshape(count, heads, 2, block * both // 2)
    keys = numbers[:, :, 0].reshape(count, heads, both // 2, block).transpose(2, 3) * scales[0]
    values = numbers[:, :, 1].reshape(count, heads, block, both // 2) * scales[1]
    keys, values = (part.transpose(0, 1).reshape(heads, count * block, -1) for part in (keys, values))
    return keys, values


def softmax_rows(query: torch.Tensor, keys: torch.Tensor, impl: Any) -> torch.Tensor:
    """[heads, rows, keys] of causal rows from position 0, from the definitions."""
    rows, heads, _ = query.shape
    keys = keys[:, :rows].repeat_interleave(heads // len(keys), dim=0)
    scores = torch.einsum("qhd,hkd->hqk", query, keys) * impl.scale
    if impl.logits_soft_cap:
        scores = impl.logits_soft_cap * torch.tanh(scores / impl.logits_soft_cap)
    behind = torch.arange(rows)[:, None] - torch.arange(rows)[None, :]
    hidden = behind < 0 if impl.sliding_window < 0 else (behind < 0) | (behind >= impl.sliding_window)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def whole_map(capture: Any, layer: int) -> torch.Tensor:
    """Every stored row [heads, rows, keys], the prompt's and those of the steps."""
    rows = rows_of(capture, layer)
    keys = rows[-1].shape[-1]
    out = torch.zeros(rows[0].shape[0], keys, keys)
    out[:, :PROMPT, :PROMPT] = torch.from_numpy(np.asarray(capture.attention_prefill[layer])[..., :PROMPT])
    for step, row in enumerate(rows):
        out[:, PROMPT - 1 + step, : PROMPT + step] = torch.from_numpy(row)
    return out


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=0, atol=tolerance)


def output_of(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What a kernel with these weights writes, [rows, heads, head_size]; values: [kv_heads, keys, head_size]."""
    heads, rows, _ = weights.shape
    values = values[:, :rows].repeat_interleave(heads // len(values), dim=0)
    return torch.einsum("hqk,hkd->qhd", weights, values)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Give every layer these scales of keys and values, as a checkpoint with calibrated ones does."""
    from vllm.model_executor.layers.attention import attention

    original = attention.set_default_quant_scales

    def use(key: float, value: float) -> None:
        def scales(layer: Any, *args: Any, **options: Any) -> None:
            original(layer, *args, **options)
            layer._k_scale.fill_(key)
            layer._v_scale.fill_(value)
            layer._k_scale_float, layer._v_scale_float = key, value

        monkeypatch.setattr(attention, "set_default_quant_scales", scales)

    return use


@pytest.mark.parametrize(
    ("family", "kind", "scales", "kernels"),
    [
        ("llama", "fp8", (1.0, 1.0), "native"),
        ("gemma2", "fp8_e4m3", (0.043, 0.02), "native"),
        ("llama", "fp8_e5m2", (0.3, 1.7), "native"),
        ("llama", "fp8", (0.043, 1.0), "torch"),
    ],
)
def test_an_fp8_cache_gives_the_weights_that_the_kernel_used(
    family: str, kind: str, scales: tuple[float, float], kernels: str, models: Path, offline: Callable[..., Any],
    generate: Callable[..., Any], scaled: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, tokens, options = make_model(family, models), prompt(PROMPT), {"kv_cache_dtype": kind, "block_size": BLOCK}
    if not AVX512:
        with pytest.raises(NotImplementedError, match="AVX-512"), offline(path, **options):
            pytest.fail("the engine ran")
        return
    if kernels == "torch":
        monkeypatch.setattr("tracer.worker.maths.load", no_compiler)
    scaled(*scales)
    with offline(path, **options) as (llm, record):
        [info] = engine_infos(config.load())
        assert (info.kernels, info.attention_unsupported) == (kernels, None)
        impls = [module.impl for module in layers_of(llm)]
        with watched(llm) as calls, record(WHOLE) as run:
            [answer] = generate(llm, [tokens])
    capture = open_capture(run.store, run.span_ids[0])
    assert capture.complete, capture.missing
    dtype = torch.float8_e5m2 if kind == "fp8_e5m2" else torch.float8_e4m3fn
    for layer, seen in calls.items():
        keys, values = plain_cache(seen[-1].blocks, dtype, scales)
        got, query = whole_map(capture, layer), torch.cat([call.query for call in seen])
        assert len(query) == PROMPT + len(answer) - 1
        close(got, softmax_rows(query, keys, impls[layer]))
        output = torch.cat([call.output for call in seen])
        close(output_of(got, values), output, TOLERANCE * float(values.abs().max()))
        rebuilt = torch.from_numpy(np.asarray(capture.qk_prefill[layer]))[..., :PROMPT]
        close(rebuilt, got[:, :PROMPT, :PROMPT])
        np.testing.assert_allclose(capture.qk[layer], capture.attention[layer], rtol=0, atol=TOLERANCE)
    if scales == (1.0, 1.0):
        check_against_eager(path, tokens + answer, [whole_map(capture, layer) for layer in calls])


def check_against_eager(path: Path, tokens: list[int], maps: list[torch.Tensor]) -> None:
    """On keys that were never rounded the weights are others, but not far: what 3 bits of mantissa cost this model."""
    want = torch.from_numpy(oracle(path, tokens).attention)
    first = (maps[0] - want[0, :, : len(maps[0][0]), : len(maps[0][0])]).abs()
    assert TOLERANCE < float(first.max()) < 0.15
    assert float(first.sum(-1).mean()) < 0.12


def no_compiler() -> Any:
    from tracer.worker.native import NativeError

    raise NativeError("there is no C compiler")


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_weights_of_a_16_bit_engine_give_its_kernels_output(
    family: str, models: Path, offline: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    started = offline(make_model(family, models), dtype="bfloat16", block_size=BLOCK)
    with started as (llm, record), watched(llm) as calls, record(WHOLE) as run:
        generate(llm, [prompt(PROMPT)])
    capture = open_capture(run.store, run.span_ids[0])
    assert capture.complete, capture.missing
    for layer, seen in calls.items():
        values = torch.cat([call.value for call in seen]).transpose(0, 1)
        output = torch.cat([call.output for call in seen])
        expected = output_of(whole_map(capture, layer), values)
        # The kernel rounds its weights and its output to 8 bits of mantissa; without AVX-512 it cuts them off.
        bound = (2**-8 if AVX512 else 2**-7) * float(values.abs().max())
        close(expected, output, bound)
