"""One capture while it is written: from the generation's start to its end.

Order of writing, so that a reader at any moment, also after `kill -9`, sees a correct prefix: the group with
`complete: false`; rows into `<shard>.part`, and after each step's rows its record in the journal; a full shard's index
and rename; the arrays' `zarr.json` with the grown shape; at the end the small arrays, then the group with `complete`
and `closed`. Its owner removes the journal last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from exporters.head_parts import divided, first_head, head_parts, rank_count, whole_row
from exporters.journal import Journal, PromptBlock, PromptEntry, RowEntry, StepEntry
from exporters.ledger import EVERYTHING, NUMBERS, Ledger
from exporters.payload import view_array
from exporters.prefill_map import PrefillMap
from exporters.shards import write_json
from exporters.small_arrays import SmallArrays
from exporters.store_budget import StoreBudget
from exporters.zarr_arrays import StepRows
from exporters.zarr_facts import (
    Numbers,
    attention_axes,
    end_attributes,
    limits,
    number_columns,
    numbers_of,
    prompt_layout,
    prompt_lengths,
    row_layout,
    start_attributes,
    stored_facts,
)
from tracer import schema
from tracer.config import Settings
from tracer.records import (
    ArrayRecord,
    ArraySlice,
    CaptureSpec,
    EngineInfo,
    GenerationEnd,
    GenerationStart,
    StepRecord,
)
from tracer.schema import ArrayLayout

__all__ = ["OpenCapture"]

Array = NDArray[Any]
Shape = tuple[int, ...]
MB: Final = 1_000_000
STOPPED: Final = "the exporter process was stopped"
KV_LEN: Final = list(schema.STEP_NUMBERS).index("kv_len")


class OpenCapture:
    """The group of one generation; methods raise OSError as the file system does, and nothing else on purpose.

    directory: made already; nothing is written to it before `begin`. `exporters.recovery` fills a new object from a
    journal instead.
    """

    def __init__(
        self,
        directory: Path,
        start: GenerationStart,
        engine: EngineInfo | None,
        settings: Settings,
        journal: Journal,
        budget: StoreBudget | None = None,
    ) -> None:
        assert start.capture is not None
        self.directory = directory
        self.span_id = start.span_id
        self.journal = journal
        self._spec: CaptureSpec = start.capture
        self._start = start
        self._engine = engine
        self._settings = settings
        self._budget = budget
        self._axes = attention_axes(self._spec.attention, engine) if self._spec.wants_attention else None
        self._lengths = prompt_lengths(start)
        self._parts = head_parts(self._spec, engine, self._axes)
        self._ledger = Ledger(schema.asked_arrays(self._spec), self._lengths, self._parts)
        self._attributes = start_attributes(start, engine)
        self._rows: dict[str, StepRows] = {}
        self._prefill: PrefillMap | None = None
        self._small = SmallArrays(directory, start, engine, self._axes)
        self._numbers: dict[int, Numbers] = {}
        self._steps = 0
        """One past the highest step seen."""
        self._reached = dict.fromkeys(range(rank_count(self._spec, engine)), 0)
        """The same of each rank."""
        self._shown = 0
        """Rows that readers can see."""
        self._due = 0
        """Steps that every rank must have brought before `_show` has something to do."""
        self._shown_queries = 0
        self._longest = 0
        """Keys of the longest row, once the last valid step is known."""
        self._written = 0
        self._stopped: str | None = None
        """Why no more arrays are stored."""
        self.over_budget = False
        """True if that was the store's budget."""
        for fact in limits(self._spec, engine):
            self._ledger.state(*fact)

    def begin(self) -> None:
        """Write the facts known at the start, the journal's first."""
        chosen = {"codec": self._settings.codec, "capture_text": self._settings.capture_text}
        self.journal.begin(self._start, self._engine, chosen)
        self._write_group(None)
        self._small.prompt()

    def step(self, record: StepRecord, payload: memoryview) -> None:
        """Store what one step brought."""
        step, mark = record.step, self._ledger.mark()
        self._note_drops(record.dropped, step)
        if step is None:
            if record.dropped:
                self.journal.step(StepEntry(-1, None, (), self._ledger.since(mark)))
            return
        numbers = numbers_of(record) if record.rank == 0 else None  # Of the step as a whole, rank 0 speaks.
        rows = [row for item in record.arrays for row in self._put(step, item, payload)]
        if rows or numbers or record.dropped:
            self.journal.step(StepEntry(step, numbers, rows, self._ledger.since(mark)))
        if numbers is not None:
            self._number(step, numbers)
        self._reach(step, record.rank)
        self._show()

    def prompt_rows(self, record: ArrayRecord, payload: memoryview) -> None:
        """Store blocks of the prompt's own attention map, or its queries and keys."""
        blocks: list[PromptBlock] = []
        mark = self._ledger.mark()
        self._note_drops(record.dropped, None)
        for item in record.arrays:
            block = self._take(item, payload, None)
            if block is None:
                continue
            fits = self._put_positions(item, block) if item.name in self._lengths else self._put_map(item, block)
            if not fits:
                self._ledger.drop(item.name, None, f"block {item.shape} at {item.start} does not fit the array")
            elif self._prefill is not None:
                blocks += self._take_blocks(self._prefill)
        self.journal.prompt(PromptEntry(blocks, self._ledger.since(mark)))
        self._show_queries()

    def end(self, end: GenerationEnd) -> None:
        """Finish: trim surplus rows, write the small arrays, say what is missing."""
        self._flush_prompt()
        self.journal.end(end)
        self._close(end, end.status)

    def interrupted(self, time_ns: int, status: str = "interrupted", reason: str = STOPPED) -> None:
        """End without a GenerationEnd: everything that has come is kept."""
        self._flush_prompt()
        self._ledger.state(EVERYTHING, f"all from step {self._steps} on", reason)
        start = self._start
        self._close(GenerationEnd(start.trace_id, start.span_id, time_ns, "aborted", "", self._steps), status)

    def _close(self, end: GenerationEnd, status: str) -> None:
        steps = end.output_tokens
        self._shown = steps
        self._longest = max((int(row[KV_LEN]) for step, row in self._numbers.items() if step < steps), default=0)
        for rows in self._rows.values():
            rows.close(steps)
            rows.publish(steps, self._keys())
        if self._prefill is not None:
            self._prefill.close()
            self._prefill.publish(self._keys())
        self._small.end(number_columns(self._numbers, end), end, text=self._settings.capture_text)
        layers = self._axes.layers if self._axes is not None else ()
        missing = self._ledger.missing(steps, self._prompt_seen(), end.cached_tokens, layers)
        self._attributes |= end_attributes(end, status, missing, self._ledger.dropped(steps))
        self._attributes["checksums"] = self._small.checksums
        arrays = self.arrays()
        overflow = {name: rows.overflow for name, rows in self._rows.items()}
        self._attributes["stored"] = stored_facts(arrays, overflow, self._engine)
        self._write_group(arrays)

    def abandon(self, reason: str) -> None:
        """The store cannot be written: give descriptors back and, if that much is possible, say so.

        The journal stays: what has come is closed later, by this process or the next.
        """
        self.release()
        self.fail(reason)

    def release(self) -> None:
        """Give descriptors back, and the journal's lock."""
        for rows in self._rows.values():
            rows.release()
        if self._prefill is not None:
            self._prefill.release()
        self.journal.release()

    def fail(self, reason: str) -> None:
        """Say in the group that this capture cannot be written."""
        entry = {"array": EVERYTHING, "what": f"all from step {self._shown} on", "reason": reason}
        self._attributes |= {"complete": False, "closed": True, "status": "failed", "missing": [entry]}
        self._write_group(None)

    # -- rows --------------------------------------------------------------------------------------------------

    def _put(self, step: int, item: ArraySlice, payload: memoryview) -> list[RowEntry]:
        row = self._take(item, payload, step)
        if row is None:
            return []
        rows = self._rows.get(item.name) or self._new_rows(item.name, row.shape)
        head = first_head(item.start)
        if rows is None or not rows.fits(row, head):
            self._ledger.drop(item.name, step, f"row {item.shape} at {item.start} does not fit the array")
            return []
        return self._store(rows, step, row, head)

    def _store(self, rows: StepRows, step: int, row: Array, head: int) -> list[RowEntry]:
        """Write a row, or the heads of it that have come, and count it."""
        put = rows.put(step, row, head)
        self._count(sum([sum(placed.sizes) for _, placed, _ in put]))
        self._ledger.stored(rows.layout.name, step, [part for part, _, _ in put])
        return [RowEntry(rows.number, infinite, placed, part) for part, placed, infinite in put]

    def _put_map(self, item: ArraySlice, block: Array) -> bool:
        """Rows of the prompt's map [heads, rows, keys] of one layer; False if they are not part of it."""
        prefill = self._prefill_map()
        slot, head, first, _ = item.start if len(item.start) == 4 else (-1, 0, 0, 0)
        if prefill is None or not prefill.fits(slot, head, first, block):
            return False
        prefill.put(slot, head, first, block)
        return True

    def _put_positions(self, item: ArraySlice, block: Array) -> bool:
        """Queries or keys [positions, layers, heads, head_size] of the prompt; False if they are not part of it."""
        rows = self._rows.get(item.name) or self._new_rows(item.name, block.shape[1:])
        first, head = (item.start[0], first_head(item.start[1:])) if item.start else (-1, -1)
        inside = rows is not None and rows.length is not None and 0 <= first <= rows.length - len(block)
        if rows is None or not inside or not len(block) or not rows.fits(block[0], head):
            return False
        entries = [
            StepEntry(position, None, self._store(rows, position, row, head))
            for position, row in enumerate(block, first)
        ]
        self.journal.steps(entries)
        return True

    def _number(self, step: int, numbers: Numbers) -> None:
        self._numbers[step] = numbers
        self._ledger.stored(NUMBERS, step)

    def _reach(self, step: int, rank: int) -> None:
        """That rank has brought what it has of a step."""
        self._steps = max(self._steps, step + 1)
        reached = self._reached.get(rank, 0)
        if step >= reached:
            self._reached[rank] = step + 1
        else:  # It came late, into a shard that has been finished.
            self._due = 0

    def _take(self, item: ArraySlice, payload: memoryview, step: int | None) -> Array | None:
        """The slice's array, or None, with the reason booked, if it cannot or may not be stored."""
        try:
            array = view_array(item, payload)
        except (ValueError, TypeError) as error:
            self._ledger.drop(item.name, step, f"unreadable: {error}")
            return None
        refusal = self._refusal(array.nbytes)
        if refusal is not None:
            self._ledger.drop(item.name, step, refusal)
            return None
        return array

    def _refusal(self, size: int) -> str | None:
        """Why an array of that size may not be stored; after the first refusal nothing is: no holes."""
        if self._stopped is None and self._written + size > self._settings.request_mb * MB:
            self._stopped = f"byte budget of {self._settings.request_mb} MB reached"
        elif self._stopped is None and self._budget is not None:
            self._stopped = self._budget.refusal()
            self.over_budget = self._stopped is not None
        return self._stopped

    def _count(self, written: int) -> None:
        self._written += written
        if self._budget is not None:
            self._budget.add(written)

    def _new_rows(self, name: str, shape: Shape) -> StepRows | None:
        """Create the array at its first row; None if the capture did not ask for it or the row cannot be one."""
        shape = whole_row(shape, self._parts.get(name, ()))
        layout = self._layout(name, shape)
        if layout is None:
            return None
        self._small.axes(layout)
        self.journal.array(name, shape, layout)
        rows = self._add_rows(layout)
        rows.create(self._shown, self._keys())
        return rows

    def _add_rows(self, layout: ArrayLayout) -> StepRows:
        length = self._lengths.get(layout.name)
        rows = StepRows(self.directory, layout, self._settings.codec, len(self._rows), length)
        self._rows[layout.name] = rows
        self._due = 0
        return rows

    def _layout(self, name: str, shape: Shape) -> ArrayLayout | None:
        layout = row_layout(name, shape, self._start, self._engine, self._axes)
        return None if layout is None else divided(layout, self._parts.get(name, ()))

    def _prefill_map(self) -> PrefillMap | None:
        if self._prefill is None and (prefill := self._prompt_array()) is not None:
            self._small.axes(prefill.layout)
            prefill.create(self._keys())
            self._prefill = prefill
        return self._prefill

    def _prompt_array(self) -> PrefillMap | None:
        """The map, unless it was not asked for or its axes are not known."""
        layout = prompt_layout(self._start, self._axes)
        if layout is None:
            return None
        layout = divided(layout, self._parts.get(layout.name, ()))
        return PrefillMap(self.directory, layout, self._settings.codec, self._start.prompt_tokens)

    def _take_blocks(self, prefill: PrefillMap) -> list[PromptBlock]:
        blocks = prefill.take_written()
        self._count(sum(sum(block.placed.sizes) for block in blocks))
        return blocks

    def _flush_prompt(self) -> None:
        """Write the prompt rows that wait for others of their block, and say so in the journal."""
        if self._prefill is not None:
            self._prefill.flush()
            if blocks := self._take_blocks(self._prefill):
                self.journal.prompt(PromptEntry(blocks))

    # -- what readers see --------------------------------------------------------------------------------------

    def _show(self) -> None:
        """Publish the steps that every array has in finished shards."""
        stepwise = [rows for rows in self._rows.values() if rows.length is None]
        whole = min(self._reached.values())
        if not stepwise or whole < self._due:
            return
        ready = min([rows.settle(whole) for rows in stepwise])
        if ready > self._shown:
            self._shown = ready
            for rows in self._rows.values():
                rows.publish(ready, self._keys())
            if self._prefill is not None:
                self._prefill.publish(self._keys())
        self._due = min([rows.due for rows in stepwise])

    def _show_queries(self) -> None:
        if self._prefill is None:
            return
        self._prefill.settle()
        if self._prefill.ready() > self._shown_queries:
            self._shown_queries = self._prefill.ready()
            self._prefill.publish(self._keys())

    def _keys(self) -> int:
        """Size of `key_pos` while `_shown` rows can be seen: the longest row's keys, and at least the prompt."""
        return max(self._start.prompt_tokens + max(self._shown - 1, 0), self._longest, 1)

    # -- the end -----------------------------------------------------------------------------------------------

    def _write_group(self, arrays: dict[str, dict[str, Any]] | None) -> None:
        write_json(self.directory / "zarr.json", schema.group_metadata("capture", self._attributes, arrays))

    def arrays(self) -> dict[str, dict[str, Any]]:
        """`zarr.json` of every array by name."""
        big = {name: rows.metadata for name, rows in self._rows.items()}
        if self._prefill is not None:
            big[schema.ATTENTION_PREFILL] = self._prefill.metadata
        return {**big, **self._small.metadata}

    # -- what is missing ---------------------------------------------------------------------------------------

    def _note_drops(self, dropped: tuple[str, ...], step: int | None) -> None:
        for entry in dropped:
            name, _, cause = entry.partition(": ")
            self._ledger.drop(name, step, cause)

    def _prompt_seen(self) -> NDArray[np.bool_] | None:
        """bool [strip, prompt row] received; None unless the prompt's map was asked for."""
        if self._spec.attention is None or self._spec.attention.rows != "all":
            return None
        if self._prefill is not None:
            return self._prefill.seen
        return np.zeros((1, self._start.prompt_tokens), dtype=np.bool_)
