"""Damaged captures: the reader gives right values or one of its own errors, never another library's."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tracer import cli
from tracer.errors import TensorspanError
from tracer.reader import Capture, find_captures, open_capture

DATA = Path(__file__).parent / "data"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STORES = ("golden-v1", "golden-v1-qk")
FILES = [(name, str(path.relative_to(DATA / name))) for name in STORES for path in sorted((DATA / name).rglob("*.*"))]
SHARDS = [(name, path) for name, path in FILES if path.count(".") > 1 and "zarr.json" not in path]
METADATA = [(name, path) for name, path in FILES if path.endswith("zarr.json")]
QUICK = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # An example is 30 ms: shrinking one would take minutes.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ABSENT = ("this capture", "was not stored", "not in this capture", "exists in other layers")
"""What a documented KeyError says: the capture does not hold that."""


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, float, bytes]:
    """How, at which part of the file, and with which bytes."""
    how = draw(st.sampled_from(["flip", "cut", "extend", "replace", "remove", "insert"]))
    return how, draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=8))


def damage(data: bytes, how: str, where: float, new: bytes) -> bytes | None:
    at = int(where * len(data))
    match how:
        case "flip":
            return data[:at] + bytes([data[at] ^ (new[0] or 1)]) + data[at + 1 :]
        case "cut":
            return data[:at]
        case "extend":
            return data + new
        case "replace":
            return data[:at] + new + data[at + len(new) :]
        case "insert":
            return data[:at] + new + data[at:]
    return None


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    for name in STORES:
        shutil.copytree(DATA / name, root / name)
    return root


@contextmanager
def damaged(file: Path, how: str, where: float, new: bytes) -> Iterator[None]:
    whole = file.read_bytes()
    bad = damage(whole, how, where, new)
    file.unlink() if bad is None else file.write_bytes(bad)
    try:
        yield
    finally:
        file.write_bytes(whole)


def looked(read: Any) -> Any:
    """The value, or None for an error that a caller is told to expect."""
    try:
        return read()
    except TensorspanError:
        return None
    except KeyError as error:
        if not any(words in str(error) for words in ABSENT):
            raise
        return None


def everything(store: Path) -> dict[str, Any]:
    looked(lambda: find_captures(store))
    looked(lambda: open_capture(store, f"f{1:015x}"))
    capture: Capture | None = looked(lambda: open_capture(store, SPAN))
    if capture is None:
        return {}
    out = {
        "tokens": looked(lambda: capture.tokens),
        "steps": looked(lambda: capture.steps),
        "text": looked(lambda: capture.text),
        "logits": looked(lambda: np.asarray(capture.logits)),
        "row": looked(lambda: capture.row(step=1, layer=1, head=0)),
        "topk": looked(lambda: capture.topk(2, 3)),
        "attention": looked(lambda: np.asarray(capture.attention[1])),
        "prefill": looked(lambda: np.asarray(capture.attention_prefill[1])),
        "others": looked(lambda: {str(name): item.to_numpy() for name, item in capture.to_xarray().data_vars.items()}),
        "repr": looked(lambda: repr(capture)),
    }
    return {name: value for name, value in out.items() if value is not None}


@QUICK
@given(st.sampled_from(SHARDS), damages())
def test_a_damaged_shard_never_gives_wrong_values(stores: Path, file: tuple[str, str], how: Any) -> None:
    store = stores / file[0]
    truth = everything(store)
    with damaged(store / file[1], *how):
        seen = everything(store)
    if how[0] != "remove":  # A shard that is not there holds nothing, as the format has it.
        for name in {"logits", "row", "attention", "prefill", "others"} & set(seen):
            np.testing.assert_equal(seen[name], truth[name], err_msg=name)
    assert seen["text"] == truth["text"]


@settings(QUICK, max_examples=25)
@given(st.sampled_from(FILES), damages())
def test_any_damaged_file_ends_in_values_or_in_our_errors(stores: Path, file: tuple[str, str], how: Any) -> None:
    with damaged(stores / file[0] / file[1], *how):
        everything(stores / file[0])


@settings(QUICK, max_examples=25)
@given(st.sampled_from(METADATA), damages())
def test_damaged_metadata_end_in_values_or_in_our_errors(stores: Path, file: tuple[str, str], how: Any) -> None:
    with damaged(stores / file[0] / file[1], *how):
        everything(stores / file[0])


@settings(QUICK, max_examples=20)
@given(st.sampled_from(FILES), damages(), st.sampled_from(["list", "show", "tree"]), st.booleans())
@example(("golden-v1", f"{TRACE}/{SPAN}/zarr.json"), ("flip", 0.1, b"\x01"), "tree", False)
def test_the_command_says_in_one_line_what_is_damaged(
    stores: Path, file: tuple[str, str], how: Any, command: str, as_json: bool
) -> None:
    store, said, shown = str(stores / file[0]), io.StringIO(), io.StringIO()
    arguments = {
        "list": ["list", store],
        "show": ["show", SPAN, "--store", store],
        "tree": ["tree", TRACE, "--store", store],
    }[command]
    with damaged(stores / file[0] / file[1], *how), redirect_stdout(shown), redirect_stderr(said):
        code = cli.main([*arguments, *["--json"] * as_json])
    assert code == 0 or said.getvalue().count("\n") == 1
