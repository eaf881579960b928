"""What `tensorspan list` and `tree` print, and how a token or a size is shown."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from tracer import semconv
from tracer.printable import printable
from tracer.reader import Capture, CaptureEntry, Token
from tracer.spans_file import Span, Trace
from tracer.store_files import tree_bytes

__all__ = [
    "capture_table",
    "disk_bytes",
    "emit",
    "plain_table",
    "quoted",
    "readable_bytes",
    "span_facts",
    "token_texts",
    "trace_table",
]

PLAIN_WIDTH: Final = 200
"""Columns where the output is a pipe or a file: nothing is cut off there that a terminal would show."""

# -- numbers -------------------------------------------------------------------------------------------------------


def disk_bytes(location: str) -> int | None:
    """Bytes of all files below a local path; None for a URL."""
    if "://" in location:
        return None
    return tree_bytes(Path(location))


def token_texts(captures: Iterable[Capture]) -> dict[str, list[Token]]:
    """The tokens of each captured generation, by its span ID: what `trace_table` names positions with."""
    return {capture.span_id: capture.tokens for capture in captures}


def span_facts(span: Span, tokens: Mapping[str, Sequence[Token]]) -> dict[str, Any]:
    """A span and all below it as JSON."""
    facts: dict[str, Any] = {
        "name": span.name,
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "start_ns": span.start_ns,
        "duration_ms": _milliseconds(span),
        "error": span.error,
        "attributes": span.attributes,
        "children": [span_facts(child, tokens) for child in span.children],
    }
    if span.is_step:
        facts["token"] = _step_token(span, tokens.get(span.parent_id or "", ()))
    return facts


# -- tables --------------------------------------------------------------------------------------------------------


def capture_table(entries: Sequence[CaptureEntry]) -> RenderableType:
    """Captures of a store, one a line."""
    table = plain_table("started", "trace/span", "model", ">tokens", ">on disk", "state")
    for entry in entries:
        output = "?" if entry.output_tokens is None else str(entry.output_tokens)
        table.add_row(
            datetime.fromtimestamp(entry.start_ns / 1e9, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            f"{entry.trace_id}/{entry.span_id}",
            Text(entry.model.rstrip("/").rpartition("/")[2]),
            f"{entry.prompt_tokens}+{output}",
            readable_bytes(disk_bytes(entry.path)),
            "complete" if entry.complete else Text(f"incomplete ({entry.status})", style="yellow"),
        )
    return table


def trace_table(trace: Trace, tokens: Mapping[str, Sequence[Token]], limit: int = 64) -> RenderableType:
    """The span tree with each step's statistics; `limit` steps per generation."""
    table = plain_table("span", "token", ">p", ">entropy", ">margin", ">sink", ">prompt", "strongest look", ">ms")
    for root in trace.roots:
        _add_span(table, root, tokens, "", "", limit)
    return table


def _add_span(
    table: Table, span: Span, tokens: Mapping[str, Sequence[Token]], lead: str, indent: str, limit: int
) -> None:
    name = Text(f"{lead}{_title(span)}", style="" if span.is_step else "bold")
    if span.error:
        name.append(f"  {span.error}", style="red")
    table.add_row(name, *_step_cells(span, tokens.get(span.parent_id or "", ())), f"{_milliseconds(span):.1f}")
    shown = [child for at, child in enumerate(span.children) if at < limit or not child.is_step]
    hidden = len(span.children) - len(shown)
    for at, child in enumerate(shown):
        last = at == len(shown) - 1 and not hidden
        _add_span(
            table, child, tokens, f"{indent}{'└─ ' if last else '├─ '}", indent + ("   " if last else "│  "), limit
        )
    if hidden:
        table.add_row(Text(f"{indent}└─ … {hidden} more steps (--steps)", style="dim"), *[""] * 8)


def _title(span: Span) -> str:
    attributes = span.attributes
    if span.is_generation:
        reasons = ", ".join(attributes.get(semconv.RESPONSE_FINISH_REASONS, ()))
        model = str(attributes.get(semconv.REQUEST_MODEL, "")).rstrip("/").rpartition("/")[2]
        counts = f"{attributes.get(semconv.GENERATION_PROMPT_TOKENS, attributes.get(semconv.USAGE_INPUT_TOKENS, '?'))}"
        return (
            f"{attributes[semconv.OPERATION_NAME]} {model}  {counts} → "
            f"{attributes.get(semconv.USAGE_OUTPUT_TOKENS, '?')} tokens, {reasons}"
        )
    rows = attributes.get(semconv.STEP_TOKENS, 1)
    status = attributes.get(semconv.HTTP_STATUS_CODE)
    return f"{span.name}{f' ({rows} tokens)' if rows > 1 else ''}{f'  {status}' if status else ''}"


def _step_cells(span: Span, tokens: Sequence[Token]) -> list[RenderableType]:
    attributes = span.attributes
    logprob = attributes.get(semconv.CHOSEN_LOGPROB)
    numbers = (
        None if logprob is None else math.exp(logprob),
        attributes.get(semconv.LOGITS_ENTROPY),
        attributes.get(semconv.LOGITS_MARGIN),
        attributes.get(semconv.ATTENTION_SINK_MASS),
        attributes.get(semconv.ATTENTION_PROMPT_MASS),
    )
    token = _step_token(span, tokens) if span.is_step else None
    return [
        Text("" if token is None else token),
        *("" if number is None else f"{number:.2f}" for number in numbers),
        Text(_strongest(attributes, tokens)),
    ]


def _step_token(span: Span, tokens: Sequence[Token]) -> str | None:
    """The token that a step predicted: its text from the capture, else its ID from the span (content opt-in)."""
    found = next((token for token in tokens if token.step == span.step), None) if span.step is not None else None
    if found is not None:
        return quoted(found.text, found.id)
    number = span.attributes.get(semconv.CHOSEN_ID)
    return None if number is None else quoted(None, number)


def _strongest(attributes: Mapping[str, Any], tokens: Sequence[Token]) -> str:
    position = attributes.get(semconv.ATTENTION_TOP_POSITION)
    if position is None:
        return ""
    name = quoted(tokens[position].text, tokens[position].id) if position < len(tokens) else f"position {position}"
    where = f"L{attributes[semconv.ATTENTION_TOP_LAYER]} H{attributes[semconv.ATTENTION_TOP_HEAD]}"
    return f"{attributes.get(semconv.ATTENTION_TOP_WEIGHT, 0):.2f} {name} ({where})"


def quoted(text: str | None, token_id: int) -> str:
    """A token in a table: visible spaces and line breaks; its ID where the text is not known."""
    return f"#{token_id}" if text is None else repr(text)


def readable_bytes(count: int | None) -> str:
    """`1.2 MB`; empty for an unknown size."""
    if count is None:
        return ""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.3g} {units[0]}"


def _milliseconds(span: Span) -> float:
    return (span.end_ns - span.start_ns) / 1e6


class _SafeConsole(Console):
    """Shows control characters in other people's text instead of obeying them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def emit(*parts: RenderableType) -> None:
    """Print: in colour and in the window's width on a terminal; plain, wide and without trailing blanks elsewhere."""
    if sys.stdout.isatty():
        _SafeConsole(highlight=False).print(*parts, sep="\n")
        return
    console = _SafeConsole(highlight=False, width=PLAIN_WIDTH)
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    sys.stdout.flush()


def plain_table(*columns: str) -> Table:
    """Columns whose name begins with `>` are numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        number = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if number else "left", no_wrap=column != "alternatives")
    return table
