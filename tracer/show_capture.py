"""One capture in numbers and tables: what it holds, where the model was unsure, where its answer looked.

The numbers are plain data, which `tensorspan show --json` prints as it is; `deploy/demo.py` shows the same tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from tracer import schema
from tracer.errors import CaptureNotFoundError
from tracer.reader import Capture
from tracer.show import disk_bytes, plain_table, quoted, readable_bytes

__all__ = [
    "Look",
    "TextOf",
    "Uncertain",
    "array_facts",
    "array_table",
    "capture_facts",
    "capture_view",
    "least_certain",
    "load_lines",
    "look_table",
    "looked_at",
    "uncertain_table",
]

TextOf = Callable[[int], str | None]
"""Text of a token ID that a capture need not contain: a tokenizer's, where the caller has one."""
TEMPLATE: Final = "template"
BLOCK_STEPS: Final = 64
"""Steps of attention read at a time: one shard."""
BAR: Final = 24


@dataclass(frozen=True, slots=True)
class Uncertain:
    """An output token that the model was not sure of."""

    step: int
    span_id: str | None
    text: str
    probability: float
    entropy: float
    alternatives: tuple[tuple[str, float], ...]
    """(text, probability) of the best candidates, the chosen one among them."""


@dataclass(frozen=True, slots=True)
class Look:
    """Attention on one prompt token: the mean over the rows that predict the answer, layers and heads."""

    position: int
    text: str
    region: str | None
    weight: float


def least_certain(
    capture: Capture, count: int = 5, candidates: int = 4, text_of: TextOf | None = None
) -> list[Uncertain]:
    """The output tokens of highest entropy, with what else they could have been."""
    steps = [step for step in capture.steps if math.isfinite(step.entropy)]
    texts = {token.step: quoted(token.text, token.id) for token in capture.tokens if token.step is not None}
    return [
        Uncertain(
            step.index,
            step.span_id,
            texts.get(step.index, quoted(None, step.token_id)),
            math.exp(step.logprob),
            step.entropy,
            _alternatives(capture, step.index, candidates, text_of),
        )
        for step in sorted(steps, key=lambda step: -step.entropy)[:count]
    ]


def _alternatives(capture: Capture, step: int, count: int, text_of: TextOf | None) -> tuple[tuple[str, float], ...]:
    top = (capture.attrs["capture"].get("logits") or {}).get("top")
    try:
        best = capture.topk(step, min(count, top or count))
    except KeyError:  # No logits were asked for, or this row is missing.
        return ()
    known = text_of or (lambda _: None)
    return tuple((quoted(a.text or known(a.token_id), a.token_id), math.exp(a.logprob)) for a in best)


def looked_at(
    capture: Capture, *, layer: int | None = None, head: int | None = None, step: int | None = None
) -> list[Look]:
    """Attention on each prompt token, in order; empty if the capture holds no attention rows.

    layer, head, step: only that one instead of the mean. Raises CaptureNotFoundError naming what exists.
    """
    if schema.ATTENTION not in capture.arrays:
        return []
    weights = _mean_rows(capture, layer, head, step)
    return [Look(t.position, quoted(t.text, t.id), t.region, w) for t, w in zip(capture.tokens, weights, strict=False)]


def _mean_rows(capture: Capture, layer: int | None, head: int | None, step: int | None) -> list[float]:
    """Mean attention on the keys: of the prompt, or with a `step` of all its keys."""
    rows = capture.to_xarray()[schema.ATTENTION]
    for name, index in (("layer", layer), ("head", head)):
        if index is not None:
            rows = rows.isel({name: [_place(name, index, rows[name].to_numpy().tolist())]})
    steps = range(capture.num_steps) if step is None else [_place("step", step, list(range(capture.num_steps)))]
    keys = capture.prompt_tokens if step is None else capture.steps[step].kv_len
    total, counted = np.zeros(keys), 0
    for first in range(steps[0] if len(steps) else 0, (steps[-1] + 1) if len(steps) else 0, BLOCK_STEPS):
        block = rows.isel(step=slice(first, min(first + BLOCK_STEPS, steps[-1] + 1)), key_pos=slice(keys))
        means = block.to_numpy().mean(axis=(1, 2), dtype=np.float32)
        stored = means[means.any(axis=1)]
        total, counted = total + stored.sum(axis=0), counted + len(stored)
    return [float(value) for value in total / max(counted, 1)]


