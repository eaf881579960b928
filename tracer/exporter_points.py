"""Exporters by entry-point name, in the group `tensorspan.exporters`: nothing in `tracer` imports them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from tracer import config
from tracer.config import Settings
from tracer.errors import StoreError
from tracer.export import Exporter

__all__ = ["exporter_names", "load_exporters", "preload_exporters", "recover_store"]

LOG: Final = logging.getLogger("tensorspan.exporter")
GROUP: Final = "tensorspan.exporters"


def exporter_names() -> tuple[str, ...]:
    """Entry points in use: arrays to Zarr, spans and metrics unless `OTEL_*` asks for none, logs if it does."""
    wanted = {"otel": not config.spans_disabled(), "metrics": config.metrics_counted()}
    wanted["logs"] = config.signal_protocol("LOGS") is not None
    return ("zarr", *(name for name, use in wanted.items() if use))


def preload_exporters(names: Sequence[str]) -> None:
    """Import them and their libraries, for the processes that are forked from this one."""
    for point in _points(names):
        with contextlib.suppress(Exception):  # The exporter process says what is wrong with it.
            point.load()


def load_exporters(settings: Settings, names: Sequence[str]) -> list[Exporter]:
    """The exporters of those entry-point names; one that cannot start is left out and named in the log."""
    found = {point.name: point for point in _points(names)}
    exporters: list[Exporter] = []
    for name in names:
        try:
            exporters.append(found[name].load()(settings))
        except Exception:
            LOG.exception("tensorspan: exporter %r cannot start; the others go on", name)
    return exporters


def _points(names: Sequence[str]) -> list[EntryPoint]:
    return [point for point in entry_points(group=GROUP) if point.name in names]


def recover_store(settings: Settings) -> list[Path]:
    """Close what killed writers left in `settings.store`; returns the captures that are closed now.

    Raises StoreError if one of them could not be closed, and MissingExtraError without the writer's libraries.
    """
    [point] = _points(("zarr",))
    writer = point.load()(settings)
    closed: list[Path] = writer.recover()
    if writer.problem is not None:
        raise StoreError(writer.problem)
    return closed
