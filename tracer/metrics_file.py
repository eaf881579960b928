"""The file by which the exporter process tells the API processes what `/metrics` should add.

JSON: a list of families as the Prometheus exposition format knows them, each `{name, type, unit, help, samples}` with
samples `[suffix, labels, value, exemplar]`; an exemplar is `[labels, value, time in s]` or null. It is replaced as a
whole, so that a reader sees one moment of it; any API process may read it, and one scrape asks one of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["metrics_file", "read_metrics", "write_metrics"]


def metrics_file(socket: Path) -> Path:
    """The file of the exporter process that listens on `socket`."""
    return socket.with_name(f"{socket.stem}.metrics.json")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The families; none if no exporter process has written any."""
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return found


def write_metrics(path: Path, families: list[dict[str, Any]]) -> None:
    """Replace the file; readable by this user alone."""
    temporary = path.with_suffix(".tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
        json.dump(families, out, separators=(",", ":"))
    temporary.replace(path)
