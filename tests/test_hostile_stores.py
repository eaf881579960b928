"""Stores that somebody made to harm their reader: sizes that are lies, links out of the store, text that commands."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest

from tests.exporters.synthetic import SPAN, TRACE, Synthetic, write
from tracer import cli
from tracer.bounded_codecs import blosc_size, zstd_size
from tracer.errors import CaptureNotFoundError, DamagedError, FormatError
from tracer.printable import printable
from tracer.prune import TRASH, plan, prune
from tracer.reader import find_captures, open_capture
from tracer.store_files import stored_captures

GOLDEN = Path(__file__).parent / "data" / "golden-v1"
EXABYTE = 10**18
MEGABYTES = 50 << 20


@pytest.fixture
def store(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "store")
    return tmp_path / "store"


def capture_of(store: Path) -> Path:
    return store / TRACE / SPAN


def rewrite(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the capture's group: attributes and the arrays' metadata, which are inline."""
    path = capture_of(store) / "zarr.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def array(content: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = content["consolidated_metadata"]["metadata"][name]
    return found


def read_small(store: Path) -> None:
    capture = open_capture(store, SPAN)
    assert capture.steps
    assert capture.tokens
    assert capture.topk(0)


# -- sizes ---------------------------------------------------------------------------------------------------------


def huge_inner_chunk(content: dict[str, Any]) -> None:
    logits = array(content, "logits")
    logits["shape"] = [3, EXABYTE]
    logits["chunk_grid"]["configuration"]["chunk_shape"] = [64, EXABYTE]
    logits["codecs"][0]["configuration"]["chunk_shape"] = [1, EXABYTE]


def many_chunks(content: dict[str, Any]) -> None:
    array(content, "logits")["chunk_grid"]["configuration"]["chunk_shape"] = [EXABYTE, 16]


def many_steps(content: dict[str, Any]) -> None:
    for name in ("logits", "attention", "attention_summary"):
        array(content, name)["shape"][0] = EXABYTE
    for name, each in list(content["consolidated_metadata"]["metadata"].items()):
        if each["dimension_names"] == ["step"]:
            del content["consolidated_metadata"]["metadata"][name]


def long_column(content: dict[str, Any]) -> None:
    ids = array(content, "prompt_token_id")
    ids["shape"] = [EXABYTE]
    ids["chunk_grid"]["configuration"]["chunk_shape"] = [EXABYTE]


def split_column(content: dict[str, Any]) -> None:
    array(content, "prompt_token_id")["shape"] = [EXABYTE]


def foreign_codec(content: dict[str, Any]) -> None:
    array(content, "prompt_token_id")["codecs"] += [{"name": "gzip", "configuration": {"level": 9}}]


def wide_type(content: dict[str, Any]) -> None:
    array(content, "prompt_token_id")["data_type"] = "complex128"
    array(content, "prompt_token_id")["fill_value"] = [0.0, 0.0]


