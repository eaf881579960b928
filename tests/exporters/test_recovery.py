"""What `kill -9` leaves, at every system call of the writer, and what the next start makes of it."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from exporters import journal
from exporters.journal import FOLDER, Journal
from exporters.shards import Placed
from tests.exporters.killing import AGAIN, PLAN, plan
from tests.exporters.synthetic import DECODE, FULL, NOTHING, Synthetic, attributes, engine, exporter, opened
from tracer.records import GenerationEnd, GenerationStart, StepRecord

RECORDS = [record for record, _ in plan()]
START = next(i for i, record in enumerate(RECORDS) if isinstance(record, GenerationStart))
FIRST_STEP = next(i for i, record in enumerate(RECORDS) if isinstance(record, StepRecord))


def kill(root: Path, what: str) -> int:
    """Fork children that die at call 1, 2, …; how many died."""
    command = [sys.executable, "-m", "tests.exporters.killing", str(root), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """Stores of writers that died at each of their system calls, and how many those are."""
    root = tmp_path_factory.mktemp("killed")
    yield root, kill(root, "write")
    shutil.rmtree(root)


def check_clean(root: Path) -> None:
    """Nothing temporary is left."""
    assert not (root / FOLDER).exists()
    assert [path for path in root.rglob("*") if path.suffix in {".part", ".tmp"}] == []


def check_rows(group: Any, acknowledged: int, stored: int) -> None:
    """Every acknowledged step is whole and equal; the one at work when the writer died may be there as well."""
    versions: dict[int, list[Synthetic]] = {}
    for index, record in enumerate(RECORDS[: acknowledged + 1]):
        if isinstance(record, StepRecord):
            assert record.step is not None
            version = AGAIN if record.attempt == 2 else PLAN
            versions[record.step] = [*versions.get(record.step, []), version]
            if index < acknowledged:
                versions[record.step] = [version]
    arrays = {name: group[name][:] for name in ("logits", "attention", "attention_summary") if name in group}
    for step in range(stored):
        matching = [v for v in versions[step] if np.array_equal(arrays["logits"][step], v.logits[step])]
        assert len(matching) == 1, f"step {step}"
        keys = PLAN.prompt + step
        np.testing.assert_array_equal(arrays["attention"][step, ..., :keys], matching[0].rows[step])
        assert not arrays["attention"][step, ..., keys:].any()
        np.testing.assert_array_equal(arrays["attention_summary"][step], matching[0].summaries[step])
        assert group["token_id"][step] == step
        assert group["attempt"][step] == (2 if matching[0] is AGAIN else 1)
        assert int(group["span_id"][step]) == int(PLAN.step_span(step), 16)


def check_prompt(group: Any, *, whole: bool) -> None:
    """Rows of the prompt's map are as they were, or fill."""
    if "attention_prefill" not in group:
        assert not whole
        return
    found = group["attention_prefill"][..., : PLAN.prompt]
    there = found.any(axis=(1, 3))
    expected = np.where(there[:, None, :, None], PLAN.prefill, 0)
    np.testing.assert_array_equal(found, expected)
    assert there.all() or not whole


def check(root: Path, acknowledged: int) -> str | None:
    """Whatever the writer had acknowledged is in the store; returns the capture's status."""
    check_clean(root)
    path = PLAN.path(root)
    if acknowledged <= START and not path.exists():
        return None
    group = opened(path)
    found = group.attrs
    assert found["closed"] is True
    steps = [record.step for record in RECORDS[:acknowledged] if isinstance(record, StepRecord)]
    assert found["output_tokens"] >= (max(filter(None, steps), default=0) + 1 if steps else 0)
    check_rows(group, acknowledged, found["output_tokens"])
    check_prompt(group, whole=found["complete"])
    xr.open_zarr(path, chunks=None)
    ended = acknowledged == len(RECORDS)
    assert found["complete"] is (found["status"] == "ok")
    if found["status"] != "ok":
        assert not ended
        assert found["status"] == "interrupted"
        assert found["missing"][0]["reason"] == "the exporter process was killed"
    return str(found["status"])


