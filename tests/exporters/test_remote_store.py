"""Captures into a bucket of a real S3 server, and back."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from obstore.store import from_url

from tests.exporters.buckets import SECONDS, Export, export, objects
from tests.exporters.seaweed import Seaweed
from tests.exporters.synthetic import NOTHING, Synthetic, engine, write
from tests.exporters.test_zarr_writer import check
from tracer import find_captures, open_capture, remote
from tracer.config import Settings, spool_directory
from tracer.errors import CaptureNotFoundError, MissingExtraError, SettingsError


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_bucket_holds_what_a_directory_would(exporter: Export, bucket: str, tmp_path: Path) -> None:
    generation = Synthetic(steps=70, prompt=300)
    out = exporter()
    export(out, generation)
    assert out.force_flush(SECONDS)
    write(tmp_path / "local", generation)
    stored = objects(bucket)
    assert stored.pop(f"index/{generation.span_id}/{generation.trace_id}") == b""
    local = files(tmp_path / "local")
    assert local.pop("index.sqlite"), "a bucket needs none"
    assert stored == local
    spool = spool_directory(Settings(store=bucket, spool=str(tmp_path / "spool")))
    assert sorted(path.name for path in spool.iterdir()) == [".lock", "zarr.json"]
    assert spool.stat().st_mode & 0o777 == 0o700
    assert out.pending() == frozenset()
    assert (out.lost, out.problem) == ({}, None)


def test_our_reader_reads_the_url(exporter: Export, bucket: str) -> None:
    generation, other = Synthetic(steps=70, prompt=300), Synthetic(span_id="c" * 16)
    out = exporter()
    export(out, generation, other)
    assert out.force_flush(SECONDS)
    path = f"{bucket}/{generation.trace_id}/{generation.span_id}"
    for found in (
        open_capture(bucket, generation.span_id),
        open_capture(f"{bucket}/", generation.span_id.upper()),
        open_capture(bucket, f"{generation.trace_id}/{generation.span_id}"),
        open_capture(path),
    ):
        assert (found.location, found.step_index, found.complete) == (path, None, True)
    found = open_capture(bucket, generation.step_span(69))
    assert (found.location, found.step_index) == (path, 69)
    check(generation, lambda name: found.to_xarray()[name].to_numpy())
    np.testing.assert_array_equal(found.row(step=7, layer=1, head=1), generation.rows[7][1, 1])
    assert {entry.path for entry in find_captures(bucket)} == {path, f"{bucket}/{other.trace_id}/{other.span_id}"}
    for wanted in ("d" * 16, "d" * 32, f"{'d' * 32}/{'d' * 16}"):
        with pytest.raises(CaptureNotFoundError, match="hold"):
            open_capture(bucket, wanted)
    with pytest.raises(CaptureNotFoundError, match="no capture at"):
        open_capture(f"{path[:-1]}0")
    place = remote.locate(bucket)
    place.bucket.delete(place.join(remote.index_key(generation.span_id, generation.trace_id)))
    assert open_capture(bucket, generation.span_id).location == path, "copied without the index"


def test_a_stranger_reads_it_with_plain_libraries(exporter: Export, seaweed: Seaweed, bucket: str) -> None:
    generation = Synthetic(steps=70, prompt=300)
    out = exporter()
    export(out, generation)
    assert out.force_flush(SECONDS)
    url = f"{bucket}/{generation.trace_id}/{generation.span_id}"
    store = zarr.storage.ObjectStore(from_url(url, client_options={"allow_http": True}), read_only=True)
    group = zarr.open_group(store, mode="r")
    check(generation, lambda name: np.asarray(group[name]))
    data = xr.open_zarr(store, chunks=None)
    check(generation, lambda name: data[name].to_numpy())
    root = zarr.storage.ObjectStore(from_url(bucket, client_options={"allow_http": True}), read_only=True)
    with pytest.warns(UserWarning, match="Object at index is not recognized"):  # As about a directory's `spans`.
        tree = xr.open_datatree(root, engine="zarr", chunks=None, consolidated=False)  # type: ignore[arg-type]
    assert [node.path for node in tree.leaves if "logits" in node] == [f"/{generation.trace_id}/{generation.span_id}"]


def test_a_large_shard_goes_up_in_parts(exporter: Export, bucket: str, tmp_path: Path) -> None:
    generation = Synthetic(steps=3, prompt=1000, layers=12, heads=8)
    out = exporter(codec="none")
    export(out, generation)
    assert out.force_flush(SECONDS)
    write(tmp_path / "local", generation, codec="none")
    large = {name: data for name, data in files(tmp_path / "local").items() if len(data) > 2 * 8 * 2**20}
    assert large
    place = remote.locate(bucket)
    for name, data in large.items():
        parts = -(-len(data) // (8 * 2**20))
        assert place.bucket.head(place.join(name))["e_tag"].endswith(f'-{parts}"'), "S3 counts the parts in the tag"
        assert bytes(place.bucket.get(place.join(name)).bytes()) == data


def test_urls_that_are_no_store_are_named(tmp_path: Path) -> None:
    for url in ("s4://bucket/x", "s3:///x"):
        with pytest.raises(SettingsError, match=r"s3://bucket/prefix"):
            open_capture(url, "a" * 16)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tensorspan\[s3\]'"):
        open_capture("s3://never-seen/x", "a" * 16)


def test_nothing_is_sent_before_a_capture_is_closed(exporter: Export, bucket: str) -> None:
    generation, out = Synthetic(steps=2), exporter()
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(*generation.step(0))
    assert out.force_flush(SECONDS)
    assert objects(bucket) == {}
    assert find_captures(bucket) == []
    out.export(generation.end(1), NOTHING)
    assert out.force_flush(SECONDS)
    assert len(find_captures(bucket)) == 1


def test_a_capture_that_another_exporter_sends_is_waited_for(exporter: Export, bucket: str) -> None:
    generation, out = Synthetic(), exporter()
    assert out.remote is not None
    path = generation.path(out.remote.spool.root)
    *records, end = generation.records()
    for record, payload in records:
        out.export(record, payload)
    with contextlib.ExitStack() as held:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        held.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX)
        out.export(*end)
        assert not out.force_flush(0.3)
        assert out.pending() == {generation.span_id}
    assert out.force_flush(SECONDS)
    assert open_capture(bucket, generation.span_id).complete


def test_a_whole_bucket_may_be_the_store(exporter: Export, seaweed: Seaweed) -> None:
    generation, out = Synthetic(), exporter(store="s3://whole-bucket")
    export(out, generation)
    assert out.force_flush(SECONDS)
    assert open_capture("s3://whole-bucket", generation.span_id).complete
    assert [entry.span_id for entry in find_captures("s3://whole-bucket/")] == [generation.span_id]
