"""What is known about a capture or one of its steps, as JSON and as a page without scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from math import isfinite
from typing import Any, Final

from tracer.reader import Capture

__all__ = ["CONTENT_SECURITY", "capture_facts", "capture_page", "login_page", "message_page"]

STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }
th { font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid; border-radius: .3rem; }
"""
_HASH: Final = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
CONTENT_SECURITY: Final = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
MOST: Final = 10
"""Alternatives of a step."""


def capture_facts(capture: Capture, files: str, store: str) -> dict[str, Any]:
    """files: URL of the capture's Zarr group over HTTP, empty if it has none; store: its root, for `open_capture`."""
    reference = f"{capture.trace_id}/{capture.span_id}"
    data = capture.to_xarray()
    return {
        "ref": reference,
        "trace_id": capture.trace_id,
        "span_id": capture.span_id,
        "traced": capture.traced,
        "model": str(capture.attrs["model"]),
        "state": _state(capture),
        "complete": capture.complete,
        "prompt_tokens": capture.prompt_tokens,
        "steps": capture.num_steps,
        "arrays": {
            str(name): {"shape": list(array.shape), "dims": [str(dim) for dim in array.dims], "dtype": str(array.dtype)}
            for name, array in data.data_vars.items()
        },
        "missing": capture.missing,
        "step": None if capture.step_index is None else _step(capture, capture.step_index),
        "zarr": files,
        "open": f"open_capture({store!r}, {reference!r})",
    }


def _state(capture: Capture) -> str:
    if not capture.closed:
        return "being written, or left by a writer that died"
    return "complete" if capture.complete else f"incomplete ({capture.attrs['status']})"


def _step(capture: Capture, index: int) -> dict[str, Any]:
    """One step's numbers, and the best alternatives where logits were stored."""
    step = capture.steps[index]
    numbers = {name: getattr(step, name) for name in ("logprob", "entropy", "margin", "varentropy")}
    try:
        best = capture.topk(index, MOST)
    except KeyError:
        best = []
    token = next((token for token in capture.tokens if token.step == index), None)
    return {
        "index": index,
        "token_id": step.token_id,
        "text": None if token is None else token.text,
        "position": step.position,
        "rank": step.rank,
        **{name: number if isfinite(number) else None for name, number in numbers.items()},
        "alternatives": [
            {"token_id": one.token_id, "text": one.text, "logprob": one.logprob if isfinite(one.logprob) else None}
            for one in best
        ],
    }


def capture_page(facts: Mapping[str, Any]) -> str:
    """`capture_facts` for people."""
    rows = {
        "model": facts["model"],
        "state": facts["state"],
        "tokens": f"{facts['prompt_tokens']} of the prompt, {facts['steps']} generated",
        "trace": facts["trace_id"] + ("" if facts["traced"] else " (not sampled: it has no spans)"),
        "generation": facts["span_id"],
    }
    parts = [_table(rows)]
    if facts["step"] is not None:
        parts += _step_parts(facts["step"])
    shapes = {
        name: f"{' x '.join(map(str, array['shape']))}  ({', '.join(array['dims'])})  {array['dtype']}"
        for name, array in facts["arrays"].items()
    }
    parts += ["<h2>Arrays</h2>", _table(shapes)]
    if facts["missing"]:
        gaps = {entry["array"]: f"{entry['what']}: {entry['reason']}" for entry in facts["missing"]}
        parts += ["<h2>Missing</h2>", _table(gaps)]
    parts += ["<h2>Load it</h2>", f"<pre>from tracer import open_capture\n\ncap = {escape(facts['open'])}</pre>"]
    if facts["zarr"]:
        parts.append(f"<p>Zarr group: <code>{escape(facts['zarr'])}</code></p>")
    return _page(f"Capture {facts['ref']}", "".join(parts))


def _step_parts(step: Mapping[str, Any]) -> list[str]:
    names = ("token_id", "text", "position", "rank", "logprob", "entropy", "margin", "varentropy")
    out = [f"<h2>Step {step['index']}</h2>", _table({name: _show(step[name]) for name in names})]
    best = {str(one["token_id"]): f"{_show(one['text'])}  {_show(one['logprob'])}" for one in step["alternatives"]}
    return [*out, "<h3>Best tokens, log-probability in nats</h3>", _table(best)] if best else out


def _show(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4f}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)


def login_page(problem: str = "") -> str:
    """A form for a reading key."""
    said = f"<p><strong>{escape(problem)}</strong></p>" if problem else ""
    form = (
        '<form method="post" action="/tensorspan/login"><label>Reading key '
        '<input type="password" name="key" autocomplete="current-password" required></label> '
        "<button>Log in</button></form>"
    )
    return _page("Captures", said + form)


def message_page(title: str, text: str) -> str:
    """One paragraph."""
    return _page(title, f"<p>{escape(text)}</p>")


def _table(rows: Mapping[str, str]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>"
    )