@pytest.mark.slow
def test_a_writer_may_die_at_any_system_call(killed: tuple[Path, int]) -> None:
    root, deaths = killed
    assert deaths > 150
    statuses = []
    for number in range(1, deaths + 2):
        place = root / str(number)
        acknowledged = (root / f"{number}.said").stat().st_size
        work = root / "work"
        shutil.copytree(place, work) if place.exists() else work.mkdir()
        out = exporter(work)
        found = out.recover()
        assert out.problem is None
        assert out.recover() == []
        status = check(work, acknowledged)
        assert found in ([], [PLAN.path(work)])
        statuses.append(status)
        if status == "interrupted":
            assert found, f"{number} left nothing to recover"
        shutil.rmtree(work)
    assert {None, "interrupted", "ok"} == set(statuses)
    # Once the journal has the end, a death only delays it.
    first = statuses.index("ok")
    assert set(statuses[first:]) == {"ok"}
    assert first < deaths - 40


@pytest.mark.slow
def test_recovery_may_die_at_any_system_call_too(killed: tuple[Path, int], tmp_path: Path) -> None:
    root, deaths = killed
    number = int(deaths * 0.6)
    shutil.copytree(root / str(number), tmp_path / "killed")
    acknowledged = (root / f"{number}.said").stat().st_size
    again = kill(tmp_path, "recover")
    assert again > 20
    for attempt in range(1, again + 2):
        exporter(tmp_path / str(attempt)).recover()
        check(tmp_path / str(attempt), acknowledged)


@pytest.mark.slow
def test_a_start_that_was_not_acknowledged_comes_again_and_is_captured(killed: tuple[Path, int]) -> None:
    root, deaths = killed
    tried = 0
    for number in range(1, deaths + 1):
        if (root / f"{number}.said").stat().st_size == START and (root / str(number)).exists():
            work = root / "work"
            shutil.copytree(root / str(number), work)
            out = exporter(work)
            for record, payload in plan():
                out.export(record, payload)
            assert out.problem is None
            assert check(work, len(RECORDS)) == "ok"
            shutil.rmtree(work)
            tried += 1
    assert tried > 10


def begin(root: Path, steps: int, generation: Synthetic) -> Any:
    out = exporter(root)
    out.export(engine(), NOTHING)
    out.export(generation.start(), NOTHING)
    for step in range(steps):
        out.export(*generation.step(step))
    return out


def test_a_living_writers_capture_is_left_alone(tmp_path: Path) -> None:
    generation = Synthetic(steps=4, spec=DECODE)
    living = begin(tmp_path, 2, generation)
    other = exporter(tmp_path)
    assert other.recover() == []
    assert other.shutdown(1.0)
    for step in (2, 3):
        living.export(*generation.step(step))
    living.export(generation.end(), NOTHING)
    assert attributes(generation.path(tmp_path))["complete"] is True
    check_clean(tmp_path)


def test_the_first_record_of_the_next_process_recovers(tmp_path: Path) -> None:
    generation = Synthetic(steps=3, spec=DECODE)
    die(begin(tmp_path, 3, generation))
    out = exporter(tmp_path)
    assert attributes(generation.path(tmp_path))["closed"] is False
    out.export(engine(), NOTHING)
    group = opened(generation.path(tmp_path))
    np.testing.assert_array_equal(group["logits"][:], generation.logits)
    assert group["token_id"][:].tolist() == [0, 1, 2]
    assert group.attrs["missing"] == [
        {"array": "*", "what": "all from step 3 on", "reason": "the exporter process was killed"}
    ]
    out.export(generation.end(), NOTHING)
    out.export(*generation.step(2))
    assert out.problem is None
    assert attributes(generation.path(tmp_path))["status"] == "interrupted"


def test_what_was_lost_before_stays_said(tmp_path: Path) -> None:
    generation = Synthetic(steps=4, spec=DECODE)
    out = begin(tmp_path, 2, generation)
    out.export(*generation.step(2, ("logits",), dropped=("logits: queue full",)))
    out.export(*generation.step(3))
    die(out)
    exporter(tmp_path).recover()
    found = attributes(generation.path(tmp_path))
    assert {"array": "logits", "what": "step 2", "reason": "queue full"} in found["missing"]
    assert found["dropped"]["count"] == 1


def test_prompt_rows_that_waited_in_memory_are_said(tmp_path: Path) -> None:
    generation = Synthetic(steps=1, prompt=100, spec=FULL)
    out = begin(tmp_path, 0, generation)
    for layer in range(3):
        out.export(*generation.block(layer, 0, 70))
    die(out)
    exporter(tmp_path).recover()
    group = opened(generation.path(tmp_path))
    np.testing.assert_array_equal(group["attention_prefill"][:, :, :64, :100], generation.prefill[:, :, :64])
    assert {"array": "attention_prefill", "what": "rows 64-99", "reason": "the exporter process was killed"} in (
        group.attrs["missing"]
    )


