"""Settings: one table, read once, passed on as a frozen object.

This is the only file that reads or writes the process environment. OTLP is configured by the standard `OTEL_*`
variables alone; the few facts about them that decide our behaviour are read here too. Buckets are configured by
their own standard variables (`AWS_*`, `GOOGLE_*`, `AZURE_*`), which the library that talks to them reads itself.
"""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from tracer.errors import CaptureRequestError, SettingsError
from tracer.quantities import parse_seconds
from tracer.step_spans import parse_step_spans

__all__ = [
    "PREFIX",
    "Settings",
    "bucket_variables",
    "c_compiler",
    "cache_directory",
    "child_environment",
    "inherited",
    "is_remote",
    "load",
    "local_path",
    "local_store",
    "metrics_counted",
    "otlp_endpoint",
    "otlp_protocol",
    "publish",
    "reference",
    "runtime_directory",
    "signal_protocol",
    "spans_disabled",
    "spool_directory",
    "trace_sampler",
    "vllm_plugins",
]

PREFIX: Final = "TENSORSPAN_"
MAX_RUNTIME_PATH: Final = 64
MAX_SPOOL_NAME: Final = 64
KUBERNETES: Final = re.compile(r"(service_(host|port)|port)(_.*)?")
"""What Kubernetes sets in every container for a Service that is called `tensorspan`."""
TAPS: Final = ("hidden_states", "router")
CAPTURE_POLICIES: Final = ("off", "loopback", "key", "all")
BUCKET_PREFIXES: Final = ("AWS_", "AZURE_", "GOOGLE_")
"""Variables that say where a bucket is and who asks."""


def _setting(default: Any, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"meaning": meaning, "choices": choices})


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting: environment variable `TENSORSPAN_<NAME>`, option `--<name>`, key `<name>` of the TOML file."""

    enabled: bool = _setting(False, "switch the plugin on in a vLLM process; setting a store switches it on too")
    store: str = _setting("./captures", "directory or bucket (s3://bucket/prefix) that receives the captures")
    spool: str = _setting("", "directory where captures wait for the bucket; empty: in the user's state directory")
    spool_mb: int = _setting(4096, "captures that may wait for the bucket, MB; at the limit new ones are refused")
    capture: str = _setting("loopback", "who may capture: off, loopback, key or all", CAPTURE_POLICIES)
    capture_key: str = _setting("", "secret expected in the Trace-Capture-Key header when capture is `key`")
    keys_file: str = _setting("", "TOML file of named keys, their rights and limits (docs/access.md); mode 0600")
    trusted_proxies: str = _setting("", "networks whose X-Forwarded-For is believed, such as 10.0.0.0/8, 127.0.0.1")
    captures_per_minute: float = _setting(0.0, "captured requests per minute of an API process; 0: no limit")
    capture_mb_per_hour: float = _setting(0.0, "arrays captured per hour through an API process, MB; 0: no limit")
    read_key: str = _setting("", "secret that lets clients on other hosts read captures over HTTP")
    view: bool = _setting(True, "serve captures under /tensorspan/ of vLLM's server (docs/access.md says to whom)")
    view_origins: str = _setting("", "web origins whose pages may read captures (CORS), such as https://jaeger.example")
    capture_text: bool = _setting(True, "store token bytes in captures; 0 leaves only token IDs")
    trace: bool = _setting(True, "emit spans, for the requests that are sampled")
    sampling: str = _setting("", "ratio of requests traced, by path, model and tenant (docs/sampling.md); empty: all")
    tenant_header: str = _setting("", "request header that names the tenant for `sampling`, such as X-Tenant")
    steps: int = _setting(2000, "spans of single steps per trace; further steps share spans of 16, 64, 256, ... each")
    step_spans: str = _setting("all", "steps with a span of their own: all, every:N or summary; others share spans")
    topk: int = _setting(5, "alternatives per step in spans (with content on) and captures")
    queue_mb: int = _setting(256, "shared-memory queue between each worker and the exporter process, MB")
    request_mb: int = _setting(4096, "arrays stored per generation, MB; at the limit the capture stops and says so")
    store_mb: int = _setting(0, "the whole store, MB; at the limit captures stop and say so; 0: no limit")
    keep: str = _setting("", "remove captures and spans that are older, such as 12h or 7d, once an hour; empty: never")
    codec: str = _setting("blosc", "compression of stored arrays", ("blosc", "zstd", "none"))
    content: bool = _setting(False, "token IDs and texts on spans; the GenAI content variable switches it on too")
    taps: str = _setting("", "members that a compiled model is tapped for: hidden_states, router; eager needs none")
    file: str = _setting("", "TOML file with these settings; the environment wins over it")
    socket: str = _setting("", "exporter process's socket; set by tensorspan itself for its child processes")

    @property
    def tapped(self) -> tuple[str, ...]:
        """The names in `taps`."""
        return tuple(part for part in re.split(r"[\s,]+", self.taps) if part)

    @property
    def active(self) -> bool:
        """True if a vLLM process should load our hooks at all: installed is not enabled."""
        return self.enabled


def load(overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from defaults, the TOML file, the environment and `overrides`, each winning over the one before.

    Raises SettingsError for an unknown name or a value of the wrong kind.
    """
    env = os.environ if environ is None else environ
    named = {key[len(PREFIX) :].lower(): value for key, value in env.items() if key.startswith(PREFIX)}
    path = str((overrides or {}).get("file") or named.get("file", ""))
    merged: dict[str, Any] = {**_from_file(path), **named, **(overrides or {})}
    known = {f.name: f for f in fields(Settings)}
    for name in [name for name in merged if name not in known and KUBERNETES.fullmatch(name)]:
        del merged[name]
    for name in merged:
        if name not in known:
            raise SettingsError(f"unknown setting {PREFIX}{name.upper()}; known: {', '.join(sorted(known))}")
    values = {name: _convert(known[name], value) for name, value in merged.items()}
    if "store" in merged:
        values.setdefault("enabled", True)
    if _content_opt_in(env):
        values["content"] = True
    _check_duration("keep", values.get("keep", ""))
    _check_taps(values.get("taps", ""))
    _check_step_spans(values.get("step_spans", "all"))
    return Settings(**values)


