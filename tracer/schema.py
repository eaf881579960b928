"""The capture format: names, dimensions, types, chunking and the Zarr v3 metadata that says so.

`docs/store-format.md` is the specification; this module is its only implementation, shared by the writer and the
reader. It knows neither NumPy nor Zarr: metadata are plain dicts, ready for `json.dumps`.

A capture is the group `<root>/<trace_id>/<generation_span_id>`. Arrays over `step` grow in shards along that axis;
chunk keys use `.` as separator, so an array is one directory without subdirectories (a `mkdir` costs 170 µs on ext4).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan, prod
from typing import Any, Final

from tracer import member_records as members
from tracer.records import CaptureSpec

__all__ = [
    "ATTENTION",
    "ATTENTION_PREFILL",
    "ATTENTION_SUMMARY",
    "COORDINATES",
    "FEATURES",
    "FORMAT",
    "KEY",
    "KEY_BLOCK",
    "KEY_PROMPT",
    "LOGITS",
    "LOGITS_TOPK",
    "LOGITS_TOPK_ID",
    "QUERY",
    "QUERY_BLOCK",
    "QUERY_PROMPT",
    "QUERY_SHARD",
    "ROW_CONVENTION",
    "STEP_NUMBERS",
    "VERSION",
    "ArrayLayout",
    "StepNumber",
    "asked_arrays",
    "attention_layout",
    "attention_prefill_layout",
    "attention_summary_layout",
    "flat_metadata",
    "group_metadata",
    "is_span_id",
    "is_trace_id",
    "key_block",
    "logits_layout",
    "logits_topk_id_layout",
    "logits_topk_layout",
    "qk_layout",
    "round_up",
    "shard_steps",
]

FORMAT: Final = "tensorspan-capture"
VERSION: Final = 1

LOGITS: Final = "logits"
LOGITS_TOPK: Final = "logits_topk"
LOGITS_TOPK_ID: Final = "logits_topk_id"
ATTENTION: Final = "attention"
ATTENTION_PREFILL: Final = "attention_prefill"
ATTENTION_SUMMARY: Final = "attention_summary"
QUERY: Final = "query"
KEY: Final = "key"
QUERY_PROMPT: Final = "query_prompt"
KEY_PROMPT: Final = "key_prompt"

FEATURES: Final = ("entropy", "sink_mass", "prompt_mass", "self_weight")
"""Last axis of `attention_summary`, in this order."""
KEY_BLOCK: Final = 256
"""Keys per inner chunk of `attention_prefill`, and at most of `attention`; both shards are multiples of it."""
SHORT_KEY_BLOCK: Final = 128
"""The same for `attention` where rows are expected to have less than 2,048 keys, and can have at most 16,384."""
QUERY_BLOCK: Final = 64
"""Query rows per inner chunk of `attention_prefill`."""
QUERY_SHARD: Final = 256
"""Query rows per shard of `attention_prefill`."""
MAX_SHARD_STEPS: Final = 64
SHARD_BYTES: Final = 1 << 26
"""A shard of more steps than one holds at most this much, before compression."""
EXPECTED_TOKENS: Final = 256
"""Output tokens assumed when attention's steps per shard are chosen: `max_tokens` is often just the model's limit."""

ROW_CONVENTION: Final = (
    "Step i holds the row that predicts output token i: the query at absolute position prompt_tokens + i - 1, "
    "so step 0 is the last prompt row. Logits are raw: before penalties, bias, temperature and masks. Attention rows "
    "are indexed by query head, are not renormalised, and have kv_len valid keys; keys after that are padding."
)
COORDINATES: Final = "span_id token_id position attempt kv_len time"
"""Variables that xarray promotes to coordinates."""

_ZARR_TYPES: Final = {"f16": "float16", "f32": "float32"}
_ITEM_BYTES: Final = {"float16": 2, "float32": 4, "int32": 4, "int64": 8, "uint64": 8, "uint8": 1}
_HEX: Final = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class StepNumber:
    """A number per step, stored as a one-dimensional array over `step`."""

    dtype: str
    fill: int | float
    """Value of a step whose record was lost."""
    attributes: dict[str, Any] = field(default_factory=dict)


NAN: Final = float("nan")
NOT_A_TIME: Final = -(2**63)
"""What pandas and xarray read as NaT."""
STEP_NUMBERS: Final[dict[str, StepNumber]] = {
    "span_id": StepNumber("uint64", 0, {"meaning": "step span ID; 16 hexadecimal digits as one number"}),
    "token_id": StepNumber("int32", -1, {"meaning": "the output token that this row predicts"}),
    "position": StepNumber("int32", -1, {"meaning": "absolute position of the query row"}),
    "attempt": StepNumber("int32", 0, {"meaning": "1, plus one per preemption"}),
    "kv_len": StepNumber("int32", 0, {"meaning": "keys visible to the row before any window"}),
    "time": StepNumber(
        "int64",
        NOT_A_TIME,
        {"units": "nanoseconds since 1970-01-01", "calendar": "proleptic_gregorian", "meaning": "end of the step"},
    ),
    "logprob": StepNumber("float32", NAN, {"units": "nat"}),
    "entropy": StepNumber("float32", NAN, {"units": "nat"}),
    "margin": StepNumber("float32", NAN, {"units": "nat"}),
    "varentropy": StepNumber("float32", NAN, {"units": "nat^2"}),
    "rank": StepNumber("int32", -1, {"meaning": "tokens with a larger raw logit than the sampled one"}),
}


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """A sharded array of the capture: everything about it except how far it has grown."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    """`float16`, `float32` or `int32`; little-endian on disk."""
    chunk: tuple[int, ...]
    """Inner chunk: what is compressed and checked as one piece."""
    shard: tuple[int, ...]
    """Shard: what is one file."""
    fill: float
    bitshuffle: bool = True
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def item_bytes(self) -> int:
        """Bytes of one value."""
        return _ITEM_BYTES[self.dtype]

    @property
    def grid(self) -> tuple[int, ...]:
        """Inner chunks of one shard along each axis; the shard's index lists them in C order."""
        return tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))

    @property
    def chunks(self) -> int:
        """Inner chunks of one shard."""
        return prod(self.grid)

    def key(self, *shard: int) -> str:
        """File name of the shard at those grid coordinates; trailing coordinates that are left out are 0."""
        return ".".join(["c", *map(str, shard), *["0"] * (len(self.dims) - len(shard))])

    def metadata(self, shape: tuple[int, ...], codec: str) -> dict[str, Any]:
        """Content of the array's `zarr.json` at that shape; codec: `blosc`, `zstd` or `none`."""
        sharding = {
            "chunk_shape": list(self.chunk),
            "codecs": [_BYTES, *_compressor(self, codec), _CRC],
            "index_codecs": [_BYTES, _CRC],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        return _array(self.dims, self.dtype, shape, self.shard, self.fill, codecs, self.attributes)


_BYTES: Final = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC: Final = {"name": "crc32c"}


def _compressor(layout: ArrayLayout, codec: str) -> list[dict[str, Any]]:
    """f32 attention holding bf16 packs badly under bitshuffle (measured: 1.22 against 2.27 times smaller)."""
    if codec == "none":
        return []
    if codec == "zstd":
        return [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}]
    configuration = {
        "cname": "lz4",
        "clevel": 5,
        "shuffle": "bitshuffle" if layout.bitshuffle else "shuffle",
        "typesize": layout.item_bytes,
        "blocksize": 0,
    }
    return [{"name": "blosc", "configuration": configuration}]