def _place(name: str, index: int, known: list[int]) -> int:
    if index not in known:
        shown = f"0 to {known[-1]}" if known == list(range(len(known))) and known else str(known)
        raise CaptureNotFoundError(f"{name} {index} is not in this capture; it has {shown}")
    return known.index(index)


def array_facts(capture: Capture) -> list[dict[str, Any]]:
    """Name, dimensions, type, bytes in memory and on disk (None for a remote store) of the big arrays."""
    data = capture.to_xarray()
    return [
        {
            "name": name,
            "shape": {str(dim): size for dim, size in data[name].sizes.items()},
            "dtype": str(data[name].dtype),
            "bytes": data[name].nbytes,
            "bytes_on_disk": disk_bytes(f"{capture.location}/{name}"),
        }
        for name in capture.arrays
        if name.startswith(("logits", "attention"))
    ]


def load_lines(capture: Capture) -> list[str]:
    """Python that opens this capture and looks into it."""
    store, _, _ = capture.location.rpartition(f"/{capture.trace_id}/")
    where = f'"{_absolute(store)}", "{capture.span_id}"' if store else f'"{_absolute(capture.location)}"'
    looks = [f"capture.{schema.LOGITS}.shape"] if schema.LOGITS in capture.arrays else []
    looks += [f"capture.attention[{layer}].shape" for layer in list(capture.attention)[-1:]]
    return [
        "from tracer import open_capture",
        f"capture = open_capture({where})",
        f"print({', '.join(['capture.text', *looks])})",
    ]


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).resolve())


def uncertain_table(items: Sequence[Uncertain]) -> RenderableType:
    """The least certain tokens, each with its alternatives."""
    table = plain_table(">step", "token", ">p", ">entropy", "alternatives")
    for item in items:
        others = "  ".join(f"{text} {probability:.2f}" for text, probability in item.alternatives)
        table.add_row(str(item.step), Text(item.text), f"{item.probability:.2f}", f"{item.entropy:.2f}", Text(others))
    return table


def look_table(looks: Sequence[Look], count: int = 12) -> RenderableType:
    """The tokens that got most attention; position 0, the sink, is left out and named."""
    rest = [look for look in looks if look.position > 0]
    top = sorted(rest, key=lambda look: -look.weight)[:count]
    table = plain_table(">position", "token", "from", ">attention", "")
    for look in sorted(top, key=lambda look: look.position):
        style = "dim" if look.region == TEMPLATE else ""
        bar = "█" * max(round(BAR * look.weight / max(top[0].weight, 1e-9)), 0)
        cells = (str(look.position), look.text, look.region or "answer", f"{look.weight:.4f}", bar)
        table.add_row(*(Text(cell, style=style) for cell in cells))
    first = looks[0].weight if looks else 0.0
    note = f"position 0, where heads rest, took {first:.2f} and is left out; {len(rest)} others shared the rest"
    return Group(table, Text(note, style="dim"))


def array_table(facts: Sequence[dict[str, Any]]) -> RenderableType:
    """The arrays of `array_facts`."""
    table = plain_table("array", "shape", "type", ">in memory", ">on disk")
    for fact in facts:
        shape = "  ".join(f"{dim} {size}" for dim, size in fact["shape"].items())
        sizes = (readable_bytes(fact["bytes"]), readable_bytes(fact["bytes_on_disk"]))
        table.add_row(fact["name"], shape, fact["dtype"], *sizes)
    return table


