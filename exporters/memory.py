"""Keeps records in lists: for tests and notebooks."""

from __future__ import annotations

from typing import Any, TypeVar

from numpy.typing import NDArray

from exporters.payload import view_array
from tracer.records import ArrayRecord, Record, StepRecord

__all__ = ["MemoryExporter"]

Array = NDArray[Any]
Kind = TypeVar("Kind", bound=Record)


class MemoryExporter:
    """An exporter whose output is `items`; it grows without bound."""

    def __init__(self, settings: object = None) -> None:
        self.items: list[tuple[Record, dict[str, Array]]] = []
        """Each record with copies of its arrays by name."""

    def export(self, record: Record, payload: memoryview) -> None:
        """Keep `record` and copy its arrays out of `payload`."""
        slices = record.arrays if isinstance(record, StepRecord | ArrayRecord) else ()
        self.items.append((record, {item.name: view_array(item, payload).copy() for item in slices}))

    def force_flush(self, timeout_s: float) -> bool:
        """Nothing is ever held back."""
        return True

    def pending(self) -> tuple[str, ...]:
        """Items are where they are found at once."""
        return ()

    def shutdown(self, timeout_s: float) -> bool:
        """Items stay."""
        return True

    def of(self, kind: type[Kind]) -> list[Kind]:
        """The records of one kind, in order."""
        return [record for record, _ in self.items if isinstance(record, kind)]
