"""Attention layers, caches and requests of any kind, for whoever computes rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from tracer import records
from tracer.worker.attention import LayerMath
from tracer.worker.batch import Row
from tracer.worker.fp8 import Quantised
from tracer.worker.keys import KeyLayout, _affine
from tracer.worker.layers import Layer
from tracer.worker.work import Step, Traced, Work

TYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS: Final = ("transposed", "rows", "second half", "tiled")


def offsets_of(layout: str, block: int, size: int) -> torch.Tensor:
    """int64 [block, size]: where element (token, dim) lies in a block of one head."""
    token, dim = torch.arange(block)[:, None], torch.arange(size)[None, :]
    if layout == "transposed":
        return dim * block + token
    if layout == "tiled":  # pairs of dims side by side, as the AMX kernel wants them
        return dim // 2 * (2 * block) + token * 2 + dim % 2
    return token * (2 * size) + dim + (size if layout == "second half" else 0)


def make_layer(index: int, layout: str, block: int, size: int, groups: int, maths: LayerMath, cache: Any) -> Layer:
    slopes, heads = maths.alibi_slopes, groups * 2
    if slopes is not None:
        heads = len(slopes)
    elif maths.sinks is not None:
        heads = len(maths.sinks)
    offsets = offsets_of(layout, block, size)
    info = records.LayerInfo(index, f"layer {index}", heads, groups, size, maths.scale)
    return Layer(info, SimpleNamespace(kv_cache=cache), maths, KeyLayout(block, size, offsets, _affine(offsets)))


@dataclass
class Case:
    layer: Layer
    cache: torch.Tensor
    table: torch.Tensor
    works: list[Work]
    query: torch.Tensor


def traced(spec: records.CaptureSpec, heads: list[int], layers: tuple[int, ...] = (0,)) -> Traced:
    request = records.TraceRequest("a" * 32, "b" * 16, True, spec)
    return Traced(request, {layer: slot for slot, layer in enumerate(layers)}, heads)


def storages(draw: Any) -> tuple[Quantised | None, Quantised | None]:
    """How the cache keeps its keys and the kernel gets its queries."""
    fp8 = draw(st.sampled_from([None, None, torch.float8_e4m3fn, torch.float8_e5m2]))
    scales = st.sampled_from([1.0, 0.037, 3.0])
    keys = None if fp8 is None else Quantised(fp8, draw(scales))
    return keys, Quantised(torch.float8_e4m3fn, draw(scales)) if keys is not None and draw(st.booleans()) else None


def in_memory(draw: Any, values: torch.Tensor, orders: Sequence[str]) -> torch.Tensor:
    """`values` [blocks, kv_heads, block, 2 * head_size] with strides that engines choose."""
    order = draw(st.sampled_from(orders))
    if order == "blocks apart":  # as where the layers of one block lie together
        apart = torch.stack([torch.zeros_like(values), values], dim=1)
        return apart[:, 1]
    if order == "heads first":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if order == "tokens before heads":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    return values


def poisoned(values: torch.Tensor, layout: KeyLayout, table: torch.Tensor, seen: list[tuple[int, int]]) -> torch.Tensor:
    """NaN for every key that no row may look at; seen: first position and length of each row of the table."""
    block, size = layout.block_size, layout.head_size
    hidden = torch.ones(len(values), block, dtype=torch.bool)
    for row, (low, high) in zip(table.tolist(), seen, strict=True):
        for position in range(low, high):
            hidden[row[position // block], position % block] = False
    flat = values.flatten(2)
    mask = torch.zeros(len(values), block * 2 * size, dtype=torch.bool)
    mask[:, layout.offsets.flatten()] = hidden[:, :, None].expand(-1, -1, size).flatten(1)
    return torch.where(mask[:, None], torch.nan, flat).view(values.shape)


@st.composite
def maths_of(draw: Any, heads: int, spread: float) -> LayerMath:
    return LayerMath(
        scale=draw(st.sampled_from([0.05, 0.3])) / spread,
        sliding_window=draw(st.sampled_from([None, 1, 3, 17, 1000])),
        soft_cap=draw(st.sampled_from([None, 2.0, 50.0])),
        alibi_slopes=draw(st.sampled_from([None, torch.linspace(0.01, 0.5, heads)])),
        sinks=draw(st.sampled_from([None, torch.linspace(-1.0, 3.0, heads)])),
    )


@st.composite
def cases(
    draw: Any,
    layouts: Sequence[str] = LAYOUTS,
    blocks: Sequence[int] = (16, 32, 64, 96, 128),
    sizes: Sequence[int] = (8, 24, 32, 64, 80, 100),
    longest: int = 300,
    most: int = 5,
    orders: Sequence[str] = ("plain", "blocks apart", "heads first"),
    quantised_queries: bool = False,
) -> Case:
    """A layer of any kind and rows of any lengths; keys that nobody may see are NaN."""
    dtype = TYPES[draw(st.sampled_from(list(TYPES)))]
    block, size = draw(st.sampled_from(blocks)), draw(st.sampled_from(sizes))
    groups, per_group = draw(st.sampled_from([(1, 1), (1, 6), (2, 2), (3, 3), (2, 4)]))
    heads = groups * per_group
    stored, asked = storages(draw)
    asked = asked if quantised_queries else None
    spread = (1.0 if stored is None else stored.scale) * (1.0 if asked is None else asked.scale)
    maths = draw(maths_of(heads, spread))
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    order = draw(st.permutations(range(len(lengths))))
    works, first = [], 0
    for index, length in enumerate(lengths):
        dtype_name = draw(st.sampled_from(["f32", "f16"]))
        chosen = draw(st.sampled_from([list(range(heads)), [heads - 1], [0, heads + 1]]))
        attention = draw(st.sampled_from([records.AttentionSpec(dtype=dtype_name), None]))
        spec = records.CaptureSpec(None, attention, summary=True)
        tokens = draw(st.integers(1, min(40, length)))
        row = Row(f"r{index}", index, first, tokens, length - tokens, draw(st.integers(1, length)), samples=True)
        works.append(Work(row, traced(spec, chosen)))
        first += tokens + draw(st.integers(0, 1))  # also rows of requests that nobody traces
    per_row = -(-max(lengths) // block)
    count = per_row * len(lengths) + 1
    table = torch.randperm(count, generator=generator)[: per_row * len(lengths)].view(len(lengths), -1)
    offsets = offsets_of(draw(st.sampled_from(layouts)), block, size)
    layout = KeyLayout(block, size, offsets, _affine(offsets), stored)
    window = maths.sliding_window or longest
    seen = [(max(work.row.computed + 1 - window, 0), work.row.position + 1) for work in works]
    numbers = poisoned(torch.randn(count, groups, block, 2 * size, generator=generator), layout, table, seen)
    cache = numbers.to(dtype) if stored is None else numbers.to(stored.dtype).view(torch.uint8)
    cache = in_memory(draw, cache, orders)
    module = SimpleNamespace(kv_cache=cache, dtype=dtype, _k_scale_float=stored and stored.scale)
    module._q_scale_float = asked and asked.scale
    info = records.LayerInfo(0, "layer 0", heads, groups, size, maths.scale)
    layer = Layer(info, module, maths, layout, asked)
    query = torch.randn(first, heads + 1, size, generator=generator)
    query = query.to(dtype if asked is None else asked.dtype)[:, :heads]
    return Case(layer, cache, table.to(torch.int32), [works[place] for place in order], query)


def holding(works: list[Work]) -> Step:
    """A step with these rows."""
    step = Step(0)
    step.hold(works)
    return step


def on_host(values: Any) -> np.ndarray:
    out: np.ndarray = values.numpy() if isinstance(values, torch.Tensor) else values
    return out


def attend(maths: Any, case: Case) -> tuple[list[dict[str, np.ndarray]], list[records.AttentionSummary | None]]:
    works = [Work(work.row, work.traced) for work in case.works]
    step = holding(works)
    metadata = SimpleNamespace(block_table=case.table, causal=True)
    maths.attention(step, case.layer, works, case.query, case.cache, metadata)
    maths.copy(step)
    maths.finish(step)
    arrays = [{name: on_host(values).copy() for name, values, _ in work.arrays} for work in works]
    maths.release(step)
    return arrays, [work.attention for work in works]


def collect(maths: Any, case: Case, spec: records.QKSpec, sent: int) -> list[dict[str, tuple[np.ndarray, Any]]]:
    request = records.TraceRequest("a" * 32, "b" * 16, True, records.CaptureSpec(qk=spec))
    works = [Work(work.row, Traced(request, {}, [], {0: 0}, keys_sent=sent)) for work in case.works]
    step = holding(works)
    maths.collect(step, case.layer, works, case.query, case.cache, SimpleNamespace(block_table=case.table, causal=True))
    maths.copy(step)
    maths.finish(step)
    out = [
        {name: (on_host(values).copy(), start) for name, values, start in (*work.blocks, *work.arrays)}
        for work in works
    ]
    maths.release(step)
    return out


def check_rows(got: Any, said: Any, wanted: Any, expected: Any) -> None:
    """Arrays and summaries of one kind of maths are those of the reference."""
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            assert ours[name].dtype == values.dtype
            tolerance = {"attention": 1e-5 if values.dtype == np.float32 else 5e-4, "attention_summary": 1e-4}[name]
            np.testing.assert_allclose(ours[name], values, rtol=0, atol=tolerance, err_msg=name)
    for mine, reference in zip(said, expected, strict=True):
        assert mine is not None
        assert reference is not None
        assert mine.entropy == pytest.approx(reference.entropy, abs=1e-4)
        assert mine.sink_mass == pytest.approx(reference.sink_mass, abs=1e-4)
        assert mine.top_weight == pytest.approx(reference.top_weight, abs=1e-5)


def check_blocks(got: Any, wanted: Any) -> None:
    """Queries and keys of one kind of maths are those of the reference, bit for bit."""
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, (values, start) in theirs.items():
            np.testing.assert_array_equal(ours[name][0], values)
            assert ours[name][0].dtype == values.dtype
            assert ours[name][1] == start


LOGITS: Final = ("plain", "masked", "ties", "uniform", "extreme", "one", "nothing", "nan", "infinite")


def raw_logits(kind: str, rows: int, vocab: int, seed: int) -> torch.Tensor:
    """float32 [rows + 1, vocab]: logits as models give them, and as they should not."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows + 1, vocab, generator=generator) * 6
    if kind == "masked":
        logits[:, vocab // 2] = -torch.inf
    elif kind == "ties":
        logits = logits.round()
    elif kind == "uniform":
        logits.fill_(2.5)
    elif kind == "extreme":
        logits *= 5000.0
    elif kind == "one":
        logits[:, : vocab - 1] = -torch.inf
    elif kind == "nothing":
        logits.fill_(-torch.inf)
    elif kind in {"nan", "infinite"}:
        logits[:, [seed % vocab, 3]] = torch.nan if kind == "nan" else torch.inf
    return logits


def check_best(said: records.LogitsSummary, wanted: records.LogitsSummary, row: torch.Tensor) -> None:
    """The same best log-probabilities; tokens may differ where logits are equal, but none is named twice."""
    assert said.topk_logprobs == pytest.approx(wanted.topk_logprobs, abs=1e-5, rel=1e-6, nan_ok=True)
    ids = list(said.topk_ids)
    assert len(set(ids)) == len(ids)
    np.testing.assert_array_equal(row[ids].numpy(), row[list(wanted.topk_ids)].numpy())
