from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from tests.exporters.synthetic import (
    DECODE,
    NOTHING,
    Synthetic,
    attributes,
    engine,
    exporter,
    opened,
    pack,
    write,
)
from tracer.records import AttentionSpec, CaptureSpec, LogitsSpec


@pytest.mark.parametrize("lost", [2, 63, 64, 69])
def test_a_lost_record_leaves_fill_and_is_named(tmp_path: Path, lost: int) -> None:
    generation, out = Synthetic(steps=70, spec=DECODE), exporter(tmp_path)
    for record, payload in generation.records():
        if getattr(record, "step", None) != lost:
            out.export(record, payload)
    group = opened(generation.path(tmp_path))
    expected = generation.logits.copy()
    expected[lost] = np.nan
    np.testing.assert_array_equal(group["logits"][:], expected)
    assert not group["attention"][lost].any()
    assert group["span_id"][lost] == 0
    assert group["token_id"][lost] == lost, "the client's token IDs know it"
    assert group.attrs["complete"] is False
    assert group.attrs["closed"] is True
    assert {(m["array"], m["what"], m["reason"]) for m in group.attrs["missing"]} == {
        (name, f"step {lost}", "not received") for name in ("span_id", "logits", "attention")
    }
    assert np.isnat(xr.open_zarr(generation.path(tmp_path), chunks=None)["time"].to_numpy()[lost])


