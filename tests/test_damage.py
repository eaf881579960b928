"""Damaged captures: a reader gives what was written or an error of ours, whatever happened to one of the files."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exporters.synthetic import Synthetic, write
from tracer import Capture, open_capture
from tracer.errors import DamagedError, TensorspanError
from tracer.records import AttentionSpec, CaptureSpec, LogitsSpec

ROUNDS = 25
SPEC = CaptureSpec(LogitsSpec(), AttentionSpec())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture as today's writer leaves it."""
    work = Synthetic(steps=4, prompt=5, vocab=16, layers=2, heads=2, spec=SPEC)
    return write(tmp_path_factory.mktemp("sound"), work)


def everything(cap: Capture) -> list[Any]:
    """What the reader's own methods give."""
    out: list[Any] = [cap.tokens, cap.text, cap.complete, cap.missing, repr(cap)]
    out += [str(cap.steps), [cap.topk(step, 3) for step in range(cap.num_steps)]]
    rows = [cap.row(step=step, layer=layer, head=1) for step in range(cap.num_steps) for layer in cap.attention]
    return [*map(repr, out), [row.tobytes() for row in rows]]


def hurt(data: bytes, dice: random.Random) -> bytes:
    """One bit flipped, a tail cut off or grown, or a few bytes wiped."""
    changed = bytearray(data)
    match dice.choice(["flip", "cut", "grow", "wipe"]):
        case "flip" if changed:
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        case "cut":
            del changed[dice.randrange(len(changed) + 1) :]
        case "grow":
            changed += dice.randbytes(dice.randrange(1, 40))
        case _:
            at = dice.randrange(len(changed) + 1)
            changed[at : at + 8] = bytes(8)
    return bytes(changed)


def values(sound: Path) -> list[Path]:
    """The files that hold values, and not what describes them."""
    return sorted(path for path in sound.rglob("c.*") if path.is_file())


@pytest.mark.parametrize("seed", range(3))
def test_damaged_values_are_never_given_out(seed: int, sound: Path, tmp_path: Path) -> None:
    dice, want = random.Random(seed), everything(open_capture(sound))
    refusals = []
    for number in range(ROUNDS):
        copy = tmp_path / f"{number:032x}" / sound.name
        shutil.copytree(sound, copy)
        file = copy / dice.choice(values(sound)).relative_to(sound)
        file.write_bytes(hurt(file.read_bytes(), dice))
        try:
            got = everything(open_capture(copy))
        except TensorspanError as error:
            refusals.append(str(copy) in str(error))
            continue
        assert got[0] == want[0], file
        assert [part for part in got[1:] if str(copy) not in str(part)] == [
            part for part in want[1:] if str(sound) not in str(part)
        ], file
    assert refusals
    assert all(refusals), "an error names the file"


def test_a_small_array_that_is_gone_is_not_a_fill_value(sound: Path, tmp_path: Path) -> None:
    copy = tmp_path / ("a" * 32) / sound.name
    shutil.copytree(sound, copy)
    (copy / "token_id" / "c.0").unlink()
    with pytest.raises(DamagedError, match=r"token_id/c\.0"):
        _ = open_capture(copy).tokens


@pytest.mark.parametrize("seed", range(3))
def test_damaged_metadata_is_an_error_of_ours_or_harmless(seed: int, sound: Path, tmp_path: Path) -> None:
    """It has no checksum: a changed digit in an attribute is read as it stands there, but nothing else goes wrong."""
    dice = random.Random(seed)
    for number in range(ROUNDS):
        copy = tmp_path / f"{number:032x}" / sound.name
        shutil.copytree(sound, copy)
        file = copy / "zarr.json"
        file.write_bytes(hurt(file.read_bytes(), dice))
        try:
            cap = open_capture(copy)
            everything(cap)
            np.asarray(cap.logits)
        except TensorspanError:
            pass
