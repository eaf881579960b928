"""The prompt's own attention map of one capture, in causal blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.journal import PromptBlock
from exporters.shards import ChunkCodec, ShardFile, make_directory, place, write_json
from exporters.zarr_arrays import METADATA
from tracer.schema import KEY_BLOCK, QUERY_BLOCK, QUERY_SHARD, ArrayLayout, round_up

__all__ = ["PrefillMap"]

Array = NDArray[Any]
Where = dict[int, tuple[int, int]]


@dataclass(slots=True)
class _Pending:
    """Rows of one strip's block of 64 query rows that have come so far."""

    first: int
    """Absolute position of the block's first row."""
    values: Array
    """[heads, 64, keys]."""
    seen: Array
    """bool [64]."""


class PrefillMap:
    """`attention_prefill`: blocks of one layer in any order and any division of its query rows; the last wins.

    Where several ranks write, each layer is as many *strips* as a row has parts (`head_parts`): a strip is what one of
    them brings of one layer, whole by itself. Else a layer is one strip.
    """

    def __init__(self, directory: Path, layout: ArrayLayout, codec: str, prompt: int) -> None:
        self.layout = layout
        self.metadata: dict[str, Any] = {}
        self.parts = layout.grid[1]
        """Strips of a layer."""
        self.seen = np.zeros((layout.shard[0] * self.parts, prompt), dtype=np.bool_)
        """bool [strip, query row]: rows received."""
        self._prompt = prompt
        self._directory = directory / layout.name
        self._codec_name = codec
        self._codec = ChunkCodec(layout, codec)
        self._dtype = np.dtype(layout.dtype)
        self._scratch = np.zeros((0, *layout.chunk[1:]), self._dtype)
        self._shards: dict[int, ShardFile] = {}
        self._pending: dict[int, _Pending] = {}
        self._ready: set[int] = set()
        self._restored: dict[int, Where] = {}
        self._written: list[PromptBlock] = []
        self._touched: set[int] = set()

    def create(self, keys: int) -> None:
        """Make the array, without rows."""
        make_directory(self._directory)
        self.publish(keys)

    def fits(self, slot: int, head: int, first: int, block: Array) -> bool:
        """True if `block` [heads, rows, keys] of layer `slot`, from that head and row position on, lies in the map."""
        if block.ndim != 3:
            return False
        heads, rows, keys = block.shape
        stop = first + rows
        inside = 0 <= slot < self.layout.shard[0] and 0 <= first < stop <= self._prompt
        size = self.layout.chunk[1]
        whole = head == 0 if self.parts == 1 else head >= 0 and head % size == heads % size == 0
        return inside and whole and 0 < heads <= self.layout.shard[1] - head and keys >= stop

    def put(self, slot: int, head: int, first: int, block: Array) -> None:
        """Store rows `first` … of layer `slot`; a part of a block of 64 rows waits in memory for the rest."""
        size = self.layout.chunk[1]
        for at in range(0, block.shape[0], size):
            self._put(slot * self.parts + (head + at) // size, first, block[at : at + size])

    def _put(self, slot: int, first: int, block: Array) -> None:
        """Rows of one strip; from here on a slot is a strip's."""
        stop = first + block.shape[1]
        for start in range(first // QUERY_BLOCK * QUERY_BLOCK, stop, QUERY_BLOCK):
            low, high = max(start, first), min(start + QUERY_BLOCK, stop)
            rows = block[:, low - first : high - first, :high]
            if low == start and high == min(start + QUERY_BLOCK, self._prompt):
                self._discard(slot, start)
                self._encode(slot, start, rows, None)
            else:
                self._collect(slot, start, low, rows)
        self.seen[slot, first:stop] = True

    def take_written(self) -> list[PromptBlock]:
        """What has been written since the last call, for the journal."""
        written, self._written = self._written, []
        return written

    def settle(self) -> None:
        """Finish the shards just written of which each layer has all its rows and none of them waits."""
        waiting = {pending.first // QUERY_SHARD for pending in self._pending.values()}
        for number in self._touched - waiting:
            if self.seen[:, number * QUERY_SHARD : (number + 1) * QUERY_SHARD].all():
                self._finish(number)
        self._touched.clear()

    def flush(self) -> None:
        """Write what waits for more rows."""
        for slot in list(self._pending):
            self._flush(slot)

    def restore(self, block: PromptBlock) -> None:
        """Take over a block that a killed writer's journal names; `recover` sees to its shard."""
        slot, start, mask, placed = block
        rows = np.flatnonzero(np.unpackbits(np.frombuffer(mask.to_bytes(8, "little"), np.uint8), bitorder="little"))
        self.seen[slot, start + rows] = True
        place(self._restored.setdefault(start // QUERY_SHARD, {}), self._chunk(slot, start, 0), placed)

    def recover(self) -> None:
        """Finish the shards of restored blocks; rows of those that are gone are no longer `seen`."""
        for number, where in self._restored.items():
            try:
                shard = ShardFile.recover(self._path(number), self.layout.chunks, where)
            except FileNotFoundError:
                self.seen[:, number * QUERY_SHARD : (number + 1) * QUERY_SHARD] = False
                continue
            if shard is not None:
                shard.finish()

    def ready(self) -> int:
        """Query rows from 0 on that readers can be shown."""
        number = 0
        while number in self._ready:
            number += 1
        return min(number * QUERY_SHARD, self._prompt)

    def publish(self, keys: int) -> None:
        """Tell readers how many query rows are finished; `keys` is `attention`'s, so that `key_pos` agrees."""
        layers, heads = self.layout.shard[:2]
        metadata = self.layout.metadata((layers, heads, self.ready(), keys), self._codec_name)
        if metadata != self.metadata:
            write_json(self._directory / METADATA, metadata)
            self.metadata = metadata

    def close(self) -> None:
        """Write what was waiting for more rows and finish every shard."""
        self.flush()
        for number in list(self._shards):
            self._finish(number)
        self._ready.update(range(-(-self._prompt // QUERY_SHARD)))

    def release(self) -> None:
        """Give up: close the files and leave what is there."""
        for shard in self._shards.values():
            shard.release()

    def _collect(self, slot: int, start: int, low: int, rows: Array) -> None:
        """Keep part of a block until the rest comes; a layer waits for one block at a time."""
        pending = self._pending.get(slot)
        if pending is None or pending.first != start:
            self._flush(slot)
            keys = round_up(start + QUERY_BLOCK, KEY_BLOCK)
            shape = (self.layout.chunk[1], QUERY_BLOCK, keys)
            pending = _Pending(start, np.zeros(shape, self._dtype), np.zeros(QUERY_BLOCK, np.bool_))
            self._pending[slot] = pending
        heads, count, keys = rows.shape
        where = slice(low - start, low - start + count)
        pending.values[:heads, where, :keys] = rows
        pending.values[:heads, where, keys:] = 0
        pending.seen[where] = True
        if pending.seen[: self._prompt - start].all():
            self._flush(slot)

    def _discard(self, slot: int, start: int) -> None:
        pending = self._pending.get(slot)
        if pending is not None and pending.first == start:
            del self._pending[slot]

    def _flush(self, slot: int) -> None:
        pending = self._pending.pop(slot, None)
        if pending is not None:
            self._encode(slot, pending.first, pending.values, pending.seen)

    def _encode(self, slot: int, start: int, rows: Array, seen: Array | None) -> None:
        """Write the causal chunks of a block [heads, rows, keys]; rows not `seen` keep what was stored."""
        shard = self._open(start // QUERY_SHARD)
        blocks = -(-min(start + QUERY_BLOCK, self._prompt) // KEY_BLOCK)
        unseen = None if seen is None or seen.all() else ~seen[None, :, None]
        buffer = self._buffer(blocks)
        for block, scratch in enumerate(buffer):
            part = rows[:, :, block * KEY_BLOCK : (block + 1) * KEY_BLOCK]
            heads, count, keys = part.shape
            scratch[...] = 0
            scratch[:heads, :count, :keys] = part
            old = shard.read(self._chunk(slot, start, block)) if unseen is not None else None
            if old is not None and unseen is not None:
                np.copyto(scratch, self._codec.decode(old), where=unseen)
        placed = shard.append(self._chunk(slot, start, 0), self._codec.encode(buffer))
        shard.release()  # A long prompt has many shards open at once: do not hold their descriptors.
        rows_there = range(min(QUERY_BLOCK, self._prompt - start)) if seen is None else np.flatnonzero(seen).tolist()
        self._written.append(PromptBlock(slot, start, sum(1 << row for row in rows_there), placed))

    def _buffer(self, blocks: int) -> Array:
        """[block, heads, 64, 256], used again by the next block."""
        if len(self._scratch) < blocks:
            self._scratch = np.zeros((blocks, *self.layout.chunk[1:]), self._dtype)
        return self._scratch[:blocks]

    def _chunk(self, slot: int, start: int, block: int) -> int:
        """Index of an inner chunk in its shard: C order over (layer, part, query block, key block)."""
        _, _, query_blocks, key_blocks = self.layout.grid
        return (slot * query_blocks + start % QUERY_SHARD // QUERY_BLOCK) * key_blocks + block

    def _open(self, number: int) -> ShardFile:
        if number not in self._shards:
            self._shards[number] = ShardFile.open(self._path(number), self.layout.chunks)
        self._touched.add(number)
        return self._shards[number]

    def _path(self, number: int) -> Path:
        return self._directory / self.layout.key(0, 0, number)

    def _finish(self, number: int) -> None:
        self._shards.pop(number).finish()
        self._ready.add(number)
