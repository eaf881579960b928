"""What tests of remote stores share: writing generations to a bucket, and what lies in it."""

from __future__ import annotations

from collections.abc import Callable

from exporters.zarr_writer import ZarrExporter
from tests.exporters.synthetic import Synthetic, wipe
from tracer import remote

SECONDS = 60.0

Export = Callable[..., ZarrExporter]


def export(out: ZarrExporter, *generations: Synthetic) -> None:
    for generation in generations:
        for record, payload in generation.records():
            out.export(record, payload)
            wipe(payload)


def objects(url: str) -> dict[str, bytes]:
    """Every object below a URL, by its path."""
    place = remote.locate(url)
    keys = [item["path"] for page in place.bucket.list(prefix=f"{place.key}/") for item in page]
    return {key.removeprefix(f"{place.key}/"): bytes(place.bucket.get(key).bytes()) for key in keys}