def _check_taps(text: str) -> None:
    unknown = [part for part in re.split(r"[\s,]+", text) if part and part not in TAPS]
    if unknown:
        raise SettingsError(f"{PREFIX}TAPS={text}: {unknown[0]!r} is not one of {', '.join(TAPS)}")


def publish(settings: Settings) -> None:
    """Write `settings` into this process's environment, so that child processes see the same."""
    os.environ.update(child_environment(settings))


def child_environment(settings: Settings) -> dict[str, str]:
    """The `TENSORSPAN_*` variables that reproduce `settings`: all of them, so that nothing inherited shows through."""
    values = {item.name: getattr(settings, item.name) for item in fields(Settings)}
    # What a file said is in `settings` already; read again, it would win over values that are back at their default.
    values["file"] = ""
    return {PREFIX + name.upper(): str(int(v)) if isinstance(v, bool) else str(v) for name, v in values.items()}


def reference() -> list[tuple[str, str, str]]:
    """(environment variable, default, meaning) of each setting, for the README and `serve --help`."""
    return [(PREFIX + f.name.upper(), _show(f.default), f.metadata["meaning"]) for f in fields(Settings)]


def is_remote(store: str) -> bool:
    """True if `store` is a bucket's URL, false if it is a directory."""
    return "://" in store and not store.startswith("file://")


def local_path(store: str) -> Path:
    """The directory that a path or a `file://` URL names."""
    return Path(unquote(store.removeprefix("file://"))) if store.startswith("file://") else Path(store)


def local_store(settings: Settings) -> Path:
    """The directory that captures are written to: the store, or the spool of a store that is a bucket."""
    return spool_directory(settings) if is_remote(settings.store) else local_path(settings.store)


def spool_directory(settings: Settings) -> Path:
    """Where captures wait for the bucket; each store has a folder of its own, so that none gets another's."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
    base = Path(settings.spool).expanduser() if settings.spool else Path(state) / "tensorspan" / "spool"
    url = settings.store.rstrip("/")
    name = re.sub(r"[^\w.-]+", "-", url)[:MAX_SPOOL_NAME]
    return base / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def bucket_variables() -> tuple[tuple[str, str], ...]:
    """The variables that configure access to buckets, as they are now."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(BUCKET_PREFIXES)))


