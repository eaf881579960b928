"""One capture, opened: tokens, and lazy arrays with named dimensions.

Nothing big is read before it is asked for. A `Capture` shows the store as it was when it was opened: open a capture
that is still being written again to see more of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Final

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from tracer import config, remote, schema
from tracer.capture_members import CaptureMembers
from tracer.capture_parts import Alternative, AttentionLayers, Step, Token, join_text
from tracer.checked_arrays import CheckedArray, open_arrays
from tracer.damage import check_attributes, damaged
from tracer.errors import CaptureNotFoundError, FormatError
from tracer.rebuilt import RebuiltLayers
from tracer.records import Region

__all__ = ["Capture"]

Array = NDArray[Any]
NAN: Final = float("nan")
STEPWISE: Final = "step"


class Capture(CaptureMembers):
    """The stored tensors of one generation. `open_capture` makes these."""

    def __init__(self, location: str, group: zarr.Group, step_index: int | None = None) -> None:
        self.location = location
        """Path or URL of the group."""
        self.step_index = step_index
        """Row of the step whose span ID opened the capture; None otherwise."""
        self.attrs: dict[str, Any] = dict(group.attrs)
        _check_format(location, self.attrs)
        check_attributes(location, self.attrs)
        self._group = group
        self._opened: dict[str, CheckedArray] = {}

    # -- what it is --------------------------------------------------------------------------------------------

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return str(self.attrs["trace_id"])

    @property
    def span_id(self) -> str:
        """The generation span: 16 hexadecimal digits."""
        return str(self.attrs["span_id"])

    @property
    def complete(self) -> bool:
        """True if everything that was asked for is there."""
        return bool(self.attrs["complete"])

    @property
    def closed(self) -> bool:
        """True if the writer has finished; a capture that is not closed is being written, or its writer died."""
        return bool(self.attrs["closed"])

    @property
    def missing(self) -> list[dict[str, str]]:
        """What is not there and why: `array`, `what`, `reason`."""
        if self.closed:
            return list(self.attrs["missing"])
        return [{"array": "*", "what": f"all from step {self.num_steps} on", "reason": "the capture is not closed"}]

    @property
    def regions(self) -> tuple[Region, ...]:
        """Runs of prompt tokens by message role."""
        return tuple(Region(**region) for region in self.attrs["regions"])

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens, which is the position of the first output token."""
        return int(self.attrs["prompt_tokens"])

    @property
    def num_steps(self) -> int:
        """Rows along `step` that can be read; output tokens, once the capture is closed."""
        return int(self._data.sizes.get(STEPWISE, 0))

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of everything stored, coordinates included."""
        return tuple(sorted(map(str, self._data.variables)))

    # -- tokens ------------------------------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> list[Token]:
        """Prompt and output tokens in order; of a capture that is not closed, only what is known of the prompt."""
        prompt, output = self._column("prompt_token_id"), self._column("token_id")
        raw = self._token_bytes(len(prompt) + len(output))
        roles = {at: region.role for region in self.regions for at in range(region.start, region.end)}
        tokens = [_token(at, token, raw[at], roles.get(at), None) for at, token in enumerate(prompt)]
        for step, (token, entry) in enumerate(zip(output, self.steps, strict=False)):
            at = self.prompt_tokens + step
            tokens.append(_token(at, token, raw[len(prompt) + step], None, entry))
        return tokens

    @property
    def text(self) -> str | None:
        """The output as text; None if the capture holds no token bytes."""
        return join_text(token for token in self.tokens if token.generated)

    @property
    def prompt_text(self) -> str | None:
        """The prompt as text, chat template included; None if the capture holds no token bytes."""
        return join_text(token for token in self.tokens if not token.generated)

    @cached_property
    def steps(self) -> list[Step]:
        """The numbers of every step that can be read."""
        columns = {name: self._column(name) for name in schema.STEP_NUMBERS}
        if not len(columns["span_id"]):
            return [self._bare_step(index) for index in range(self.num_steps)]
        values = {name: column.tolist() for name, column in columns.items()}
        values["span_id"] = [f"{number:016x}" if number else None for number in values["span_id"]]
        values["time"] = list(columns["time"].astype("datetime64[ns]"))
        return [
            Step(index, *row) for index, row in enumerate(zip(*(values[n] for n in schema.STEP_NUMBERS), strict=True))
        ]

    def _bare_step(self, index: int) -> Step:
        """A step before the numbers are written: positions follow from the format."""
        position = self.prompt_tokens + index - 1
        never = np.datetime64("NaT")
        return Step(index, None, -1, position, 0, position + 1, never, NAN, NAN, NAN, NAN, -1)

    def _column(self, name: str) -> Array:
        """A one-dimensional array, read whole; empty if the capture has none."""
        if name in self._fetched:
            return self._fetched[name]
        return self._array(name)[:] if name in self._group else np.empty(0, np.int64)

    @cached_property
    def _fetched(self) -> dict[str, Array]:
        """All one-dimensional arrays of a closed capture in a bucket, by one round of requests; else none.

        Each is one raw chunk (docs/store-format.md); through Zarr they would come one after the other.
        """
        if not (self.closed and config.is_remote(self.location)):
            return {}
        flat = {name: array for name, array in self._group.arrays() if array.ndim == 1}
        chunks = remote.read([f"{self.location}/{name}/c.0" for name in flat])
        return {
            name: np.frombuffer(data or b"", array.metadata.dtype.to_native_dtype())
            for (name, array), data in zip(flat.items(), chunks, strict=True)
        }

    def _token_bytes(self, count: int) -> list[bytes | None]:
        edges = self._column("token_offset")
        if len(edges) != count + 1:
            return [None] * count
        data = self._column("token_bytes").astype(np.uint8).tobytes()
        if edges[0] != 0 or edges[-1] != len(data) or (np.diff(edges) < 0).any():
            raise damaged(f"{self.location}/token_offset", "its numbers are not those of tokens in a row")
        return [data[low:high] for low, high in pairwise(edges)]

    # -- arrays ------------------------------------------------------------------------------------------------

    @property
    def logits(self) -> xr.DataArray:
        """Raw logits `[step, vocab]`, lazy; KeyError says what exists instead."""
        return self._variable(schema.LOGITS)

    @property
    def attention(self) -> AttentionLayers | RebuiltLayers:
        """`attention[layer]` → `[step, head, key_pos]`, zeros after each row's `kv_len` keys.

        Lazy where rows were stored; rebuilt in float32, a layer at a time, where only queries and keys were.
        """
        if schema.ATTENTION not in self._data and self._has_qk(schema.QUERY):
            return self.qk
        return self._layers(schema.ATTENTION)

    @property
    def attention_prefill(self) -> AttentionLayers | RebuiltLayers:
        """`attention_prefill[layer]` → `[head, query_pos, key_pos]` of the prompt, zeros above the diagonal.

        Lazy or rebuilt, as `attention` is.
        """
        if schema.ATTENTION_PREFILL not in self._data and self._has_qk(schema.QUERY_PROMPT):
            return self.qk_prefill
        return self._layers(schema.ATTENTION_PREFILL)

    @property
    def qk(self) -> RebuiltLayers:
        """Like `attention`, always rebuilt from queries and keys; KeyError says what exists instead."""
        self._variable(schema.QUERY)
        return RebuiltLayers.decode(self._data, self._engine_layers, self.prompt_tokens, self.num_steps)

    @property
    def qk_prefill(self) -> RebuiltLayers:
        """Like `attention_prefill`, always rebuilt; KeyError says what exists instead."""
        self._variable(schema.QUERY_PROMPT)
        return RebuiltLayers.prefill(self._data, self._engine_layers, self.prompt_tokens)

    def _has_qk(self, query: str) -> bool:
        return query in self._data and schema.KEY in self._data and "qk_layer" in self._data

    @property
    def _engine_layers(self) -> list[dict[str, Any]]:
        return list((self.attrs["engine"] or {}).get("layers", []))

    def row(self, *, step: int, layer: int, head: int) -> Array:
        """One attention row with exactly `kv_len` keys, the one that predicts output token `step`.

        layer, head: the model's indices. Raises KeyError naming what exists, or saying why the row is missing.
        """
        if schema.ATTENTION not in self._group:
            self._check_step(step)
            layers = self.attention
            row = layers.row(layer, head, step) if isinstance(layers, RebuiltLayers) else layers[layer].to_numpy()
            return self._known_row(row, step)
        # Not through xarray: opening a Dataset takes longer than reading the row.
        array, indices, heads = self._array(schema.ATTENTION), self._column("layer"), self._column("head")
        if not 0 <= step < array.shape[0]:
            self._check_step(step)
        for what, index, known in (("layer", layer, indices), ("head", head, heads)):
            if index not in known:
                raise KeyError(f"{what} {index} is not in this capture's attention; it has {known.tolist()}")
        self._check_head(layer, head)
        at = (step, int(np.flatnonzero(indices == layer)[0]), int(np.flatnonzero(heads == head)[0]))
        return self._known_row(array[(*at, slice(self.prompt_tokens + step))], step)

    def _known_row(self, row: Array, step: int) -> Array:
        if not row.any():
            raise KeyError(f"attention of step {step} was not stored; capture.missing: {self.missing}")
        return np.asarray(row)

    def topk(self, step: int, k: int = 10) -> list[Alternative]:
        """The `k` best tokens of a step by raw logit, descending; KeyError if so many were not stored."""
        self._check_step(step)
        if schema.LOGITS in self._group:
            logits = self._read_row(schema.LOGITS, step)
            top = min(k, len(logits))
            best = np.argpartition(-logits, top - 1)[:top]
            ids = best[np.argsort(-logits[best], kind="stable")]
            chosen, normaliser = logits[ids], _logsumexp(logits)
        else:
            chosen, ids = self._stored_topk(step, k)
            normaliser = self._normaliser(step, chosen, ids)
        return [
            Alternative(token, self._texts.get(token), logit, logit - normaliser)
            for token, logit in zip(ids.tolist(), chosen.tolist(), strict=True)
        ]

    def to_xarray(self) -> xr.Dataset:
        """Everything as one Dataset: dask-chunked along the shards if dask is installed, else lazy NumPy."""
        if find_spec("dask") is None:
            return self._data.copy()
        sizes: dict[str, int] = {}
        for name, variable in self._data.data_vars.items():
            if variable.ndim > 1:
                array = self._array(str(name))
                lengths = zip(variable.dims, array.shards, strict=True)
                # Shards along `step` are powers of two: the longest is a multiple of all others.
                sizes |= {str(dim): max(length, sizes.get(str(dim), 1)) for dim, length in lengths}
        # With a token of ours, for else dask would pickle the store to make one, which takes long for a bucket's.
        token = f"{self.location} {self.attrs.get('end_ns')} {self.num_steps}"
        big = {
            name: v.chunk({d: sizes[str(d)] for d in v.dims}, token=f"{token} {name}")
            for name, v in self._data.items()
            if v.ndim > 1
        }
        return self._data.assign(big)

    @cached_property
    def _data(self) -> xr.Dataset:
        """Lazy, without dask."""
        return open_arrays(self.location, self._group)

    def _variable(self, name: str) -> xr.DataArray:
        if name not in self._data:
            raise KeyError(f"this capture holds no {name}: {self._why_absent(name)}")
        return self._data[name]

    def _layers(self, name: str, axis: str = "layer") -> AttentionLayers:
        array = self._data.get(name)
        return AttentionLayers(name, array, self._why_absent(name) if array is None else "", axis)

    def _why_absent(self, name: str) -> str:
        reasons = [entry["reason"] for entry in self.missing if entry["array"] in (name, "*")]
        asked = self.attrs["capture"]
        return f"{'; '.join(reasons) or 'it was not asked for'} (asked: {asked}; stored: {', '.join(self.arrays)})"

    def _array(self, name: str) -> CheckedArray:
        if name not in self._opened:
            self._opened[name] = CheckedArray(self.location, self._group, name)
        return self._opened[name]

    def _read_row(self, name: str, step: int) -> Array:
        row = self._array(name)[step].astype(np.float64)
        if np.isnan(row).all():
            raise KeyError(f"{name} of step {step} was not stored; capture.missing: {self.missing}")
        return row

    def _stored_topk(self, step: int, k: int) -> tuple[Array, Array]:
        stored = self._variable(schema.LOGITS_TOPK).sizes["k"]
        if k > stored:
            raise KeyError(f"this capture holds the {stored} best logits of a step, not {k}")
        logits = self._read_row(schema.LOGITS_TOPK, step)[:k]
        return logits, self._array(schema.LOGITS_TOPK_ID)[step][:k]

    def _normaliser(self, step: int, logits: Array, ids: Array) -> float:
        """logsumexp of the whole row, from the sampled token's logit and logprob if it is among the best."""
        sampled = self.steps[step]
        where = np.flatnonzero(ids == sampled.token_id)
        return float(logits[where[0]]) - sampled.logprob if len(where) else NAN

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {token.id: token.text for token in self.tokens if token.text is not None}

    def _check_step(self, step: int) -> None:
        if not 0 <= step < self.num_steps:
            raise KeyError(f"step {step} is not in this capture; it has {self.num_steps} steps, from 0")

    def _check_head(self, layer: int, head: int) -> None:
        heads = next((e.get("num_heads", 0) for e in self._engine_layers if e.get("index") == layer), head + 1)
        if head >= heads:
            raise KeyError(f"layer {layer} has {heads} heads; head {head} exists in other layers only")

    def __repr__(self) -> str:
        """A few lines: identity, state, sizes, and what is missing."""
        state = "complete" if self.complete else "closed, incomplete" if self.closed else "not closed"
        big = [name for name in self.arrays if self._data[name].ndim > 1]
        lines = [f"<tensorspan.Capture {self.trace_id}/{self.span_id}: {state}>", f"  model   {self.attrs['model']}"]
        lines += [f"  tokens  {self.prompt_tokens} prompt, {self.num_steps} steps"]
        lines += [f"  {name}  {dict(self._data[name].sizes)} {self._data[name].dtype}" for name in big]
        lines += [f"  missing {entry['array']}: {entry['what']}: {entry['reason']}" for entry in self.missing[:5]]
        return "\n".join(lines)


def _check_format(location: str, attrs: Mapping[str, Any]) -> None:
    """Raise FormatError unless those are the attributes of a capture that this release reads."""
    if attrs.get("format") != schema.FORMAT:
        raise FormatError(
            f"{location} is a Zarr group but not a tensorspan capture (no attribute format={schema.FORMAT!r})"
        )
    if attrs.get("version") != schema.VERSION:
        raise FormatError(
            f"{location} has capture format version {attrs.get('version')}; this release reads version "
            f"{schema.VERSION}: upgrade tensorspan to read it"
        )
    if attrs.get("kind") != "capture":
        raise CaptureNotFoundError(f"{location} is a {attrs.get('kind')}, not a capture; give a span ID as well")


def _token(position: int, token: int, raw: bytes | None, region: str | None, step: Step | None) -> Token:
    text = None if raw is None else raw.decode(errors="replace")
    if step is None:
        return Token(position, int(token), text, raw, region, False, None, NAN, NAN)
    return Token(position, int(token), text, raw, region, True, step.index, step.logprob, step.entropy)


def _logsumexp(row: Array) -> float:
    top = row.max()
    return float(top + np.log(np.exp(row - top).sum()))