def test_a_shard_that_somebody_removed_is_said(tmp_path: Path) -> None:
    generation = Synthetic(steps=3, spec=DECODE)
    die(begin(tmp_path, 3, generation))
    (generation.path(tmp_path) / "logits" / "c.0.0.part").unlink()
    exporter(tmp_path).recover()
    group = opened(generation.path(tmp_path))
    assert np.isnan(group["logits"][:]).all()
    assert {"array": "logits", "what": "steps 0-2", "reason": "its file is gone"} in group.attrs["missing"]
    np.testing.assert_array_equal(group["attention"][2], generation.rows[2])


def test_a_torn_journal_counts_up_to_its_last_whole_record(tmp_path: Path) -> None:
    generation = Synthetic(steps=3, spec=DECODE)
    die(begin(tmp_path, 3, generation))
    [(path, _, _)] = journal.leftovers(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    exporter(tmp_path).recover()
    assert attributes(generation.path(tmp_path))["output_tokens"] == 2


def test_a_journal_without_facts_leaves_nothing(tmp_path: Path) -> None:
    generation = Synthetic()
    taken = Journal.create(tmp_path / FOLDER / f"{generation.trace_id}-{generation.span_id}")
    generation.path(tmp_path).mkdir(parents=True)
    assert Journal.take(taken.path) is None
    taken.release()
    assert exporter(tmp_path).recover() == []
    assert list(tmp_path.iterdir()) == []


def test_the_same_span_twice_leaves_the_first_as_it_is_even_if_the_writer_is_killed(tmp_path: Path) -> None:
    generation = Synthetic(steps=2, spec=DECODE)
    out = begin(tmp_path, 2, generation)
    out.export(generation.end(), NOTHING)
    taken = Journal.create(tmp_path / FOLDER / f"{generation.trace_id}-{generation.span_id}")
    taken.begin(generation.start(), None, {"codec": "none", "capture_text": True})
    taken.release()
    exporter(tmp_path).recover()
    found = attributes(generation.path(tmp_path))
    assert (found["complete"], found["status"]) == (True, "ok")
    check_clean(tmp_path)


def test_a_file_system_without_locks_still_stores_and_nobody_touches_what_may_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("exporters.journal.fcntl.flock", refuse)
    generation = Synthetic(steps=2, spec=DECODE)
    out = begin(tmp_path, 2, generation)
    assert exporter(tmp_path).recover() == []
    out.export(generation.end(), NOTHING)
    assert out.problem is None
    assert attributes(generation.path(tmp_path))["complete"] is True


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_the_codec_is_the_killed_writers(tmp_path: Path, codec: str) -> None:
    generation = Synthetic(steps=2, spec=DECODE)
    out = exporter(tmp_path, codec=codec)
    for record, payload in list(generation.records())[:-1]:
        out.export(record, payload)
    die(out)
    exporter(tmp_path, codec="blosc").recover()
    np.testing.assert_array_equal(opened(generation.path(tmp_path))["logits"][:], generation.logits)


def test_an_end_that_was_written_is_the_end(tmp_path: Path) -> None:
    generation = Synthetic(steps=3, spec=DECODE)
    out = begin(tmp_path, 3, generation)
    [capture] = out._open.values()
    capture.journal.end(generation.end(2))
    die(out)
    exporter(tmp_path).recover()
    found = attributes(generation.path(tmp_path))
    assert (found["status"], found["complete"], found["output_tokens"]) == ("ok", True, 2)
    np.testing.assert_array_equal(opened(generation.path(tmp_path))["logits"][:], generation.logits[:2])


def test_entries_are_packed_and_unpacked() -> None:
    where = Placed(7, (5, 6))
    numbers = (2**64 - 1, -1, 2, 3, 4, 5, 0.5, 1.5, 2.5, 3.5, 6)
    step = journal.StepEntry(3, numbers, [journal.RowEntry(1, 9, where)], [("logits", 3, "why")])
    assert journal.StepEntry.unpack(step.pack()) == step
    prompt = journal.PromptEntry([journal.PromptBlock(2, 64, 2**64 - 1, where)], [("a", None, "b")])
    assert journal.PromptEntry.unpack(prompt.pack()) == prompt
    assert isinstance(RECORDS[-1], GenerationEnd)


def die(out: Any) -> None:
    """What a kill does: descriptors and the journal's lock go, nothing is written."""
    for capture in out._open.values():
        capture.release()
