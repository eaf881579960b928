"""What the plugin says when it meets a vLLM that it does not know, and how often."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tracer import config, export
from tracer.errors import CaptureUnavailableError
from tracer.worker import compat, frontend, plugin


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The plugin's log lines in a process that is a server's first; nothing of vLLM is changed."""
    for name in [name for name in os.environ if name.startswith("TENSORSPAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TENSORSPAN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(config, "publish", lambda settings: monkeypatch.setenv("TENSORSPAN_SOCKET", settings.socket))
    monkeypatch.setattr(compat, "patch", lambda *arguments: None)
    monkeypatch.setattr(frontend, "install", lambda settings: None)
    monkeypatch.setattr(export, "_UNHOOKABLE", {})
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, "vllm.tensorspan")
    return caplog


def lines(said: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in said.records if record.name == "vllm.tensorspan"]


def test_a_known_version_is_no_news(said: pytest.LogCaptureFixture) -> None:
    plugin.register()
    assert lines(said) == []


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.30.0", True), ("0.32.1rc1+cpu", True), ("0.31", True), ("0.3.0", False), ("0.320.0", False), ("1.0", False)],
)
def test_a_minor_version_is_known_or_not(version: str, known: bool) -> None:
    assert compat.is_known(version) is known


def test_an_unknown_version_is_said_once_a_server(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "version", lambda: "0.99.0")
    plugin.register()
    plugin.register()
    monkeypatch.setattr(os, "getpid", lambda: 1)  # a child process, which inherits the socket's name
    plugin.register()
    [line] = lines(said)
    assert "0.99.0 is not one this release was tested with (0.30, 0.31, 0.32)" in line
    assert export.hooked_engines(config.load()) == ()


def test_a_missing_name_is_said_once_and_given_as_the_reason(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "missing_names", lambda: ["vllm.x.Y"])
    plugin.register()
    plugin.register()
    [line] = lines(said)
    assert "lacks vllm.x.Y; it serves" in line
    with pytest.raises(CaptureUnavailableError, match=r"^unavailable: vLLM .* lacks vllm\.x\.Y$"):
        export.hooked_engines(config.load())