def capture_facts(
    capture: Capture, *, step: int | None = None, layer: int | None = None, head: int | None = None
) -> dict[str, Any]:
    """Everything that `tensorspan show` prints, as plain data."""
    facts: dict[str, Any] = {
        "trace_id": capture.trace_id,
        "traced": capture.traced,
        "spans_lost": capture.spans_lost,
        "span_id": capture.span_id,
        "location": capture.location,
        "model": capture.attrs["model"],
        "status": capture.attrs.get("status", "open"),
        "complete": capture.complete,
        "missing": capture.missing,
        "prompt_tokens": capture.prompt_tokens,
        "output_tokens": capture.num_steps,
        "prompt": capture.prompt_text,
        "answer": capture.text,
        "arrays": array_facts(capture),
        "bytes_on_disk": disk_bytes(capture.location),
        "load": load_lines(capture),
    }
    if step is None:
        facts["least_certain"] = [asdict(item) for item in least_certain(capture)]
    else:
        _place("step", step, list(range(capture.num_steps)))
        chosen = asdict(capture.steps[step])
        facts["step"] = {**chosen, "time": str(chosen["time"])}
        facts["alternatives"] = _alternatives(capture, step, 10, None)
    facts["looked_at"] = [asdict(look) for look in looked_at(capture, layer=layer, head=head, step=step)]
    facts["looked_at_of"] = {"step": step, "layer": layer, "head": head}
    return facts


def capture_view(capture: Capture, facts: dict[str, Any]) -> RenderableType:
    """`facts` for people."""
    state = "complete" if capture.complete else f"incomplete ({facts['status']})"
    counts = f"{capture.prompt_tokens} prompt + {capture.num_steps} output tokens"
    state += "" if capture.traced else ", no trace (not sampled)"
    state += f", spans lost ({capture.spans_lost})" if capture.spans_lost else ""
    parts: list[RenderableType] = [
        Text(f"{capture.trace_id}/{capture.span_id}  {facts['model']}  {counts}  {state}", style="bold"),
        *(_heading("prompt", capture.prompt_text or "(token texts were not stored)")),
        *(_heading("answer", capture.text or "(token texts were not stored)")),
        *(_heading(f"arrays in {capture.location} ({readable_bytes(facts['bytes_on_disk'])})")),
        array_table(facts["arrays"]),
    ]
    if "step" in facts:
        parts += _step_view(facts)
    else:
        parts += [*_heading("least certain tokens"), uncertain_table([_uncertain(i) for i in facts["least_certain"]])]
    if facts["looked_at"]:
        parts += [*_heading(_look_title(facts)), look_table([Look(**look) for look in facts["looked_at"]])]
    if facts["missing"]:
        lines = [f"{entry['array']}: {entry['what']}: {entry['reason']}" for entry in facts["missing"]]
        parts += _heading("missing", "\n".join(lines))
    return Group(*parts, *_heading("load it", "\n".join(facts["load"])))


def _heading(title: str, text: str | None = None) -> list[RenderableType]:
    out: list[RenderableType] = [Text(), Text(title, style="bold cyan")]
    return out if text is None else [*out, Text(text)]


def _step_view(facts: dict[str, Any]) -> list[RenderableType]:
    step = facts["step"]
    numbers = "  ".join(f"{name} {step[name]:.3f}" for name in ("logprob", "entropy", "margin", "varentropy"))
    line = f"span {step['span_id']}  position {step['position']}  rank {step['rank']}  {numbers}"
    table = plain_table("candidate", ">p")
    for text, probability in facts["alternatives"]:
        table.add_row(Text(text), f"{probability:.4f}")
    return [*_heading(f"step {step['index']}: token {step['token_id']}", line), table]


def _look_title(facts: dict[str, Any]) -> str:
    of = facts["looked_at_of"]
    means = [f"{name} {of[name]}" for name in ("step", "layer", "head") if of[name] is not None]
    means += [f"all {name}s" for name in ("step", "layer", "head") if of[name] is None]
    return f"where the answer looked ({', '.join(means)})"


def _uncertain(item: dict[str, Any]) -> Uncertain:
    return Uncertain(**item)
