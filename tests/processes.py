"""Finding the processes of ours that nobody has a handle of."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

__all__ = ["exporter_of_socket", "exporter_of_store", "parent_of"]

PATIENCE: Final = 600
"""Looks, 50 ms apart."""


def exporter_of_socket(path: Path | str) -> int:
    """The exporter process behind that socket; its parent is its keeper."""
    return _exporter(lambda entry: str(path).encode() in (entry / "cmdline").read_bytes().split(b"\0"))


def exporter_of_store(store: Path) -> int:
    """The exporter process that writes to `store`; its parent is its keeper."""
    wanted = f"TENSORSPAN_STORE={store}".encode()
    return _exporter(lambda entry: wanted in (entry / "environ").read_bytes().split(b"\0"))


def parent_of(process: int) -> int:
    """Its parent's process ID."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _exporter(is_wanted: Callable[[Path], bool]) -> int:
    """The child among keeper and child; waited for while there is a keeper."""
    for _ in range(PATIENCE):
        found = dict(_ours(is_wanted))
        children = [child for child, parent in found.items() if parent in found]
        if children or not found:
            break
        threading.Event().wait(0.05)
    assert len(children) == 1, f"{children} are exporter processes, of {found}"
    return children[0]


def _ours(is_wanted: Callable[[Path], bool]) -> Iterator[tuple[int, int]]:
    """Process and parent of every keeper and exporter that `is_wanted`."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and b"\0tracer.configure\0" in (entry / "cmdline").read_bytes()
                and is_wanted(entry)
            ):
                yield int(entry.name), parent_of(int(entry.name))
