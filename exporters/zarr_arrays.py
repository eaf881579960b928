"""Growing arrays of one capture: rows over `step`, and the prompt's own attention map in causal blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from exporters.shards import ChunkCodec, ShardFile, make_directory, write_json, write_new
from tracer.schema import KEY_BLOCK, QUERY_BLOCK, QUERY_SHARD, ArrayLayout, flat_metadata, round_up

__all__ = ["PrefillMap", "StepRows", "write_flat"]

Array = NDArray[Any]
METADATA: Final = "zarr.json"
_INFINITY: Final[dict[int, tuple[Any, Any, int, int]]] = {
    2: (np.uint16, np.int16, 0x7C00, 0xFC00),
    4: (np.uint32, np.int32, 0x7F80_0000, 0xFF80_0000),
}
"""By item size: integer views and the bits of the two infinities; as integers, larger values have larger magnitude."""


class StepRows:
    """An array whose first axis is `step`: one shard open at a time, rows in any order (in order is fast)."""

    def __init__(self, directory: Path, layout: ArrayLayout, codec: str, keys: int = 0) -> None:
        self.layout = layout
        self.overflow = 0
        """Infinite values stored; sources beyond ±65,504 become infinite as float16."""
        self.metadata: dict[str, Any] = {}
        self._directory = directory / layout.name
        self._codec_name = codec
        self._codec = ChunkCodec(layout, codec)
        self._dtype = np.dtype(layout.dtype)
        self._per_shard = layout.shard[0]
        self._blocks = layout.chunks // self._per_shard
        self._has_keys = layout.dims[-1] == "key_pos"
        self._scratch = np.zeros(layout.chunk[1:], self._dtype)
        self._number = -1
        self._shard: ShardFile | None = None
        self._numbers: set[int] = set()
        make_directory(self._directory)
        self.publish(0, keys)

    def fits(self, row: Array) -> bool:
        """True if `row` [without the step axis] has this array's shape; attention may have fewer keys."""
        full = self.layout.shard[1:]
        if self._has_keys:
            return row.shape[:-1] == full[:-1] and 0 < row.shape[-1] <= full[-1]
        return row.shape == full

    def put(self, step: int, row: Array) -> int:
        """Store one row that `fits`, replacing an earlier one; returns the bytes written."""
        if row.dtype != self._dtype:
            with np.errstate(over="ignore"):  # Counted below.
                row = row.astype(self._dtype)
        shard = self._open(step // self._per_shard)
        first = step % self._per_shard * self._blocks
        shard.clear(first, first + self._blocks)
        written = 0
        for block, values in self._split(row):
            written += shard.append(first + block, *self._codec.encode(values))
        if self.layout.dims[-1] == "vocab":
            self.overflow += _infinities(row)
        return written

    def settle(self, steps: int) -> int:
        """Finish the open shard if all its steps are below `steps`; returns how many steps can be shown."""
        if self._shard is not None and (self._number + 1) * self._per_shard <= steps:
            self._finish()
        return steps // self._per_shard * self._per_shard

    def publish(self, steps: int, keys: int = 0) -> None:
        """Tell readers that the array has `steps` rows (of `keys` keys, for attention)."""
        row = self.layout.shard[1:]
        if self._has_keys:
            row = (*row[:-1], keys or row[-1])
        self.metadata = self.layout.metadata((steps, *row), self._codec_name)
        write_json(self._directory / METADATA, self.metadata)

    def close(self, steps: int) -> None:
        """Finish everything and leave no row at or past `steps`."""
        if self._shard is not None:
            rows = max(steps - self._number * self._per_shard, 0)
            self._shard.clear(rows * self._blocks)
            self._finish()
        for number in self._numbers:
            if number * self._per_shard >= steps:
                (self._directory / self.layout.key(number)).unlink(missing_ok=True)

    def release(self) -> None:
        """Give up: close the file and leave what is there."""
        if self._shard is not None:
            self._shard.release()

    def _split(self, row: Array) -> Iterator[tuple[int, Array]]:
        """(block, values) along the last axis; a part of a block is padded with zeros."""
        width, last = self._scratch.shape[-1], row.shape[-1]
        if last == width and row.flags.c_contiguous:
            yield 0, row
            return
        for start in range(0, last, width):
            size = min(width, last - start)
            self._scratch[..., :size] = row[..., start : start + size]
            self._scratch[..., size:] = 0
            yield start // width, self._scratch

    def _open(self, number: int) -> ShardFile:
        if self._shard is None or self._number != number:
            self._finish()
            self._shard = ShardFile.open(self._directory / self.layout.key(number), self.layout.chunks)
            self._number = number
            self._numbers.add(number)
        return self._shard

    def _finish(self) -> None:
        if self._shard is not None:
            self._shard.finish()
            self._shard = None


def _infinities(row: Array) -> int:
    """How many values are infinite; two SIMD reductions (6 µs) rule it out for almost every row."""
    unsigned, signed, plus, minus = _INFINITY[row.dtype.itemsize]
    if row.view(signed).max() < plus and row.view(unsigned).max() < minus:
        return 0
    return int(np.isinf(row).sum())


@dataclass(slots=True)
class _Pending:
    """Rows of one layer's block of 64 query rows that have come so far."""

    first: int
    """Absolute position of the block's first row."""
    values: Array
    """[heads, 64, keys]."""
    seen: Array
    """bool [64]."""


class PrefillMap:
    """`attention_prefill`: blocks of one layer in any order and any division of its query rows; the last wins."""

    def __init__(self, directory: Path, layout: ArrayLayout, codec: str, prompt: int) -> None:
        self.layout = layout
        self.metadata: dict[str, Any] = {}
        self.seen = np.zeros((layout.shard[0], prompt), dtype=np.bool_)
        """bool [layer, query row]: rows received."""
        self._prompt = prompt
        self._directory = directory / layout.name
        self._codec_name = codec
        self._codec = ChunkCodec(layout, codec)
        self._dtype = np.dtype(layout.dtype)
        self._scratch = np.zeros(layout.chunk[1:], self._dtype)
        self._shards: dict[int, ShardFile] = {}
        self._pending: dict[int, _Pending] = {}
        self._ready: set[int] = set()
        make_directory(self._directory)
        self.publish(prompt)

    def fits(self, slot: int, first: int, block: Array) -> bool:
        """True if `block` [heads, rows, keys] of layer `slot`, its rows from position `first`, lies in the map."""
        if block.ndim != 3:
            return False
        heads, rows, keys = block.shape
        stop = first + rows
        inside = 0 <= slot < self.layout.shard[0] and 0 <= first < stop <= self._prompt
        return inside and 0 < heads <= self.layout.shard[1] and keys >= stop

    def put(self, slot: int, first: int, block: Array) -> int:
        """Store rows `first` … of layer `slot`; returns the bytes written, which may come later for a part block."""
        stop, written = first + block.shape[1], 0
        for start in range(first // QUERY_BLOCK * QUERY_BLOCK, stop, QUERY_BLOCK):
            low, high = max(start, first), min(start + QUERY_BLOCK, stop)
            rows = block[:, low - first : high - first, :high]
            if low == start and high == min(start + QUERY_BLOCK, self._prompt):
                self._discard(slot, start)
                written += self._encode(slot, start, rows, None)
            else:
                written += self._collect(slot, start, low, rows)
        self.seen[slot, first:stop] = True
        for number in range(first // QUERY_SHARD, (stop - 1) // QUERY_SHARD + 1):
            self._settle(number)
        return written

    def ready(self) -> int:
        """Query rows from 0 on that readers can be shown."""
        number = 0
        while number in self._ready:
            number += 1
        return min(number * QUERY_SHARD, self._prompt)

    def publish(self, keys: int) -> None:
        """Tell readers how many query rows are finished; `keys` is `attention`'s, so that `key_pos` agrees."""
        layers, heads = self.layout.shard[:2]
        self.metadata = self.layout.metadata((layers, heads, self.ready(), keys), self._codec_name)
        write_json(self._directory / METADATA, self.metadata)

    def close(self) -> None:
        """Write what was waiting for more rows and finish every shard."""
        for slot in list(self._pending):
            self._flush(slot)
        for number in list(self._shards):
            self._finish(number)
        self._ready.update(range(-(-self._prompt // QUERY_SHARD)))

    def release(self) -> None:
        """Give up: close the files and leave what is there."""
        for shard in self._shards.values():
            shard.release()

    def _collect(self, slot: int, start: int, low: int, rows: Array) -> int:
        """Keep part of a block until the rest comes; a layer waits for one block at a time."""
        pending, written = self._pending.get(slot), 0
        if pending is None or pending.first != start:
            written = self._flush(slot)
            keys = round_up(start + QUERY_BLOCK, KEY_BLOCK)
            shape = (self.layout.shard[1], QUERY_BLOCK, keys)
            pending = _Pending(start, np.zeros(shape, self._dtype), np.zeros(QUERY_BLOCK, np.bool_))
            self._pending[slot] = pending
        heads, count, keys = rows.shape
        where = slice(low - start, low - start + count)
        pending.values[:heads, where, :keys] = rows
        pending.values[:heads, where, keys:] = 0
        pending.seen[where] = True
        if pending.seen[: self._prompt - start].all():
            written += self._flush(slot)
        return written

    def _discard(self, slot: int, start: int) -> None:
        pending = self._pending.get(slot)
        if pending is not None and pending.first == start:
            del self._pending[slot]

    def _flush(self, slot: int) -> int:
        pending = self._pending.pop(slot, None)
        return 0 if pending is None else self._encode(slot, pending.first, pending.values, pending.seen)

    def _encode(self, slot: int, start: int, rows: Array, seen: Array | None) -> int:
        """Write the causal chunks of a block [heads, rows, keys]; rows not `seen` keep what was stored."""
        shard, written = self._open(start // QUERY_SHARD), 0
        scratch = self._scratch
        unseen = None if seen is None or seen.all() else ~seen[None, :, None]
        for block in range(-(-min(start + QUERY_BLOCK, self._prompt) // KEY_BLOCK)):
            part = rows[:, :, block * KEY_BLOCK : (block + 1) * KEY_BLOCK]
            heads, count, keys = part.shape
            scratch[...] = 0
            scratch[:heads, :count, :keys] = part
            chunk = self._chunk(slot, start, block)
            old = shard.read(chunk) if unseen is not None else None
            if old is not None and unseen is not None:
                np.copyto(scratch, self._codec.decode(old), where=unseen)
            written += shard.append(chunk, *self._codec.encode(scratch))
        shard.release()  # A long prompt has many shards open at once: do not hold their descriptors.
        return written

    def _chunk(self, slot: int, start: int, block: int) -> int:
        """Index of an inner chunk in its shard: C order over (layer, 1, query block, key block)."""
        _, _, query_blocks, key_blocks = self.layout.grid
        return (slot * query_blocks + start % QUERY_SHARD // QUERY_BLOCK) * key_blocks + block

    def _open(self, number: int) -> ShardFile:
        if number not in self._shards:
            path = self._directory / self.layout.key(0, 0, number)
            self._shards[number] = ShardFile.open(path, self.layout.chunks)
        return self._shards[number]

    def _settle(self, number: int) -> None:
        """Finish a shard once every layer has all its rows and none of them waits."""
        rows = self.seen[:, number * QUERY_SHARD : (number + 1) * QUERY_SHARD]
        waits = any(pending.first // QUERY_SHARD == number for pending in self._pending.values())
        if number in self._shards and not waits and rows.all():
            self._finish(number)

    def _finish(self, number: int) -> None:
        self._shards.pop(number).finish()
        self._ready.add(number)


def write_flat(
    directory: Path, name: str, dim: str, values: Array, fill: float = 0, attributes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write a one-dimensional array whole, data before metadata; returns its `zarr.json`."""
    path = directory / name
    make_directory(path)
    if len(values):
        write_new(path / "c.0", values.tobytes())
    metadata = flat_metadata(dim, values.dtype.name, len(values), fill, attributes)
    write_json(path / METADATA, metadata)
    return metadata