def test_a_step_without_its_arrays_says_why(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=4, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    dropped = ("logits: queue full", "attention: queue full")
    for step in range(4):
        late = step in {1, 2}
        out.export(*generation.step(step, ("logits", "attention") if late else (), dropped=dropped if late else ()))
    out.export(generation.end(), NOTHING)
    found = attributes(generation.path(tmp_path))
    assert found["complete"] is False
    assert found["missing"] == [
        {"array": name, "what": "steps 1-2", "reason": "queue full"} for name in ("logits", "attention")
    ]
    assert found["dropped"]["count"] == 4
    assert found["dropped"]["entries"][0] == {"array": "logits", "step": 1, "cause": "queue full"}


def test_damage_inside_a_stored_row_is_named(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=2, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(*generation.step(0))
    out.export(*generation.step(1, dropped=("attention: layer 2: boom",)))
    out.export(generation.end(), NOTHING)
    found = attributes(generation.path(tmp_path))
    assert found["missing"] == [{"array": "attention", "what": "reported at step 1", "reason": "layer 2: boom"}]
    assert found["complete"] is False


def test_a_thousand_drops_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=1, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(*generation.step(0, dropped=("logits: x",) * 1500))
    out.export(generation.end(), NOTHING)
    dropped = attributes(generation.path(tmp_path))["dropped"]
    assert (dropped["count"], len(dropped["entries"])) == (1500, 1000)


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 65, 69])
def test_surplus_steps_are_trimmed(tmp_path: Path, kept: int) -> None:
    generation, out = Synthetic(steps=70, spec=DECODE), exporter(tmp_path)
    for record, payload in generation.records():
        out.export(generation.end(kept) if record == generation.end() else record, payload)
    path = generation.path(tmp_path)
    group = opened(path)
    np.testing.assert_array_equal(group["logits"][:], generation.logits[:kept])
    assert group["attention"].shape == (kept, 3, 2, 7 + max(kept - 1, 0))
    assert group["kv_len"].shape == (kept,)
    assert group.attrs["complete"] is True
    assert len(list((path / "logits").glob("c.*"))) == -(-kept // 64)
    raw = b"".join(file.read_bytes()[-1028:] for file in (path / "logits").glob("c.*"))
    used = sum(
        int(n) != 2**64 - 1
        for n in np.frombuffer(b"".join([raw[i : i + 1024] for i in range(0, len(raw), 1028)]), "<u8")[::2]
    )
    assert used in {kept, 64}, "a shard that was still open does not even hold the surplus rows"


@pytest.mark.parametrize("again", [3, 10, 69])
def test_the_same_step_again_wins(tmp_path: Path, again: int) -> None:
    first, second = Synthetic(steps=70, spec=DECODE), Synthetic(steps=70, spec=DECODE, seed=1)
    out = exporter(tmp_path)
    for record, payload in first.records():
        if record == first.end():
            out.export(*second.step(again, attempt=2))
        out.export(record, payload)
    group = opened(first.path(tmp_path))
    expected = first.logits.copy()
    expected[again] = second.logits[again]
    np.testing.assert_array_equal(group["logits"][:], expected)
    np.testing.assert_array_equal(group["attention"][again, ..., : 7 + again], second.rows[again])
    assert group["attempt"][again] == 2
    assert group.attrs["complete"] is True


def test_steps_may_come_in_any_order(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=130, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    for step in np.random.default_rng(5).permutation(130).tolist():
        out.export(*generation.step(step))
    out.export(generation.end(), NOTHING)
    group = opened(generation.path(tmp_path))
    np.testing.assert_array_equal(group["logits"][:], generation.logits)
    assert group.attrs["complete"] is True


def test_the_byte_budget_stops_a_capture_and_says_so(tmp_path: Path) -> None:
    generation = Synthetic(steps=10, vocab=100_000, spec=CaptureSpec(LogitsSpec()))
    group = opened(write(tmp_path, generation, request_mb=1, codec="none"))
    logits = group["logits"][:]
    np.testing.assert_array_equal(logits[:4], generation.logits[:4])
    assert np.isnan(logits[5:]).all()
    assert group.attrs["missing"] == [{"array": "logits", "what": "steps 4-9", "reason": "byte budget of 1 MB reached"}]
    assert group["token_id"].shape == (10,), "numbers per step go on"


def test_layers_that_cannot_be_captured_are_named(tmp_path: Path) -> None:
    generation, out = Synthetic(layers=2, spec=CaptureSpec(None, AttentionSpec())), exporter(tmp_path)
    out.export(engine(3, 2, refused=[1]), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(*generation.step(0))
    out.export(generation.end(1), NOTHING)
    group = opened(generation.path(tmp_path))
    assert group["layer"][:].tolist() == [0, 2]
    assert group.attrs["missing"] == [{"array": "attention", "what": "layer 1", "reason": "MLA"}]


def test_an_engine_that_cannot_capture_is_quoted(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=0, spec=DECODE), exporter(tmp_path)
    out.export(engine(logits_unsupported="no logits", attention_unsupported="no attention"), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(generation.end(), NOTHING)
    assert [m["reason"] for m in attributes(generation.path(tmp_path))["missing"]] == ["no logits", "no attention"]


@pytest.mark.parametrize(
    ("arrays", "start"),
    [
        ({"logits": np.zeros(49, np.float16)}, ()),
        ({"attention": np.zeros((2, 2, 8), np.float16)}, ()),
        ({"attention": np.zeros((3, 2, 5000), np.float16)}, ()),
        ({"attention": np.zeros((3, 1, 8), np.float16)}, (0, 1, 0)),
        ({"nonsense": np.zeros(3, np.float16)}, ()),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_name(tmp_path: Path, arrays: dict[str, Any], start: Any) -> None:
    generation, out = Synthetic(steps=2, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(*generation.step(0))
    record, _ = generation.step(1)
    slices, payload = pack(arrays, start)
    out.export(type(record)(**{name: getattr(record, name) for name in record.__slots__} | {"arrays": slices}), payload)
    out.export(generation.end(), NOTHING)
    found = attributes(generation.path(tmp_path))
    assert found["complete"] is False
    assert any("does not fit" in entry["cause"] for entry in found["dropped"]["entries"])
    assert out.problem is None


def test_a_payload_shorter_than_promised_is_refused(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=1, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(generation.step(0)[0], NOTHING)
    out.export(generation.end(), NOTHING)
    reasons = {entry["reason"] for entry in attributes(generation.path(tmp_path))["missing"]}
    assert all(reason.startswith("unreadable: ") for reason in reasons)


def test_an_unwritable_store_costs_the_capture_and_the_next_one_tries_again(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.write_text("a file where the directory should be")
    out = exporter(root)
    first = Synthetic()
    for record, payload in first.records():
        out.export(record, payload)
    assert out.lost == {"EEXIST": 1}
    assert out.problem is not None
    assert str(root) in out.problem
    root.unlink()
    second = Synthetic(span_id="00000000000000aa")
    for record, payload in second.records():
        out.export(record, payload)
    assert out.problem is None
    assert out.lost == {"EEXIST": 1}
    assert attributes(second.path(root))["complete"] is True


def test_a_disk_that_fills_up_ends_the_capture_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generation, out = Synthetic(steps=130, spec=DECODE), exporter(tmp_path)
    other = Synthetic(steps=3, spec=DECODE, span_id="00000000000000aa")
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(other.start(), NOTHING)
    for step in range(70):
        out.export(*generation.step(step))

    def full(fd: int, parts: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("exporters.shards.os.writev", full)
        out.export(*generation.step(70))
    for step in range(71, 130):
        out.export(*generation.step(step))
    out.export(generation.end(), NOTHING)
    for step in range(3):
        out.export(*other.step(step))
    out.export(other.end(), NOTHING)
    assert out.lost == {"ENOSPC": 1}
    assert out.problem is not None
    group = opened(generation.path(tmp_path))
    np.testing.assert_array_equal(group["logits"][:], generation.logits[:64])
    assert attributes(other.path(tmp_path))["complete"] is True


def test_shutdown_keeps_what_has_come(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=5, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    for step in range(3):
        out.export(*generation.step(step))
    assert out.force_flush(1.0)
    assert out.shutdown(1.0)
    group = opened(generation.path(tmp_path))
    np.testing.assert_array_equal(group["logits"][:], generation.logits[:3])
    assert (group.attrs["complete"], group.attrs["closed"], group.attrs["status"]) == (False, True, "interrupted")
    assert group.attrs["missing"][0]["reason"] == "the exporter process was stopped"


def test_ids_that_are_paths_are_refused(tmp_path: Path) -> None:
    out = exporter(tmp_path / "store")
    out.export(Synthetic(span_id="../../../escape00").start(), NOTHING)
    assert out.lost == {"EINVAL": 1}
    assert list(tmp_path.iterdir()) == []


def test_the_same_span_twice_does_not_overwrite(tmp_path: Path) -> None:
    generation = Synthetic()
    path = write(tmp_path, generation)
    out = exporter(tmp_path)
    out.export(generation.start(), NOTHING)
    assert out.lost == {"EEXIST": 1}
    assert attributes(path)["complete"] is True


def test_a_step_whose_numbers_no_journal_can_hold_ends_one_capture_only(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=2, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(*generation.step(0))
    out.export(*generation.step(1, position=2**70))
    assert out.lost == {"error": 1}
    assert out.shutdown(1.0)
    found = attributes(generation.path(tmp_path))
    assert (found["status"], found["output_tokens"]) == ("failed", 1)


def test_values_that_no_array_can_hold_end_one_capture_only(tmp_path: Path) -> None:
    generation, out = Synthetic(steps=1, spec=DECODE), exporter(tmp_path)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    out.export(*generation.step(0))
    out.export(generation.end(output_token_ids=(2**40,)), NOTHING)
    assert out.lost == {"OverflowError": 1}
    found = attributes(generation.path(tmp_path))
    assert (found["complete"], found["closed"], found["status"]) == (False, True, "failed")
    assert out.shutdown(1.0)
