"""The command `tensorspan`: serve, list, tree, show, view, index, prune, recover, doctor.

Exit codes: 0 done, 1 it could not be done, 2 the command line or a setting is wrong. Whatever was wrong is one line on
stderr. Heavy modules are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from tracer import __version__, config, launch
from tracer.config import Settings
from tracer.errors import CaptureNotFoundError, MissingExtraError, SettingsError, StoreError, TensorspanError
from tracer.printable import printable

if TYPE_CHECKING:
    from tracer.reader import Capture

__all__ = ["main"]

ID_HELP: Final = "a step span, generation span or trace ID, trace/span, or the path of a capture"


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as all of ours."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line and end with code 2."""
        self.exit(2, f"tensorspan: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "serve":
        parser.error(f"unknown argument {rest[0]!r} of {options.command}")
    options.rest = rest
    try:
        return int(options.run(options) or 0)
    except SettingsError as error:
        return _complain(error, 2)
    except (TensorspanError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `tensorspan list | head`
            sys.stderr.close()
            return 1
        return _complain(error, 1)
    except KeyboardInterrupt:
        return 130


def _complain(error: Exception, code: int) -> int:
    sys.stderr.write(f"tensorspan: {printable(' '.join(str(error).split()))}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tensorspan", description="Traces and captures of a vLLM server.")
    parser.add_argument("--version", action="version", version=f"tensorspan {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, **more: Any) -> argparse.ArgumentParser:
        # No abbreviations: `--max` is vLLM's affair, and a script must not break when we gain an option.
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **more)
        command.set_defaults(run=run)
        return command

    usage = "tensorspan serve MODEL [tensorspan's options] [vLLM's options]"
    serve = add("serve", _serve, "start vLLM's server with tracing; `vllm serve --help` lists its options", usage=usage)
    launch.add_settings(serve)
    listing = add("list", _list, "captures of a store, newest first")
    listing.add_argument("store", nargs="?", metavar="STORE", help="default: TENSORSPAN_STORE or ./captures")
    tree = add("tree", _tree, "the spans of a trace with each step's statistics")
    tree.add_argument("id", nargs="?", metavar="ID|STORE", help=f"{ID_HELP}; a store or nothing: its newest trace")
    tree.add_argument("--steps", type=_count, default=64, metavar="N", help="steps per generation (default: 64)")
    show = add("show", _show, "one capture: text, arrays, least certain tokens, where the answer looked")
    show.add_argument("id", metavar="ID", help=ID_HELP)
    for name, text in (("step", "one step's row"), ("layer", "one layer only"), ("head", "one head only")):
        show.add_argument(f"--{name}", type=_count, metavar="N", help=text)
    view = add("view", _view, "serve a store's captures under /tensorspan/ over HTTP")
    view.add_argument("store", nargs="?", metavar="STORE", help="default: TENSORSPAN_STORE or ./captures")
    view.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    view.add_argument("--port", type=_count, default=7007, help="default: 7007")
    index = add("index", _index, "make the store's index of span IDs anew, from its captures alone")
    index.add_argument("store", nargs="?", metavar="STORE", help="default: TENSORSPAN_STORE or ./captures")
    pruning = add("prune", _prune, "remove captures that are too old or too much, oldest first; spans by their age")
    pruning.add_argument("store", nargs="?", metavar="STORE", help="default: TENSORSPAN_STORE or ./captures")
    pruning.add_argument("--keep", metavar="AGE", help="remove what is older: 12h, 7d, 2w (s, m, h, d, w)")
    pruning.add_argument("--max-bytes", metavar="SIZE", help="remove until no more is left: 500M, 50G (k, M, G, T)")
    pruning.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    recover = add("recover", _recover, "close what killed writers left in a store; a server's next start does it too")
    recover.add_argument("store", nargs="?", metavar="STORE", help="default: TENSORSPAN_STORE or ./captures")
    doctor = add("doctor", _doctor, "what this installation can capture, and why not")
    doctor.add_argument("--features", action="store_true", help="which features of vLLM can be captured, and why not")
    for command in (tree, show, doctor):
        command.add_argument("--store", metavar="DIR|URL", help="default: TENSORSPAN_STORE or ./captures")
    for command in (listing, tree, show, index, pruning, recover, doctor):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


# -- commands ------------------------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace) -> int:
    names = {item.name for item in fields(Settings)}
    launch.exec_server(options.rest, {name: value for name, value in vars(options).items() if name in names})
    return 1  # Not reached: this process is vLLM's server now.


def _view(options: argparse.Namespace) -> int:
    given = {} if options.store is None else {"store": options.store}
    settings = config.load(given)
    try:
        import uvicorn

        from tracer.server.app import PREFIX, make_app
    except ImportError as missing:
        raise MissingExtraError("view", str(missing.name)) from missing
    sys.stdout.write(f"captures of {settings.store} at http://{options.host}:{options.port}{PREFIX}/captures\n")
    uvicorn.run(make_app(settings), host=options.host, port=options.port, log_level="warning", access_log=False)
    return 0


def _list(options: argparse.Namespace) -> int:
    from tracer import show
    from tracer.reader import find_captures

    store = _store(options)
    entries = find_captures(store)
    if options.json:
        return _print_json([{**asdict(entry), "bytes_on_disk": show.disk_bytes(entry.path)} for entry in entries])
    if not entries:
        raise CaptureNotFoundError(
            f"no captures in {store}; ask a server started by `tensorspan serve` with the header Trace-Capture: logits"
        )
    show.emit(show.capture_table(entries))
    return 0


def _tree(options: argparse.Namespace) -> int:
    from rich.text import Text

    from tracer import show
    from tracer.reader import find_captures, open_capture
    from tracer.spans_file import read_trace, spans_directory

    store, trace_id = _find_trace(options.id, _store(options))
    trace = read_trace(store, trace_id)
    tokens = show.token_texts(open_capture(entry.path) for entry in find_captures(f"{store}/{trace_id}"))
    if options.json:
        roots = [show.span_facts(root, tokens) for root in trace.roots]
        return _print_json({"trace_id": trace_id, "store": store, "source": trace.source, "roots": roots})
    folder = spans_directory(store) if config.is_remote(store) else f"{store}/spans"
    source = folder if trace.source == "spans" else f"rebuilt from the captures in {store}"
    show.emit(Text(f"trace {trace_id}  ({source})", style="dim"), show.trace_table(trace, tokens, options.steps))
    return 0


def _show(options: argparse.Namespace) -> int:
    from tracer import show, show_capture

    capture, step = _open(options.id, _store(options))
    step = options.step if options.step is not None else step
    facts = show_capture.capture_facts(capture, step=step, layer=options.layer, head=options.head)
    if options.json:
        return _print_json(facts)
    show.emit(show_capture.capture_view(capture, facts))
    return 0


def _index(options: argparse.Namespace) -> int:
    import sqlite3

    from tracer.span_index import INDEX, rebuild
    from tracer.store_files import directory_of

    root = directory_of(_store(options))
    try:
        counts = rebuild(root)
    except sqlite3.Error as error:
        raise StoreError(f"{root / INDEX} cannot be written: {error}; try again, or make the store writable") from error
    if options.json:
        return _print_json({"store": str(root), **counts._asdict()})
    sys.stdout.write(f"{root / INDEX}: {counts.captures} captures ({counts.open} open), {counts.steps} steps\n")
    return 0


def _prune(options: argparse.Namespace) -> int:
    from tracer.prune import plan, prune
    from tracer.quantities import parse_bytes, parse_seconds
    from tracer.store_files import directory_of

    if options.keep is None and options.max_bytes is None:
        raise SettingsError("prune what? give --keep AGE, --max-bytes SIZE or both, e.g. --keep 7d --max-bytes 50G")
    keep = None if options.keep is None else parse_seconds(options.keep)
    limit = None if options.max_bytes is None else parse_bytes(options.max_bytes)
    root = directory_of(_store(options))
    chosen = plan(root, keep, limit)
    removed = chosen.remove if options.dry_run else prune(root, chosen.remove)
    freed = sum(item.bytes for item in removed)
    if options.json:
        facts = {"store": str(root), "dry_run": options.dry_run, "bytes_freed": freed, "bytes_kept": chosen.kept}
        return _print_json({**facts, "removed": [{"path": str(item.path), "bytes": item.bytes} for item in removed]})
    for item in removed:
        sys.stdout.write(f"{printable(str(item.path))}  {item.bytes} bytes\n")
    done = "would be removed" if options.dry_run else "removed"
    sys.stdout.write(f"{len(removed)} {done}, {freed / 1e6:.1f} MB; {chosen.kept / 1e6:.1f} MB stay\n")
    return 0


def _recover(options: argparse.Namespace) -> int:
    import logging

    from tracer import exporter_points, show

    logging.getLogger("tensorspan").addHandler(logging.NullHandler())  # What is wrong is said once, by `main`.
    store = _store(options)
    closed = [str(path) for path in exporter_points.recover_store(config.load({"store": store}))]
    if options.json:
        return _print_json(closed)
    show.emit(*closed, f"{len(closed)} closed in {store}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from tracer import doctor, show
    from tracer.support import FEATURES

    if options.features:
        if options.json:
            return _print_json([*map(asdict, FEATURES)])
        show.emit(doctor.features_view())
        return 0
    settings = config.load({} if options.store is None else {"store": options.store})
    if sys.stderr.isatty():
        sys.stderr.write("asking vLLM, which takes some seconds\n")
    report = doctor.examine(settings)
    if options.json:
        _print_json(report.as_json())
    else:
        show.emit(doctor.report_view(report))
    return 0 if report.healthy else 1


# -- what an ID means ----------------------------------------------------------------------------------------------


def _store(options: argparse.Namespace) -> str:
    """The store that the command line or the settings name; CaptureNotFoundError if it is not there."""
    store = str(options.store or config.load().store).rstrip("/") or "/"
    if (
        not config.is_remote(store)
        and not config.local_path(store).is_dir()
        and not _is_place(getattr(options, "id", None))
    ):
        raise CaptureNotFoundError(f"no store at {store}; name the server's with --store, or run where it runs")
    return store


def _is_place(identifier: str | None) -> bool:
    """True for a path or URL, as against an ID."""
    return identifier is not None and ("://" in identifier or Path(identifier).is_dir())


def _open(identifier: str, store: str) -> tuple[Capture, int | None]:
    """The capture, and the row that a step's ID or reference names."""
    from tracer.reader import open_capture

    if _is_place(identifier):
        return open_capture(identifier), None
    *_, step = parts = identifier.split("/")
    if len(parts) == 3 and step.isdecimal():  # `tensorspan.capture_ref` of a step span
        return open_capture(store, "/".join(parts[:2])), int(step)
    capture = open_capture(store, identifier)
    return capture, capture.step_index


def _find_trace(identifier: str | None, store: str) -> tuple[str, str]:
    """(store, trace ID) that an ID, a path or nothing means."""
    from tracer.schema import is_span_id, is_trace_id
    from tracer.spans_file import newest_trace, trace_of_span

    if identifier is None:
        return store, newest_trace(store)
    if _is_place(identifier):
        place = identifier.rstrip("/")
        if not config.is_remote(place):
            place = str(config.local_path(place))
        full = place if config.is_remote(place) else str(Path(place).resolve())
        above = full.rpartition("/")[0]
        if is_span_id(full.rpartition("/")[2]) and is_trace_id(above.rpartition("/")[2]):
            place = above
        name = place.rpartition("/")[2]
        return (place.rpartition("/")[0] or ".", name) if is_trace_id(name) else (place, newest_trace(place))
    first = identifier.partition("/")[0].lower()
    if is_trace_id(first):
        return store, first
    found = trace_of_span(store, first) if is_span_id(first) else None
    return store, found or _open(identifier, store)[0].trace_id


# -- output --------------------------------------------------------------------------------------------------------


def _print_json(value: Any) -> int:
    sys.stdout.write(printable(json.dumps(_finite(value), indent=2, ensure_ascii=False)) + "\n")
    return 0


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
