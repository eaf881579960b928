"""Attention rows on GPUs: what `tracer.worker.attention` says in torch, for all rows of a layer in two launches.

`score_rows` reads the paged cache in place, through the block table, and writes float32 scores to scratch;
`weigh_rows` turns each of them into weights in the precision they are stored in, features and the largest weight.
`collect_queries` and `collect_keys` copy what attention is rebuilt from. Float32 arithmetic throughout.

Nothing that changes from step to step is specialised on: each kernel is compiled once per kind of layer, at the
worker's start, where it is checked against torch too. Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
Tables are int64; `*_at` are places in them or in a result buffer, in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["collect_keys", "collect_queries", "score_rows", "weigh_rows"]

FACTS = tl.constexpr(9)
"""Numbers per row in the tables of `gpu_plan`."""
F32 = tl.constexpr(0)
F16 = tl.constexpr(2)
E4M3 = tl.constexpr(3)
E5M2 = tl.constexpr(4)
"""Types by number, as kernels.c has them; fp8 comes as bytes and is taken apart here, on any GPU and interpreter."""
LOWEST = tl.constexpr(-1e4)
"""Stands for minus infinity: `exp` of it is 0, and 0 times it is 0."""
NOWHERE = tl.constexpr(1 << 40)


@triton.jit
def _plain(raw, code: tl.constexpr):
    """float32 of what lies in memory; code: 0 for a type that Triton knows."""
    if code == E4M3:
        bits = raw.to(tl.int32)
        # The leading bits of a half whose exponent counts from 8 less.
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        value = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    elif code == E5M2:
        value = (raw.to(tl.int32) << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = raw.to(tl.float32)
    return value


@triton.jit
def _tanh(x):
    square = x * x
    # 1 - e^-2x would lose digits near 0: there its series.
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    whole = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -whole, whole))


@triton.jit(do_not_specialize=[
    "tables", "slots_at", "places_at", "width", "query", "query_row", "query_head", "table", "table_row", "most",
    "stride",
])  # fmt: skip
def score_rows(
    tables, slots_at, places_at, width, query, query_row, query_head, cache, block_stride, head_stride, first,
    per_token, per_dim, table, table_row, scores, most, stride, slopes, window, scale, soft_cap,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ALIBI: tl.constexpr, SOFT_CAP: tl.constexpr,
    KEYS: tl.constexpr, DIMS: tl.constexpr, KEY_CODE: tl.constexpr, QUERY_CODE: tl.constexpr,
):  # fmt: skip
    """Scores [rows, most, stride] of every row's chosen heads; grid: (tiles of KEYS keys, KV heads, rows).

    places: [rows, width], where in its row's list a head is, or -1; most: heads of the longest list; scale: of a
    product of elements; KEY_CODE, QUERY_CODE: see `_plain`.
    """
    row = tl.program_id(2)
    group = tl.program_id(1)
    fact = tables + row * FACTS
    slot = tl.load(tables + slots_at + row)
    position = tl.load(fact + 2)
    low = tl.maximum(position + 1 - window, 0)
    start = tl.program_id(0).to(tl.int64) * KEYS
    if (slot >= 0) & (start <= position) & (start + KEYS > low):
        j = start + tl.arange(0, KEYS)
        seen = (j >= low) & (j <= position)
        dim = tl.arange(0, DIMS)
        # Blocks that a window gave back are never looked up: they may be anybody's.
        block = tl.load(table + tl.load(fact + 1) * table_row + j // BLOCK, mask=seen, other=0).to(tl.int64)
        at = block * block_stride + group.to(tl.int64) * head_stride + first + j % BLOCK * per_token
        inside = seen[:, None] & (dim < SIZE)[None, :]
        keys = _plain(tl.load(cache + at[:, None] + (dim * per_dim)[None, :], mask=inside, other=0), KEY_CODE)
        queries = query + tl.load(fact) * query_row
        for member in range(GROUP):
            head = group * GROUP + member
            place = tl.load(tables + places_at + row * width + head)
            if place >= 0:
                q = _plain(tl.load(queries + head * query_head + dim, mask=dim < SIZE, other=0), QUERY_CODE)
                score = tl.sum(keys * q[None, :], axis=1) * scale
                if SOFT_CAP:
                    score = soft_cap * _tanh(score / soft_cap)
                if ALIBI:
                    score += tl.load(slopes + head) * (j - position).to(tl.float32)
                tl.store(scores + (row.to(tl.int64) * most + place) * stride + j, score, mask=seen)


@triton.jit
def _store(out16, out32, at, values, mask, code):
    if code == F16:
        tl.store(out16 + at, values.to(tl.float16), mask=mask)
    if code == F32:
        tl.store(out32 + at, values, mask=mask)


@triton.jit
def _weigh(source, low, high, prompt, sink, out16, out32, weights, code, features, tops, TILE: tl.constexpr):
    """Softmax of source[low ... high): weights, features (entropy, sink mass, prompt mass, self weight) and top.

    Scores that are no numbers make no row: all of it is NaN, as in torch.
    """
    lane = tl.arange(0, TILE)
    begin = low // TILE * TILE
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    lost = tl.zeros([TILE], tl.int32)
    for start in range(begin, high, TILE):
        j = start + lane
        s = tl.load(source + j, mask=(j >= low) & (j < high), other=float("-inf"))
        lost |= (s != s).to(tl.int32)  # noqa: PLR0124 - NaN
        peaks = tl.maximum(peaks, s)
    peak = tl.maximum(tl.max(peaks, axis=0), sink)
    broken = (tl.max(lost, axis=0) > 0) | (tl.abs(peak) == float("inf"))
    totals = tl.zeros([TILE], tl.float32)
    moments = tl.zeros([TILE], tl.float32)
    masses = tl.zeros([TILE], tl.float32)
    best = tl.zeros([TILE], tl.float32)
    best_at = tl.full([TILE], NOWHERE, tl.int64)
    for start in range(begin, high, TILE):
        j = start + lane
        y = tl.load(source + j, mask=(j >= low) & (j < high), other=float("-inf")) - peak
        y = tl.maximum(y, LOWEST)
        e = tl.exp(y)
        totals += e
        moments += e * y
        masses += tl.where(j < prompt, e, 0.0)
        better = (j > 0) & (e > best)
        best_at = tl.where(better, j.to(tl.int64), best_at)
        best = tl.where(better, e, best)
    total = tl.sum(totals, axis=0)
    z = total + tl.exp(tl.maximum(sink - peak, LOWEST))
    norm = tl.where(broken, float("nan"), 1.0 / z)
    share = total * norm
    first = tl.exp(tl.load(source, mask=low == 0, other=float("-inf")) - peak) * norm
    own = tl.exp(tl.load(source + high - 1) - peak) * norm
    top = tl.max(best, axis=0)
    at = tl.min(tl.where(best == top, best_at, NOWHERE), axis=0)
    tl.store(features, tl.log(z) * share - tl.sum(moments, axis=0) * norm)
    tl.store(features + 1, first + tl.where(share < 1.0, 1.0 - share, 0.0 * share))
    tl.store(features + 2, tl.sum(masses, axis=0) * norm)
    tl.store(features + 3, own)
    tl.store(tops, tl.where(broken, 0.0, top * norm))
    tl.store(tops + 1, tl.where((top > 0.0) & (broken == 0), at, -1).to(tl.float32))
    if code >= 0:
        for start in range(0, high, TILE):
            j = start + lane
            y = tl.load(source + j, mask=(j >= low) & (j < high), other=float("-inf")) - peak
            _store(out16, out32, weights + j, tl.exp(tl.maximum(y, LOWEST)) * norm, j < high, code)


@triton.jit
def _blank(high, out16, out32, weights, code, features, tops, TILE: tl.constexpr):
    """A head that this layer does not have: no row, so zeros and NaN."""
    lane = tl.arange(0, TILE)
    for feature in range(4):
        tl.store(features + feature, float("nan"))
    tl.store(tops, 0.0)
    tl.store(tops + 1, -1.0)
    if code >= 0:
        for start in range(0, high, TILE):
            j = start + lane
            _store(out16, out32, weights + j, tl.zeros([TILE], tl.float32), j < high, code)


@triton.jit(do_not_specialize=["tables", "slots_at", "heads_at", "most", "stride"])
def weigh_rows(
    tables, slots_at, heads_at, most, scores, stride, out16, out32, sinks, window,
    HEADS: tl.constexpr, SINKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each row of `score_rows` to its place in the result buffer; grid: (most, rows).

    heads: [rows, most], each row's list of heads; out16, out32: the one buffer, as either type.
    """
    place = tl.program_id(0)
    row = tl.program_id(1)
    fact = tables + row * FACTS
    slot = tl.load(tables + slots_at + row)
    count = tl.load(fact + 4)
    if (slot >= 0) & (place < count):
        high = tl.load(fact + 2) + 1
        code = tl.load(fact + 5)
        index = slot * count + place
        weights = tl.load(fact + 6) + index * high
        features = out32 + tl.load(fact + 7) + index * 4
        tops = out32 + tl.load(fact + 8) + index * 2
        head = tl.load(tables + heads_at + row * most + place)
        if head < HEADS:
            sink = float("-inf")
            if SINKS:
                sink = tl.load(sinks + head)
            source = scores + (row.to(tl.int64) * most + place) * stride
            low = tl.maximum(high - window, 0)
            _weigh(source, low, high, tl.load(fact + 3), sink, out16, out32, weights, code, features, tops, TILE)
        else:
            _blank(high, out16, out32, weights, code, features, tops, TILE)


