"""Captures without HTTP: `with capture(...)` around vLLM's offline `LLM`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from tracer import config
from tracer.context import ACTIVE, Inbound, parse_capture
from tracer.errors import CaptureUnavailableError, SettingsError, StoreError
from tracer.export import process_channel, socket_path
from tracer.remote import locate

__all__ = ["CaptureRun", "capture", "ready_store", "store_directory"]

FLUSH_SECONDS: Final = 60.0
"""How long leaving the block waits until every capture of the run is on disk, or in the bucket."""


@dataclass(frozen=True, slots=True)
class CaptureRun:
    """What a `capture(...)` block produced."""

    store: Path | str
    """The store's directory, or the URL of a bucket."""
    inbound: Inbound

    @property
    def span_ids(self) -> tuple[str, ...]:
        """Generation span IDs in the order the engine accepted them; `open_capture(run.store, span_id)` opens one."""
        return tuple(span_id for _, span_id in self.inbound.issued)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Directories of the captures, in the same order; StoreError if they are in a bucket."""
        if isinstance(self.store, str):
            raise StoreError(f"captures in {self.store} have no paths; use `locations`, or `store` and `span_ids`")
        return tuple(self.store / trace_id / span_id for trace_id, span_id in self.inbound.issued)

    @property
    def locations(self) -> tuple[str, ...]:
        """Paths or URLs of the captures, in the same order: `open_capture(run.locations[0])`."""
        return tuple(f"{self.store}/{trace_id}/{span_id}" for trace_id, span_id in self.inbound.issued)


@contextmanager
def capture(what: str = "logits, attention", store: str | Path = "captures", **settings: Any) -> Iterator[CaptureRun]:
    """Trace and capture every generation that this thread starts inside the block.

    what: the text of a `Trace-Capture` header; empty for spans alone. store: directory of the captures, or a bucket
    (`s3://bucket/prefix`). settings: any of `tracer.config.Settings`. The `LLM` must be made inside the block (or with
    TENSORSPAN_ENABLED=1 set before it), because its workers take their hooks when they start. Leaving the block waits
    until the captures can be opened.

    Raises CaptureRequestError if `what` is malformed or the model has no such tensors (at `generate`),
    CaptureUnavailableError if the engine cannot capture, StoreError if the store cannot be written or did not finish,
    SettingsError if engines of this process already run with other settings.
    """
    spec = parse_capture(what)
    ready = _settings({**settings, "store": str(store), "enabled": True})
    config.publish(ready)
    _register()
    root = ready.store if config.is_remote(ready.store) else Path(ready.store)
    run = CaptureRun(root, Inbound.offline(spec, sampled=ready.trace))
    token = ACTIVE.set(run.inbound)
    try:
        yield run
    finally:
        ACTIVE.reset(token)
    _finish(run, ready)


def _settings(wanted: dict[str, Any]) -> config.Settings:
    """The settings of this block; engines that are already hooked know only those they started with."""
    current, ready = config.load(), ready_store(config.load(wanted))
    if not current.socket:
        return replace(ready, socket=str(socket_path()))
    for item in fields(config.Settings):
        ours, theirs = getattr(ready, item.name), getattr(current, item.name)
        if ours != theirs:
            raise SettingsError(
                f"engines of this process were started with {item.name}={theirs!r}, so {item.name}={ours!r} cannot"
                " take effect; use the same value, or a new process"
            )
    return current


def ready_store(settings: config.Settings) -> config.Settings:
    """The settings with an absolute store that can be written: its directory, or the spool of a bucket, is made.

    A bucket is not asked: one that is away must not keep a server from starting. Raises StoreError for a directory
    that cannot be written, SettingsError for a URL that names no bucket, MissingExtraError without the extra `s3`.
    """
    if not config.is_remote(settings.store):
        return replace(settings, store=str(store_directory(settings.store)))
    locate(settings.store)
    spool = Path(settings.spool).expanduser().resolve() if settings.spool else ""
    ready = replace(settings, store=settings.store.rstrip("/"), spool=str(spool))
    store_directory(config.spool_directory(ready), "spool", "TENSORSPAN_SPOOL, --spool")
    return ready


def store_directory(store: str | Path, what: str = "store", names: str = "TENSORSPAN_STORE, --store") -> Path:
    """The absolute directory, made if it is not there; StoreError if it cannot be written."""
    root = config.local_path(str(store)).expanduser()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = root / f".tensorspan-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(
            f"the {what} {root} cannot be written: {error.strerror}; choose another {what} ({names})"
        ) from error
    return root.resolve()


def _register() -> None:
    """Hook this process even if vLLM loaded its plugins before it was enabled."""
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "tensorspan"]
    if not found:
        raise CaptureUnavailableError("the vLLM plugin of tensorspan is not installed; reinstall the distribution")
    found[0].load()()


def _finish(run: CaptureRun, settings: config.Settings) -> None:
    if not run.span_ids or process_channel(settings).flush(run.span_ids, FLUSH_SECONDS):
        return
    what = f"captures in {run.store} were not finished within {FLUSH_SECONDS:.0f} s; see the log above"
    if config.is_remote(settings.store):
        what += f"; what the bucket has not got waits in {config.spool_directory(settings)} and goes up later"
    raise StoreError(what)