@pytest.mark.parametrize(
    "change", [huge_inner_chunk, many_chunks, many_steps, long_column, split_column, foreign_codec, wide_type]
)
def test_metadata_that_declare_what_no_capture_has_are_refused_before_memory_is_taken(
    store: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite(store, change)
    tracemalloc.start()
    with pytest.raises(DamagedError, match=r"is damaged: .*copy it again"):
        read_small(store)
    assert tracemalloc.get_traced_memory()[1] < MEGABYTES
    tracemalloc.stop()


def bad(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["attributes"].update({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_tokens", EXABYTE),
        ("prompt_tokens", True),
        ("output_tokens", -1),
        ("start_ns", EXABYTE * EXABYTE),
        ("regions", [{"role": "user", "start": 0, "end": EXABYTE}]),
        ("regions", [{"role": "user", "start": 0, "end": 1, "more": 1}]),
        ("missing", ["all"]),
        ("engine", {"layers": [{}]}),
        ("capture", {"logits": "all"}),
        ("model", None),
        ("trace_id", "../" * 10 + "00"),
        ("span_id", f"{SPAN}\n"),
        ("span_id", SPAN.upper()),
    ],
)
def test_attributes_out_of_bounds_are_refused_and_listed_as_damaged(store: Path, name: str, value: Any) -> None:
    rewrite(store, bad(name, value))
    with pytest.raises(DamagedError, match=name):
        open_capture(store, SPAN)
    [entry] = find_captures(store)
    assert (entry.status, entry.trace_id, entry.span_id) == ("damaged", TRACE, SPAN)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[1]", b'{"attributes": [1]}', b'{"a": ' + b"9" * 10_000 + b"}"])
def test_metadata_that_are_no_group_are_not_a_capture(store: Path, content: bytes) -> None:
    (capture_of(store) / "zarr.json").write_bytes(content)
    assert find_captures(store) == []
    with pytest.raises(FormatError):
        open_capture(capture_of(store))


def bomb(codec: str, size: int) -> bytes:
    data = np.zeros(size, np.uint8)
    packed: bytes = numcodecs.Blosc("lz4").encode(data) if codec == "blosc" else numcodecs.Zstd(19).encode(data)
    return bytes(packed)


def shard(chunk: bytes, entries: int) -> bytes:
    """A shard whose first chunk is `chunk`, all checksums right."""
    body = chunk + struct.pack("<I", google_crc32c.value(chunk))
    index = struct.pack("<QQ", 0, len(body)) + b"\xff" * 16 * (entries - 1)
    return body + index + struct.pack("<I", google_crc32c.value(index))


@pytest.mark.parametrize("codec", ["blosc", "zstd"])
def test_a_chunk_that_would_become_gigabytes_is_not_decoded(store: Path, codec: str) -> None:
    def change(content: dict[str, Any]) -> None:
        codecs = array(content, "logits")["codecs"][0]["configuration"]["codecs"]
        if codec == "zstd":
            codecs[1] = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}

    rewrite(store, change)
    chunk = bomb(codec, 200 << 20)
    (capture_of(store) / "logits" / "c.0.0").write_bytes(shard(chunk, 64))
    capture = open_capture(store, SPAN)
    tracemalloc.start()
    for read in (lambda: capture.topk(0), lambda: np.asarray(capture.logits[0]), lambda: np.asarray(capture.logits)):
        with pytest.raises(DamagedError, match=f"becomes {200 << 20} bytes"):
            read()
    assert tracemalloc.get_traced_memory()[1] < MEGABYTES
    tracemalloc.stop()