@triton.jit
def _copy(
    source, at, per_dim, known, scale, out16, out32, to, code, live,
    SIZE: tl.constexpr, DIMS: tl.constexpr, SOURCE_CODE: tl.constexpr,
):  # fmt: skip
    """Vectors of SIZE elements, times `scale`, to `to`; NaN where not `known`."""
    dim = tl.arange(0, DIMS)
    inside = live[:, None] & (dim < SIZE)[None, :]
    raw = tl.load(source + at[:, None] + (dim * per_dim)[None, :], mask=inside & known[:, None], other=0)
    values = tl.where(known[:, None], _plain(raw, SOURCE_CODE) * scale, float("nan"))
    place = to[:, None] + dim[None, :]
    tl.store(out16 + place, values.to(tl.float16), mask=inside & (code == F16)[:, None])
    tl.store(out32 + place, values, mask=inside & (code == F32)[:, None])


@triton.jit(do_not_specialize=["tables", "slots_at", "entries_at", "count", "query", "query_row", "query_head"])
def collect_queries(
    tables, slots_at, entries_at, count, query, query_row, query_head, scale, out16, out32,
    HEADS: tl.constexpr, SIZE: tl.constexpr, DIMS: tl.constexpr, ENTRIES: tl.constexpr, QUERY_CODE: tl.constexpr,
):  # fmt: skip
    """Query vectors; entries: [count, 2], row of the tables and row of the query tensor; grid: (tiles, heads)."""
    head = tl.program_id(1)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    live = entry < count
    row = tl.load(tables + entries_at + entry * 2, mask=live, other=0)
    source = tl.load(tables + entries_at + entry * 2 + 1, mask=live, other=0)
    fact = tables + row * FACTS
    slot = tl.load(tables + slots_at + row)
    live = live & (slot >= 0)
    to = tl.load(fact) + (source - tl.load(fact + 1)) * tl.load(fact + 2) + (slot * HEADS + head) * SIZE
    known = entry >= 0
    _copy(
        query, source * query_row + head * query_head, 1, known, scale, out16, out32, to, tl.load(fact + 8), live,
        SIZE, DIMS, QUERY_CODE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tables", "slots_at", "entries_at", "count", "table", "table_row"])
def collect_keys(
    tables, slots_at, entries_at, count, cache, block_stride, head_stride, first, per_token, per_dim, table, table_row,
    window, scale, out16, out32,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, DIMS: tl.constexpr, ENTRIES: tl.constexpr,
    KEY_CODE: tl.constexpr,
):  # fmt: skip
    """Key vectors; entries: [count, 2], row of the tables and absolute position; grid: (tiles, KV heads)."""
    head = tl.program_id(1)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    live = entry < count
    row = tl.load(tables + entries_at + entry * 2, mask=live, other=0)
    position = tl.load(tables + entries_at + entry * 2 + 1, mask=live, other=0)
    fact = tables + row * FACTS
    slot = tl.load(tables + slots_at + row)
    live = live & (slot >= 0)
    to = tl.load(fact + 3) + (position - tl.load(fact + 4)) * tl.load(fact + 5) + (slot * HEADS + head) * SIZE
    # A block that the window gave back may hold another request's keys.
    known = position > tl.load(fact + 7) - window
    block = tl.load(table + tl.load(fact + 6) * table_row + position // BLOCK, mask=live & known, other=0)
    at = block.to(tl.int64) * block_stride + head.to(tl.int64) * head_stride + first + position % BLOCK * per_token
    _copy(cache, at, per_dim, known, scale, out16, out32, to, tl.load(fact + 8), live, SIZE, DIMS, KEY_CODE)
