"""A store in a bucket as its users meet it: the exporter process, the command, `doctor`."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.exporters.buckets import SECONDS, Export, export
from tests.exporters.seaweed import Seaweed
from tests.exporters.synthetic import DECODE, SPAN, TRACE, Synthetic
from tracer import config, doctor, open_capture
from tracer.cli import main
from tracer.config import Settings
from tracer.errors import CaptureNotFoundError
from tracer.export import Channel
from tracer.records import WorkerEnd
from tracer.spans_file import read_spans


@pytest.fixture
def settings(bucket: str, tmp_path: Path) -> Settings:
    return Settings(enabled=True, store=bucket, spool=str(tmp_path / "spool"), socket=str(tmp_path / "x.sock"))


@pytest.fixture
def channel(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Channel]:
    monkeypatch.setenv("TENSORSPAN_SPOOL", settings.spool)
    opened = Channel(settings, "api", 1 << 22)
    assert opened.connect()
    yield opened
    opened.close()


def send(channel: Channel, generation: Synthetic) -> None:
    for record, payload in generation.records():
        assert channel.send(record, [payload])
    assert channel.send(WorkerEnd(generation.trace_id, generation.span_id, 0, 0))


def test_a_flush_waits_for_the_bucket(channel: Channel, bucket: str, settings: Settings) -> None:
    generation = Synthetic(steps=5, spec=DECODE)
    send(channel, generation)
    assert channel.flush([SPAN], SECONDS)
    assert open_capture(bucket, SPAN).complete
    assert len(list(read_spans(bucket))) == 6, "without a collector spans are in the spool's folder"


@pytest.mark.slow
def test_serving_goes_on_while_the_bucket_is_away(channel: Channel, seaweed: Seaweed, bucket: str) -> None:
    seaweed.kill()
    try:
        send(channel, Synthetic(steps=5, spec=DECODE))
        assert not channel.flush([SPAN], 2), "it is not where a reader finds it"
        send(channel, Synthetic(steps=5, spec=DECODE, span_id="c" * 16))
    finally:
        seaweed.start()
    assert channel.flush([SPAN, "c" * 16], SECONDS)
    assert open_capture(bucket, SPAN).complete
    assert open_capture(bucket, "c" * 16).complete


@pytest.mark.slow
def test_the_exporter_stays_until_captures_are_in_the_bucket(
    channel: Channel, seaweed: Seaweed, bucket: str, settings: Settings
) -> None:
    seaweed.kill()
    try:
        send(channel, Synthetic(steps=5, spec=DECODE))
        channel.close()
    finally:
        seaweed.start()
    with Path(settings.socket).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # The exporter holds it until it ends.
    assert open_capture(bucket, SPAN).complete


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = main(list(arguments))
    return code, json.loads(capsys.readouterr().out)


def test_the_command_reads_the_url(exporter: Export, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = exporter()
    export(out, Synthetic(steps=6, spec=DECODE))
    assert out.force_flush(SECONDS)
    path = f"{bucket}/{TRACE}/{SPAN}"
    code, (entry,) = run(capsys, "list", bucket, "--json")
    assert (code, entry["path"], entry["bytes_on_disk"]) == (0, path, None)
    for what in (SPAN, path, f"{TRACE}/{SPAN}/2", "f000000000000001"):
        code, facts = run(capsys, "show", what, "--store", bucket, "--json")
        assert (code, facts["span_id"]) == (0, SPAN)
    for what in (bucket, f"{bucket}/{TRACE}", path, TRACE, SPAN, "f000000000000001"):
        code, tree = run(capsys, "tree", what, "--store", bucket, "--json")
        assert (code, tree["trace_id"], tree["store"]) == (0, TRACE, bucket)


def test_doctor_asks_the_bucket_and_counts_the_spool(
    exporter: Export, seaweed: Seaweed, bucket: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checks() -> dict[str, doctor.Check]:
        return {check.name: check for check in doctor._stores(settings)}

    assert checks()["store"].state == "ok"
    assert "0 captures" in checks()["spool"].found
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    out = exporter()
    export(out, Synthetic(steps=2))
    found = checks()
    assert found["store"].state == "broken"
    assert "SignatureDoesNotMatch" in found["store"].found
    assert "AWS_SECRET_ACCESS_KEY" in found["store"].repair
    assert "1 captures (" in found["spool"].found
    assert doctor._collector(settings).found.startswith(f"to {config.spool_directory(settings)}/spans/")


def test_an_empty_bucket_holds_nothing(seaweed: Seaweed, bucket: str) -> None:
    with pytest.raises(CaptureNotFoundError, match="it holds none"):
        open_capture(bucket, SPAN)
