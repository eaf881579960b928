"""One capture while it is written: from the generation's start to its end.

Order of writing, so that a reader at any moment, also after `kill -9`, sees a correct prefix: the group with
`complete: false`; rows into `<shard>.part`; a full shard's index and rename; the arrays' `zarr.json` with the grown
shape; at the end the small arrays and, last, the group with `complete` and `closed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from exporters.ledger import EVERYTHING, NUMBERS, Ledger
from exporters.payload import view_array
from exporters.shards import make_directory, write_json
from exporters.store_budget import StoreBudget
from exporters.zarr_arrays import PrefillMap, StepRows, write_flat
from exporters.zarr_facts import (
    Numbers,
    attention_axes,
    end_attributes,
    key_capacity,
    number_columns,
    numbers_of,
    start_attributes,
    token_text,
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
from tracer.store_files import CaptureName

__all__ = ["OpenCapture"]

Array = NDArray[Any]
MB: Final = 1_000_000
KV_LEN: Final = list(schema.STEP_NUMBERS).index("kv_len")


class OpenCapture:
    """The group of one generation; methods raise OSError as the file system does, and nothing else on purpose."""

    def __init__(
        self,
        directory: Path,
        start: GenerationStart,
        engine: EngineInfo | None,
        settings: Settings,
        budget: StoreBudget,
    ) -> None:
        assert start.capture is not None
        self._spec: CaptureSpec = start.capture
        self._directory = directory
        self._start = start
        self._engine = engine
        self._settings = settings
        self._budget = budget
        self._axes = attention_axes(self._spec.attention, engine) if self._spec.wants_attention else None
        self._ledger = Ledger(schema.asked_arrays(self._spec))
        self._attributes = start_attributes(start, engine)
        self._rows: dict[str, StepRows] = {}
        self._prefill: PrefillMap | None = None
        self._flat: dict[str, dict[str, Any]] = {}
        self._numbers: dict[int, Numbers] = {}
        self._steps = 0
        """One past the highest step seen."""
        self._shown = 0
        """Rows that readers can see."""
        self._shown_queries = 0
        self._longest = 0
        """Keys of the longest row, once the last valid step is known."""
        self._written = 0
        self._stopped: str | None = None
        """Why no more arrays are stored."""
        self.over_budget = False
        """True if that was the store's budget."""
        self._state_limits()
        make_directory(directory)
        self._write_group(None)
        if start.prompt_token_ids:
            self._write_flat("prompt_token_id", "prompt_pos", np.array(start.prompt_token_ids, np.int32))

    @property
    def directory(self) -> Path:
        """Where the group is."""
        return self._directory

    @property
    def name(self) -> CaptureName:
        """Where in the store it is."""
        return CaptureName(self._start.trace_id, self._start.span_id)

    def step(self, record: StepRecord, payload: memoryview) -> None:
        """Store what one step brought."""
        step = record.step
        self._note_drops(record.dropped, step)
        if step is None:
            return
        self._numbers[step] = numbers_of(record)
        self._ledger.stored(NUMBERS, step)
        for item in record.arrays:
            self._put(step, item, payload)
        self._steps = max(self._steps, step + 1)
        self._show()

    def prompt_rows(self, record: ArrayRecord, payload: memoryview) -> None:
        """Store blocks of the prompt's own attention map."""
        self._note_drops(record.dropped, None)
        for item in record.arrays:
            block = self._take(item, payload, None)
            if block is None:
                continue
            prefill = self._prefill_map()
            slot, _, first, _ = item.start if len(item.start) == 4 else (-1, 0, 0, 0)
            if prefill is None or not prefill.fits(slot, first, block):
                self._ledger.drop(item.name, None, f"block {item.shape} at {item.start} does not fit the array")
            else:
                self._count(prefill.put(slot, first, block))
        self._show_queries()

    def end(self, end: GenerationEnd, status: str) -> None:
        """Finish: trim surplus rows, write the small arrays, say what is missing."""
        steps = end.output_tokens
        if status == "interrupted":
            self._ledger.state(EVERYTHING, f"all from step {steps} on", "the exporter process was stopped")
        self._shown = steps
        self._longest = max((int(row[KV_LEN]) for step, row in self._numbers.items() if step < steps), default=0)
        for rows in self._rows.values():
            rows.close(steps)
            rows.publish(steps, self._keys())
        if self._prefill is not None:
            self._prefill.close()
            self._prefill.publish(self._keys())
        self._write_small(end)
        layers = self._axes.layers if self._axes is not None else ()
        missing = self._ledger.missing(steps, self._prompt_seen(), end.cached_tokens, layers)
        self._attributes |= end_attributes(end, status, missing, self._ledger.dropped(steps))
        self._attributes["stored"] = self._stored()
        self._write_group(self._metadata())

    def interrupted(self, time_ns: int) -> None:
        """End without a GenerationEnd: everything that has come is kept."""
        start = self._start
        self.end(GenerationEnd(start.trace_id, start.span_id, time_ns, "aborted", "", self._steps), "interrupted")

    def abandon(self, reason: str) -> None:
        """The store cannot be written: give descriptors back and, if that much is possible, say so."""
        for rows in self._rows.values():
            rows.release()
        if self._prefill is not None:
            self._prefill.release()
        entry = {"array": EVERYTHING, "what": f"all from step {self._shown} on", "reason": reason}
        self._attributes |= {"complete": False, "closed": True, "status": "failed", "missing": [entry]}
        self._write_group(None)

    # -- rows --------------------------------------------------------------------------------------------------

    def _put(self, step: int, item: ArraySlice, payload: memoryview) -> None:
        row = self._take(item, payload, step)
        if row is None:
            return
        rows = self._rows.get(item.name) or self._new_rows(item.name, row)
        if rows is None or any(item.start) or not rows.fits(row):
            self._ledger.drop(item.name, step, f"row {item.shape} at {item.start} does not fit the array")
            return
        self._count(rows.put(step, row))
        self._ledger.stored(item.name, step)

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
        elif self._stopped is None:
            self._stopped = self._budget.refusal()
            self.over_budget = self._stopped is not None
        return self._stopped

    def _count(self, written: int) -> None:
        self._written += written
        self._budget.add(written)

    def _new_rows(self, name: str, row: Array) -> StepRows | None:
        """Create the array at its first row; None if the capture did not ask for it or the row cannot be one."""
        layout = self._layout(name, row)
        if layout is None:
            return None
        if "layer" in layout.dims:
            self._write_axes(layout.shard[1], layout.shard[2])
        rows = StepRows(self._directory, layout, self._settings.codec, self._keys())
        self._rows[name] = rows
        if self._shown:
            rows.publish(self._shown, self._keys())
        return rows

    def _layout(self, name: str, row: Array) -> ArrayLayout | None:
        spec = self._spec
        match name, row.shape:
            case schema.LOGITS, (vocab,) if spec.logits is not None:
                return schema.logits_layout(vocab, spec.logits.dtype)
            case schema.LOGITS_TOPK, (k,) if spec.logits is not None:
                return schema.logits_topk_layout(k, spec.logits.dtype)
            case schema.LOGITS_TOPK_ID, (k,) if spec.logits is not None:
                return schema.logits_topk_id_layout(k)
            case schema.ATTENTION, (layers, heads, _) if spec.attention is not None and self._is_axes(layers, heads):
                capacity = key_capacity(self._start, self._engine)
                return schema.attention_layout(layers, heads, self._start.prompt_tokens, capacity, spec.attention.dtype)
            case schema.ATTENTION_SUMMARY, (layers, heads, _) if self._is_axes(layers, heads):
                return schema.attention_summary_layout(layers, heads)
        return None

    def _is_axes(self, layers: int, heads: int) -> bool:
        return self._axes is None or (layers, heads) == (len(self._axes.layers), len(self._axes.heads))

    def _prefill_map(self) -> PrefillMap | None:
        spec, axes = self._spec.attention, self._axes
        wanted = spec is not None and spec.rows == "all" and axes is not None and self._start.prompt_tokens > 0
        if self._prefill is None and wanted:
            assert spec is not None
            assert axes is not None
            layers, heads, prompt = len(axes.layers), len(axes.heads), self._start.prompt_tokens
            layout = schema.attention_prefill_layout(layers, heads, prompt, spec.dtype)
            self._write_axes(layers, heads)
            self._prefill = PrefillMap(self._directory, layout, self._settings.codec, prompt)
            self._prefill.publish(self._keys())
        return self._prefill

    # -- what readers see --------------------------------------------------------------------------------------

    def _show(self) -> None:
        """Publish the steps that every array has in finished shards."""
        if not self._rows:
            return
        ready = min([rows.settle(self._steps) for rows in self._rows.values()])
        if ready > self._shown:
            self._shown = ready
            for rows in self._rows.values():
                rows.publish(ready, self._keys())
            if self._prefill is not None:
                self._prefill.publish(self._keys())

    def _show_queries(self) -> None:
        if self._prefill is not None and self._prefill.ready() > self._shown_queries:
            self._shown_queries = self._prefill.ready()
            self._prefill.publish(self._keys())

    def _keys(self) -> int:
        """Size of `key_pos` while `_shown` rows can be seen: the longest row's keys, and at least the prompt."""
        return max(self._start.prompt_tokens + max(self._shown - 1, 0), self._longest, 1)

    # -- the end -----------------------------------------------------------------------------------------------

    def _write_small(self, end: GenerationEnd) -> None:
        for name, column in number_columns(self._numbers, end).items():
            number = schema.STEP_NUMBERS[name]
            self._write_flat(name, "step", column, number.fill, number.attributes)
        text = token_text(self._start, end) if self._settings.capture_text else None
        if text is not None:
            self._write_flat("token_bytes", "token_byte", text[0])
            self._write_flat("token_offset", "token_edge", text[1])

    def _write_axes(self, layers: int, heads: int) -> None:
        """Coordinate arrays `layer` and `head`: the model's indices."""
        if "layer" in self._flat:
            return
        axes = self._axes
        self._write_flat("layer", "layer", np.array(axes.layers if axes else range(layers), np.int32))
        self._write_flat("head", "head", np.array(axes.heads if axes else range(heads), np.int32))

    def _write_flat(
        self, name: str, dim: str, values: Array, fill: float = 0, attributes: dict[str, Any] | None = None
    ) -> None:
        self._flat[name] = write_flat(self._directory, name, dim, values, fill, attributes)

    def _write_group(self, arrays: dict[str, dict[str, Any]] | None) -> None:
        write_json(self._directory / "zarr.json", schema.group_metadata("capture", self._attributes, arrays))

    def _metadata(self) -> dict[str, dict[str, Any]]:
        big = {name: rows.metadata for name, rows in self._rows.items()}
        if self._prefill is not None:
            big[schema.ATTENTION_PREFILL] = self._prefill.metadata
        return {**big, **self._flat}

    def _stored(self) -> dict[str, dict[str, Any]]:
        """Per array: what precision the values had, have, and what that cost."""
        source = self._engine.dtype if self._engine is not None else "unknown"
        out: dict[str, dict[str, Any]] = {}
        for name, metadata in self._metadata().items():
            if name in (schema.LOGITS, schema.LOGITS_TOPK):
                overflow = self._rows[name].overflow
                out[name] = {"source_dtype": source, "stored_dtype": metadata["data_type"], "overflow": overflow}
            elif name in (schema.ATTENTION, schema.ATTENTION_PREFILL):
                out[name] = {"source_dtype": "float32", "stored_dtype": metadata["data_type"]}
        return out

    # -- what is missing ---------------------------------------------------------------------------------------

    def _note_drops(self, dropped: tuple[str, ...], step: int | None) -> None:
        for entry in dropped:
            name, _, cause = entry.partition(": ")
            self._ledger.drop(name, step, cause)

    def _state_limits(self) -> None:
        """Book what this engine cannot give at all."""
        engine = self._engine
        if engine is not None and engine.logits_unsupported and self._spec.logits is not None:
            self._ledger.state(schema.LOGITS, "all steps", engine.logits_unsupported)
        if engine is not None and engine.attention_unsupported and self._spec.wants_attention:
            self._ledger.state(schema.ATTENTION, "all layers", engine.attention_unsupported)
        for layer in self._axes.refused if self._axes is not None else ():
            self._ledger.state(schema.ATTENTION, f"layer {layer.index}", layer.unsupported or "")

    def _prompt_seen(self) -> NDArray[np.bool_] | None:
        """bool [layer, prompt row] received; None unless the prompt's map was asked for."""
        if self._spec.attention is None or self._spec.attention.rows != "all":
            return None
        if self._prefill is not None:
            return self._prefill.seen
        return np.zeros((1, self._start.prompt_tokens), dtype=np.bool_)