def test_sizes_are_read_as_the_codecs_write_them() -> None:
    for size in (1, 255, 256, 300, 65_791, 65_792, 1 << 20):
        data = np.arange(size, dtype=np.uint8)
        assert blosc_size(numcodecs.Blosc("lz4").encode(data)[:32]) == size
        assert zstd_size(numcodecs.Zstd(1).encode(data)[:32]) == size
    for head in (b"", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\x00\x00" + b"\0" * 20, zlib.compress(b"x")):
        assert zstd_size(head) == -1
    assert blosc_size(b"\2\1") == -1


# -- links ---------------------------------------------------------------------------------------------------------


def test_a_walk_does_not_follow_links_out_of_the_store(store: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", Synthetic(trace_id="e" * 32, span_id="a" * 16))
    (store / ("e" * 32)).symlink_to(outside / ("e" * 32))
    (store / TRACE / ("a" * 16)).symlink_to(outside / ("e" * 32) / ("a" * 16))
    assert [entry.span_id for entry in find_captures(store)] == [SPAN]
    assert [name.span_id for name in stored_captures(store)] == [SPAN]
    for name in ("a" * 16, f"{'e' * 32}/{'a' * 16}", f"{TRACE}/{'a' * 16}"):
        with pytest.raises(CaptureNotFoundError):
            open_capture(store, name)


def test_files_of_a_capture_that_are_links_or_pipes_are_not_read(store: Path, tmp_path: Path) -> None:
    secret, path = tmp_path / "secret", capture_of(store)
    shutil.copy(path / "prompt_token_id" / "c.0", secret)
    (path / "prompt_token_id" / "c.0").unlink()
    (path / "prompt_token_id" / "c.0").symlink_to(secret)
    with pytest.raises(DamagedError, match=r"prompt_token_id/c\.0 is damaged: it is a link"):
        _ = open_capture(store, SPAN).tokens
    shutil.move(path / "logits", tmp_path / "logits")
    (path / "logits").symlink_to(tmp_path / "logits")
    with pytest.raises(DamagedError, match="logits is damaged: it is a link"):
        _ = open_capture(store, SPAN).topk(0)
    (path / "span_id" / "c.0").unlink()
    os.mkfifo(path / "span_id" / "c.0")
    with pytest.raises(DamagedError, match="a pipe"):
        _ = open_capture(store, SPAN).steps
    with pytest.raises(CaptureNotFoundError):
        open_capture(store, "00000000000000ff")
    (path / "zarr.json").unlink()
    os.mkfifo(path / "zarr.json")
    assert find_captures(store) == []


def test_prune_never_removes_through_a_link(store: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", Synthetic(trace_id="e" * 32, span_id="a" * 16))
    spans, trash = tmp_path / "spans", tmp_path / "trash"
    for folder in (spans, trash):
        folder.mkdir()
        (folder / "1-x.jsonl").write_text("{}\n")
        os.utime(folder / "1-x.jsonl", (0, 0))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(store)}
    (store / ("e" * 32)).symlink_to(outside / ("e" * 32))
    (store / TRACE / ("a" * 16)).symlink_to(outside / ("e" * 32) / ("a" * 16))
    (store / "spans").symlink_to(spans)
    (store / TRASH).symlink_to(trash)
    (capture_of(store) / "extra").symlink_to(spans)
    removed = prune(store, plan(store, keep_s=0, max_bytes=0).remove)
    assert [item.path for item in removed] == [capture_of(store)]
    assert not capture_of(store).exists()
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(store)} == before


def test_prune_takes_a_damaged_capture_by_the_age_of_its_files(store: Path) -> None:
    rewrite(store, lambda content: content["attributes"].pop("start_ns"))
    rewrite(store, bad("closed", "no"))
    assert plan(store, keep_s=0, max_bytes=None).remove == []
    for file in capture_of(store).rglob("*"):
        os.utime(file, (1, 1))
    assert [item.path for item in plan(store, keep_s=86_400, max_bytes=None).remove] == [capture_of(store)]


# -- text ----------------------------------------------------------------------------------------------------------

TITLE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\ud800"


def test_control_characters_are_shown_not_obeyed() -> None:
    assert printable("plain ünïcode 日本\n\tyes") == "plain ünïcode 日本\n\tyes"
    shown = printable(TITLE)
    assert shown == r"\u001b]0;owned\u0007\u001b[2J\u009b31m\u202e\ud800"
    assert printable(shown) == shown


@pytest.mark.parametrize("command", [["list"], ["show", SPAN], ["tree", TRACE], ["tree"]])
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("terminal", [False, True])
def test_the_command_prints_no_escape_of_a_capture(
    store: Path,
    command: list[str],
    as_json: bool,
    terminal: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rewrite(store, bad("model", f"m{TITLE}"))
    rewrite(store, bad("error", f"e{TITLE}"))
    rewrite(store, bad("missing", [{"array": TITLE, "what": TITLE, "reason": TITLE}]))
    rewrite(store, bad("regions", [{"role": TITLE, "start": 0, "end": 5}]))
    raw = bytearray((capture_of(store) / "token_bytes" / "c.0").read_bytes())
    raw[:4] = b"\x1b[2J"
    (capture_of(store) / "token_bytes" / "c.0").write_bytes(raw)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    arguments = [*command, *([str(store)] if command == ["list"] else ["--store", str(store)])]
    assert cli.main([*arguments, *["--json"] * as_json]) == 0
    out = capsys.readouterr().out
    assert [part for part in ("\x1b]", "\x07", "\x1b[2J", "\x9b", "\u202e", "\ud800") if part in out] == []
    assert not as_json or json.loads(out)


def test_an_error_prints_no_escape_of_its_argument(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", f"{SPAN}\x1b[2J", "--store", str(store)]) == 1
    assert "\x1b" not in capsys.readouterr().err
