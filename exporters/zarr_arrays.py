"""Arrays over `step` or over the prompt; an inner chunk holds one row, or one rank's heads of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporters.shards import ChunkCodec, Placed, ShardFile, make_directory, place, write_json
from tracer.schema import ArrayLayout

__all__ = ["METADATA", "Put", "StepRows"]

Array = NDArray[Any]
Where = dict[int, tuple[int, int]]
METADATA: Final = "zarr.json"
_INFINITY: Final[dict[int, tuple[Any, Any, int, int]]] = {
    2: (np.uint16, np.int16, 0x7C00, 0xFC00),
    4: (np.uint32, np.int32, 0x7F80_0000, 0xFF80_0000),
}
"""By item size: integer views and the bits of the two infinities; as integers, larger values have larger magnitude."""


class Put(NamedTuple):
    """A part of a row that has been stored."""

    part: int
    """Its place among the parts of the row along the head axis; 0 where a row is one part."""
    placed: Placed
    infinite: int
    """Infinite values in it."""


class StepRows:
    """An array of rows, in any order (in order is fast), whole or in parts of some heads.

    One shard is open at a time, or two where ranks bring parts of rows: one may be ahead of another.

    Its first axis is `step`, or has the `length` that is given, and is then shown as a whole.
    """

    def __init__(
        self, directory: Path, layout: ArrayLayout, codec: str, number: int, length: int | None = None
    ) -> None:
        self.layout = layout
        self.length = length
        self.number = number
        """What the journal calls this array."""
        self.overflow = 0
        """Infinite values stored; sources beyond ±65,504 become infinite as float16."""
        self.metadata: dict[str, Any] = {}
        self._directory = directory / layout.name
        self._codec_name = codec
        self._codec = ChunkCodec(layout, codec)
        self._dtype = np.dtype(layout.dtype)
        self._per_shard = layout.shard[0]
        self._blocks = layout.chunks // self._per_shard
        self._row = layout.shard[1:]
        self.parts = layout.grid[2] if len(layout.grid) == 4 else 1
        """Parts of a row that are stored each by itself."""
        self._heads = layout.chunk[2] if len(layout.grid) == 4 else 1
        self._part_blocks = self._blocks // self.parts
        self._width = layout.chunk[-1]
        self._has_keys = layout.dims[-1] == "key_pos"
        self._scratch = np.zeros((0, *layout.chunk[1:]), self._dtype)
        self._shards: dict[int, ShardFile] = {}
        """Those that are open."""
        self._numbers: set[int] = set()
        self._restored: dict[int, Where] = {}

    def create(self, steps: int = 0, keys: int = 0) -> None:
        """Make the array; `steps`: rows that readers see in others, before this one has any."""
        make_directory(self._directory)
        self._publish(steps if self.length is None else 0, keys)

    def fits(self, row: Array, head: int = 0) -> bool:
        """True if `row` [without the step axis] is of this array's shape; attention may have fewer keys.

        Rows of several parts may come with the heads of some of them, from `head` on.
        """
        full = self._row
        if row.ndim != len(full) or not row.shape or (row.ndim != 3 and head):
            return False
        last = 0 < row.shape[-1] <= full[-1] if self._has_keys else row.shape[-1] == full[-1]
        if row.ndim != 3:
            return last and row.shape[:-1] == full[:-1]
        whole_parts = row.shape[1] > 0 <= head and head % self._heads == row.shape[1] % self._heads == 0
        return bool(last and whole_parts and row.shape[0] == full[0] and head + row.shape[1] <= full[1])

    def put(self, step: int, row: Array, head: int = 0) -> list[Put]:
        """Store one row, or parts of it, that `fits`, replacing earlier ones."""
        if row.dtype != self._dtype:
            with np.errstate(over="ignore"):  # Counted below.
                row = row.astype(self._dtype)
        if self.parts == 1:
            return [self._put(step, 0, row)]
        size = self._heads
        return [self._put(step, (head + at) // size, row[:, at : at + size]) for at in range(0, row.shape[1], size)]

    def _put(self, step: int, part: int, row: Array) -> Put:
        number, place_in_shard = divmod(step, self._per_shard)
        shard = self._shards.get(number) or self._open(number)
        first = place_in_shard * self._blocks + part * self._part_blocks
        if first in shard:  # A later attempt: its row may have fewer blocks.
            shard.clear(first, first + self._part_blocks)
        placed = shard.append(first, self._encode(row))
        infinite = _infinities(row) if self.layout.dims[-1] in ("vocab", "dim", "hidden") else 0
        self.overflow += infinite
        return Put(part, placed, infinite)

    def restore(self, step: int, part: int, placed: Placed, infinite: int) -> None:
        """Take over what a killed writer's journal names of a row; `recover` sees to its shard."""
        number, place_in_shard = divmod(step, self._per_shard)
        where = self._restored.setdefault(number, {})
        first = place_in_shard * self._blocks + part * self._part_blocks
        if first in where:
            for chunk in range(first, first + self._part_blocks):
                where.pop(chunk, None)
        place(where, first, placed)
        self.overflow += infinite

    @property
    def due(self) -> int:
        """Steps that must have come before `settle` has something to do; 0 if that is not known."""
        return (min(self._shards) + 1) * self._per_shard if self._shards else 0

    def settle(self, steps: int) -> int:
        """Finish open shards whose steps are all below `steps`; returns how many steps can be shown."""
        for number in list(self._shards):
            if (number + 1) * self._per_shard <= steps:
                self._finish(number)
        return steps // self._per_shard * self._per_shard

    def publish(self, steps: int, keys: int = 0) -> None:
        """Tell readers that the array has `steps` rows (of `keys` keys, for attention)."""
        if self.length is not None:
            self._finish(*self._shards)
        self._publish(steps if self.length is None else self.length, keys)

    def _publish(self, steps: int, keys: int) -> None:
        row = self.layout.shard[1:]
        if self._has_keys:
            row = (*row[:-1], keys or row[-1])
        metadata = self.layout.metadata((steps, *row), self._codec_name)
        if metadata != self.metadata:
            write_json(self._directory / METADATA, metadata)
            self.metadata = metadata

    def close(self, steps: int) -> None:
        """Finish everything and leave no row at or past `steps`."""
        steps = steps if self.length is None else self.length
        for number, shard in self._shards.items():
            shard.clear(max(steps - number * self._per_shard, 0) * self._blocks)
        self._finish(*self._shards)
        for number in self._numbers:
            if number * self._per_shard >= steps:
                (self._directory / self.layout.key(number)).unlink(missing_ok=True)

    @property
    def restored(self) -> bool:
        """True if a killed writer's journal names rows of this array."""
        return bool(self._restored)

    def recover(self, steps: int) -> list[int]:
        """Finish the shards of restored rows below `steps`; returns the steps of shards that are gone."""
        steps = steps if self.length is None else self.length
        gone: list[int] = []
        for number, where in self._restored.items():
            first = number * self._per_shard
            path = self._directory / self.layout.key(number)
            kept = {chunk: at for chunk, at in where.items() if chunk < (steps - first) * self._blocks}
            try:
                shard = ShardFile.recover(path, self.layout.chunks, kept)
            except FileNotFoundError:
                gone += range(first, first + self._per_shard)
                continue
            if shard is not None:
                shard.finish()
            if first >= steps:
                path.unlink(missing_ok=True)
        return gone

    def release(self) -> None:
        """Give up: close the files and leave what is there."""
        for shard in self._shards.values():
            shard.release()

    def _encode(self, row: Array) -> list[Any]:
        """Data and checksum of each chunk of a row; a part of a block is padded with zeros."""
        last = row.shape[-1]
        if last == self._width and row.flags.c_contiguous:
            return self._codec.encode(row[None])
        return self._codec.encode(self._split(row, self._width, last))

    def _split(self, row: Array, width: int, last: int) -> Array:
        """[block, ..., width] of a row [..., last], in a buffer that the next row uses again."""
        whole, rest = divmod(last, width)
        count = whole + (rest > 0)
        if len(self._scratch) < count:
            self._scratch = np.zeros((count, *self.layout.chunk[1:]), self._dtype)
        scratch = self._scratch[:count]
        if whole:
            for block in range(whole):
                scratch[block] = row[..., block * width : (block + 1) * width]
        if rest:
            scratch[whole, ..., :rest] = row[..., whole * width :]
            scratch[whole, ..., rest:] = 0
        return scratch

    def _open(self, number: int) -> ShardFile:
        room = 1 if self.parts == 1 else 2
        self._finish(*sorted(self._shards)[: len(self._shards) - room + 1])
        shard = self._shards[number] = ShardFile.open(self._directory / self.layout.key(number), self.layout.chunks)
        self._numbers.add(number)
        return shard

    def _finish(self, *numbers: int) -> None:
        for number in numbers:
            self._shards.pop(number).finish()


def _infinities(row: Array) -> int:
    """How many values are infinite; two SIMD reductions (3 µs) rule it out for almost every row."""
    unsigned, signed, plus, minus = _INFINITY[row.dtype.itemsize]
    if row.view(signed).max() < plus and row.view(unsigned).max() < minus:
        return 0
    return int(np.isinf(row).sum())