def _array(
    dims: tuple[str, ...],
    dtype: str,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    fill: float,
    codecs: list[dict[str, Any]],
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if isnan(fill) else fill,
        "codecs": codecs,
        "attributes": dict(attributes),
        "dimension_names": list(dims),
        "storage_transformers": [],
    }


def flat_metadata(
    dim: str, dtype: str, length: int, fill: float = 0, attributes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`zarr.json` of a one-dimensional array in one uncompressed chunk, the file `c.0` (absent at length 0)."""
    codecs: list[dict[str, Any]] = [{"name": "bytes"} if _ITEM_BYTES[dtype] == 1 else _BYTES]
    return _array((dim,), dtype, (length,), (max(length, 1),), fill, codecs, attributes or {})


def group_metadata(
    kind: str, attributes: Mapping[str, Any], arrays: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """`zarr.json` of a group; kind: `store`, `trace` or `capture`. `arrays` are consolidated inline."""
    out: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"format": FORMAT, "version": VERSION, "kind": kind, **attributes},
    }
    if arrays is not None:
        out["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": dict(arrays)}
    return out


def logits_layout(vocab: int, dtype: str) -> ArrayLayout:
    """`logits [step, vocab]`, one row per chunk; dtype: `f16` or `f32`."""
    kind = _ZARR_TYPES[dtype]
    steps = shard_steps(vocab * _ITEM_BYTES[kind])
    return ArrayLayout(LOGITS, ("step", "vocab"), kind, (1, vocab), (steps, vocab), NAN, attributes={"units": "logit"})


def logits_topk_layout(k: int, dtype: str) -> ArrayLayout:
    """`logits_topk [step, k]`: the largest raw logits, descending."""
    kind = _ZARR_TYPES[dtype]
    steps = shard_steps(k * 4)
    return ArrayLayout(LOGITS_TOPK, ("step", "k"), kind, (1, k), (steps, k), NAN, attributes={"units": "logit"})


def logits_topk_id_layout(k: int) -> ArrayLayout:
    """`logits_topk_id [step, k]`: their token IDs; -1 where nothing was stored."""
    return ArrayLayout(LOGITS_TOPK_ID, ("step", "k"), "int32", (1, k), (shard_steps(k * 4), k), -1, bitshuffle=False)


def attention_layout(layers: int, heads: int, prompt: int, capacity: int, dtype: str) -> ArrayLayout:
    """`attention [step, layer, head, key_pos]`; capacity: most keys that a row can have."""
    kind = _ZARR_TYPES[dtype]
    width = round_up(max(capacity, 1), KEY_BLOCK)
    expected = min(width, round_up(prompt + EXPECTED_TOKENS, KEY_BLOCK))
    steps = shard_steps(layers * heads * expected * _ITEM_BYTES[kind])
    block = key_block(width, expected)
    return ArrayLayout(
        ATTENTION,
        ("step", "layer", "head", "key_pos"),
        kind,
        (1, layers, heads, block),
        (steps, layers, heads, width),
        0.0,
        bitshuffle=kind == "float16",
    )


def attention_prefill_layout(layers: int, heads: int, prompt: int, dtype: str) -> ArrayLayout:
    """`attention_prefill [layer, head, query_pos, key_pos]`: causal blocks of the prompt's own map."""
    kind = _ZARR_TYPES[dtype]
    return ArrayLayout(
        ATTENTION_PREFILL,
        ("layer", "head", "query_pos", "key_pos"),
        kind,
        (1, heads, QUERY_BLOCK, KEY_BLOCK),
        (layers, heads, QUERY_SHARD, round_up(max(prompt, 1), KEY_BLOCK)),
        0.0,
        bitshuffle=kind == "float16",
    )


def attention_summary_layout(layers: int, heads: int) -> ArrayLayout:
    """`attention_summary [step, layer, head, feature]`, float32; feature names are in the attributes."""
    row = (layers, heads, len(FEATURES))
    steps = shard_steps(prod(row) * 4)
    dims = ("step", "layer", "head", "feature")
    names = {"feature": list(FEATURES)}
    return ArrayLayout(ATTENTION_SUMMARY, dims, "float32", (1, *row), (steps, *row), NAN, False, names)


def qk_layout(name: str, layers: int, heads: int, dim: int, dtype: str) -> ArrayLayout:
    """`query [step, qk_layer, qk_head, dim]` and `key [step, qk_layer, kv_head, dim]`, at the step's position.

    `query_prompt` and `key_prompt` have `prompt_row` in the place of `step`: positions before the last prompt row.
    """
    kind = _ZARR_TYPES[dtype]
    row = (layers, heads, dim)
    count = shard_steps(prod(row) * _ITEM_BYTES[kind])
    first = "step" if name in (QUERY, KEY) else "prompt_row"
    dims = (first, "qk_layer", "qk_head" if name.startswith(QUERY) else "kv_head", "dim")
    return ArrayLayout(name, dims, kind, (1, *row), (count, *row), NAN, kind == "float16")


def asked_arrays(spec: CaptureSpec) -> tuple[str, ...]:
    """The arrays a capture must hold to be complete."""
    names: list[str] = []
    if spec.logits is not None:
        names += [LOGITS] if spec.logits.top is None else [LOGITS_TOPK, LOGITS_TOPK_ID]
    if spec.attention is not None:
        names += [ATTENTION] if spec.attention.rows == "decode" else [ATTENTION, ATTENTION_PREFILL]
    if spec.summary:
        names.append(ATTENTION_SUMMARY)
    if spec.qk is not None:
        names += [QUERY, KEY, KEY_PROMPT] if spec.qk.rows == "decode" else [QUERY, KEY, KEY_PROMPT, QUERY_PROMPT]
    return (*names, *_asked_members(spec))


def _asked_members(spec: CaptureSpec) -> list[str]:
    names: list[str] = []
    if (prompt := spec.prompt_logits) is not None:
        topk = [members.PROMPT_LOGITS_TOPK, members.PROMPT_LOGITS_TOPK_ID]
        names += [members.PROMPT_LOGITS] if prompt.top is None else topk
    if (hidden := spec.hidden_states) is not None:
        names += [members.HIDDEN_STATES] + ([members.HIDDEN_STATES_PROMPT] if hidden.rows == "all" else [])
    if (router := spec.router) is not None:
        names += [members.ROUTER_EXPERT, members.ROUTER_WEIGHT]
        names += [members.ROUTER_EXPERT_PROMPT, members.ROUTER_WEIGHT_PROMPT] if router.rows == "all" else []
    return names


def shard_steps(row_bytes: int) -> int:
    """Steps per shard: a power of two up to 64 that keeps a shard at 64 MiB, and at least 1."""
    steps = MAX_SHARD_STEPS
    while steps > 1 and steps * row_bytes > SHARD_BYTES:
        steps //= 2
    return steps


def key_block(width: int, expected: int) -> int:
    """Keys per inner chunk of `attention`: 128 or 256.

    A row's last block is padded, so that short rows need small blocks; a shard's index lists the blocks of all rows,
    so that long ones need large blocks.
    """
    short = expected < 8 * KEY_BLOCK and width <= 64 * KEY_BLOCK
    return SHORT_KEY_BLOCK if short else KEY_BLOCK


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def is_trace_id(text: str) -> bool:
    """True for 32 lowercase hexadecimal digits."""
    return len(text) == 32 and _HEX.fullmatch(text) is not None


def is_span_id(text: str) -> bool:
    """True for 16 lowercase hexadecimal digits."""
    return len(text) == 16 and _HEX.fullmatch(text) is not None
