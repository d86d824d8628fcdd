"""Ratios as one inline SVG an operator: a line for each case, a mark for each comparator, on a log scale.

The drawing is as wide as a phone, has no colours or fonts of its own, and takes those of the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from softdimo_fast.benchmark.cases import Case
from softdimo_fast.benchmark.results import Results, Row, in_order
from softdimo_fast.benchmark.settings import DEFAULT, HUGE_PAGES
from softdimo_fast.benchmark.tables import device_kind, number
from softdimo_fast.report._html import escape

WIDTH, LINE, TOP, SIDE = 340, 34, 22, 8
# Marks by comparator, in the order of the table; a fifth begins again.
SHAPES = ("circle", "square", "diamond", "triangle")


def chart(results: Results, operator: str) -> str:
    """An ``<svg>`` of the operator's ratios in its longest phase; empty where there is none."""
    rows = [row for row in results.matching(operator=operator) if not row.backend]
    phases = {row.phase for row in rows}
    phase = next((one for one in ("both", "forward", "backward") if one in phases), None)
    rows = [row for row in rows if row.phase == phase]
    if not rows:
        return ""
    names = in_order(row.implementation for row in rows)
    cases = in_order("\0".join((row.shape, row.variant, row.dtype)) for row in rows)
    low, high = _range([row.ratio for row in rows])
    kind = device_kind(results)
    parts = [_grid(low, high, len(cases))]
    for line, case in enumerate(cases):
        shape, variant, dtype = case.split("\0")
        y = TOP + LINE * line
        title = f"{Case(operator, shape, dtype, variant).title(kind)}, {dtype}"
        parts.append(f'<text x="{SIDE}" y="{y + 12}" class="label">{escape(title)}</text>')
        mine = [
            row for row in rows if (row.shape, row.variant, row.dtype) == (shape, variant, dtype)
        ]
        parts += [
            _mark(row, names.index(row.implementation), _x(row.ratio, low, high), y + 22)
            for row in mine
        ]
    height = TOP + LINE * len(cases) + 6
    label = f"{operator}, {phase}: times over ours, {number(low, 2)} to {number(high, 2)}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" class="ratios" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>{_legend(names, rows)}"
    )


def _range(ratios: Sequence[float]) -> tuple[float, float]:
    """Powers of two around all ratios and 1."""
    low = 2.0 ** math.floor(math.log2(min(*ratios, 1.0) * 0.98))
    high = 2.0 ** math.ceil(math.log2(max(*ratios, 1.0) * 1.02))
    return low, high


def _x(ratio: float, low: float, high: float) -> float:
    share = math.log(ratio / low) / math.log(high / low)
    return SIDE + 4 + share * (WIDTH - 2 * SIDE - 8)


def _grid(low: float, high: float, count: int) -> str:
    """A line at every power of two, a strong one at 1."""
    bottom = TOP + LINE * count
    steps = round(math.log2(high / low))
    every = max(1, math.ceil(steps / 8))
    lines = []
    for step in range(steps + 1):
        ratio = low * 2.0**step
        x = _x(ratio, low, high)
        one = ratio == 1
        if step % every and not one:
            continue
        kind = "one" if one else "step"
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="{kind}"/>')
        lines.append(
            f'<text x="{x:.1f}" y="{TOP - 8}" class="tick" text-anchor="middle">{number(ratio)}</text>'
        )
    return "".join(lines)


def _mark(row: Row, place: int, x: float, y: float) -> str:
    """Filled with the default allocator, hollow with huge pages."""
    kind = "huge" if row.allocator == HUGE_PAGES else "plain"
    words = f"{row.implementation}, {row.allocator}: {number(row.ratio)}"
    return f'<g class="{kind}"><title>{escape(words)}</title>{_shape(place, x, y)}</g>'


def _shape(place: int, x: float, y: float) -> str:
    name = SHAPES[place % len(SHAPES)]
    if name == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if name == "square":
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    corners = (
        ((0, -5), (5, 0), (0, 5), (-5, 0)) if name == "diamond" else ((0, -5), (5, 4), (-5, 4))
    )
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}"/>'


def _legend(names: Sequence[str], rows: Sequence[Row]) -> str:
    items = [
        f'<li><svg viewBox="0 0 12 12" aria-hidden="true"><g class="plain">{_shape(place, 6, 6)}</g></svg>'
        f"{escape(name)}</li>"
        for place, name in enumerate(names)
    ]
    if {row.allocator for row in rows} == {DEFAULT, HUGE_PAGES}:
        items.append(
            f'<li><svg viewBox="0 0 12 12" aria-hidden="true"><g class="huge">{_shape(0, 6, 6)}</g></svg>'
            "hollow: huge pages</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'
