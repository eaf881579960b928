"""A bucket for the tests of remote stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exporters.zarr_writer import ZarrExporter
from tests.exporters.buckets import Export
from tests.exporters.seaweed import BUCKET, Seaweed
from tracer.config import Settings


@pytest.fixture
def bucket(seaweed: Seaweed, tmp_path: Path) -> str:
    """The URL of a store that nobody else uses."""
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def exporter(bucket: str, tmp_path: Path) -> Iterator[Export]:
    """`exporter(**settings)` for the bucket, with a spool in the temporary folder."""
    made: list[ZarrExporter] = []

    def make(**settings: Any) -> ZarrExporter:
        out = ZarrExporter(Settings(**{"store": bucket, "spool": str(tmp_path / "spool"), **settings}))
        made.append(out)
        return out

    yield make
    for out in made:
        out.shutdown(0.0)
