"""The figure of the docs, as an SVG written by hand: ms added to a decode step, by context and by captured rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from tests.benchmarks.context import Point

__all__ = ["draw"]

Line = tuple[str, list[tuple[float, float]]]

WIDTH: Final = 380
HEIGHT: Final = 300
LEFT: Final = 48
RIGHT: Final = 76
TOP: Final = 34
BOTTOM: Final = 46
BLUES: Final = ("#9ecae1", "#6baed6", "#3182bd", "#08519c", "#062a5e")
"""Light to dark, as the lines' numbers grow."""
STYLE: Final = (
    "text{font:11px sans-serif;fill:#333}.title{font-size:12px;font-weight:bold}"
    ".grid{stroke:#ddd}.axis{stroke:#888}.line{fill:none;stroke-width:2}"
)


def draw(points: Sequence[Point]) -> str:
    """The whole SVG file."""
    contexts, rows = sorted({p.context for p in points}), sorted({p.rows for p in points})
    by_rows: list[Line] = [
        (f"{count} row{'s' * (count != 1)}", sorted((p.context, p.added_ms) for p in points if p.rows == count))
        for count in rows
    ]
    by_context: list[Line] = [
        (f"{keys:,} keys", sorted((p.rows, p.added_ms) for p in points if p.context == keys)) for keys in contexts
    ]
    top = _ceiling(max([p.added_ms for p in points] + [0.1]))
    floor = min([p.added_ms for p in points] + [0.0])
    parts = [
        _panel(0, "by context", "keys before the step", by_rows, contexts, (floor, top)),
        _panel(WIDTH, "by captured rows", "captured rows of 8", by_context, rows, (floor, top)),
    ]
    title = "Milliseconds that attention capture adds to a decode step of 8 requests, by context and by captured rows"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT}" role="img">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n"
        f'<rect width="{2 * WIDTH}" height="{HEIGHT}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(
    x0: int, title: str, label: str, lines: Sequence[Line], ticks: Sequence[int], span: tuple[float, float]
) -> str:
    floor, top = span
    last = max(ticks)

    def x(value: float) -> float:
        return x0 + LEFT + (WIDTH - LEFT - RIGHT) * value / last

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - floor) / (top - floor)

    out = [f'<text class="title" x="{x0 + LEFT}" y="18">ms added per step, {title}</text>']
    for value in [top * step / 4 for step in range(5)]:
        out.append(f'<path class="grid" d="M{x(0):.1f} {y(value):.1f}H{x(last):.1f}"/>')
        out.append(f'<text x="{x(0) - 6:.1f}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    out.append(f'<path class="axis" d="M{x(0):.1f} {y(0):.1f}H{x(last):.1f}"/>')
    out += [f'<text x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{t:,}</text>' for t in ticks]
    out.append(f'<text x="{x(last / 2):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{label}</text>')
    label_y = math.inf
    for at, (name, line) in sorted(enumerate(lines), key=lambda item: item[1][1][-1][1]):
        colour = BLUES[round(at * (len(BLUES) - 1) / max(len(lines) - 1, 1))]
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line)
        out.append(f'<path class="line" stroke="{colour}" d="M{path}"/>')
        out += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>' for a, b in line]
        # Labels of close lines move up, so that none covers another.
        label_y = min(y(line[-1][1]) + 4, label_y - 12)
        out.append(f'<text x="{x(line[-1][0]) + 7:.1f}" y="{label_y:.1f}">{name}</text>')
    return "\n".join(out)


def _ceiling(value: float) -> float:
    """The next of 1, 2, 4, 10, 20, 40, ... times a power of ten: its quarters are short numbers."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value - 1e-9)