def otlp_protocol() -> str | None:
    """`grpc` or `http/protobuf` if a collector is configured by `OTEL_*`, else None (spans go to a file)."""
    if otlp_endpoint() is None:
        return None
    general = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    return os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", general)


def otlp_endpoint() -> str | None:
    """The collector that `OTEL_*` names for spans; None if it names none."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next((value for name in names if (value := os.environ.get(name))), None)


def signal_protocol(signal: str) -> str | None:
    """`grpc` or `http/protobuf` if `OTEL_*` sends `signal` (`METRICS` or `LOGS`) to a collector; None if it does not.

    A collector counts as named by an endpoint, or by `otlp` as the signal's exporter.
    """
    chosen = os.environ.get(f"OTEL_{signal}_EXPORTER", "")
    names = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    named = chosen == "otlp" or (not chosen and any(os.environ.get(name) for name in names))
    if not named or not metrics_counted():
        return None
    general = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    return os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", general)


def trace_sampler() -> tuple[str, str]:
    """`OTEL_TRACES_SAMPLER` and its argument; empty where they are not set."""
    return os.environ.get("OTEL_TRACES_SAMPLER", "").strip().lower(), os.environ.get("OTEL_TRACES_SAMPLER_ARG", "")


def spans_disabled() -> bool:
    """True if the standard variables ask for no spans at all, to a collector or to a file."""
    return os.environ.get("OTEL_TRACES_EXPORTER") == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"


def metrics_counted() -> bool:
    """False if the standard variables switch all of OpenTelemetry off: then nothing is counted either."""
    return os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def inherited() -> dict[str, str]:
    """This process's environment, for a child process."""
    return dict(os.environ)


def vllm_plugins() -> tuple[str, ...] | None:
    """The only plugins that vLLM may load (its own variable `VLLM_PLUGINS`); None if it loads all."""
    value = os.environ.get("VLLM_PLUGINS")
    return None if value is None else tuple(name.strip() for name in value.split(","))


def runtime_directory() -> Path:
    """Where sockets and engine facts of running servers live: private to the user, gone at reboot."""
    candidates = (os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("TMPDIR"))
    # The address of a Unix socket has room for 107 bytes (`unix(7)`).
    base = next((path for path in candidates if path and len(path) < MAX_RUNTIME_PATH), "/tmp")  # noqa: S108
    return Path(base) / f"tensorspan-{os.getuid()}"


def cache_directory() -> Path:
    """Where things that can be made again are kept for this user (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "tensorspan"


def c_compiler() -> str | None:
    """The user's choice of C compiler, with its options (`CC`); None without one."""
    return os.environ.get("CC") or None


def _from_file(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"settings file {path}: {error}; correct it or unset {PREFIX}FILE") from error


def _content_opt_in(env: Mapping[str, str]) -> bool:
    value = env.get("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "").strip().upper()
    return value in ("SPAN_ONLY", "SPAN_AND_EVENT", "TRUE")


def _convert(item: Any, value: Any) -> Any:
    """`value` as the type of the setting's default."""
    name = PREFIX + item.name.upper()
    kind = type(item.default)
    try:
        out = {bool: _boolean, float: _amount}.get(kind, kind)(value)
    except ValueError as error:
        raise SettingsError(f"{name}={value!r} is not a {kind.__name__}; default: {_show(item.default)}") from error
    choices = item.metadata["choices"]
    if choices and out not in choices:
        raise SettingsError(f"{name}={value!r} must be one of {', '.join(choices)}")
    return out


def _check_duration(name: str, value: str) -> None:
    try:
        parse_seconds(value or "0s")
    except SettingsError as error:
        raise SettingsError(f"{PREFIX}{name.upper()}={error}") from error


def _check_step_spans(value: str) -> None:
    try:
        parse_step_spans(value, f"{PREFIX}STEP_SPANS")
    except CaptureRequestError as error:
        raise SettingsError(str(error)) from None


def _boolean(value: Any) -> bool:
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(text)


def _amount(value: Any) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(number)
    return number


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (bool, float)) else str(value) or "(empty)"
