"""Ratios of an operator as a chart: a line for each case, a mark for each comparator, on a log scale.

Marks are small inline SVGs placed by share of the line's width, labels are text of the page: the chart is as
wide as the page is, and has no fonts or colours of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from softdimo_fast.benchmark.cases import Case
from softdimo_fast.benchmark.results import Results, Row, in_order
from softdimo_fast.benchmark.settings import HUGE_PAGES
from softdimo_fast.benchmark.tables import device_kind, number
from softdimo_fast.report._html import escape

# Marks by comparator, in the order of the table; a fifth begins again.
SHAPES = (
    '<circle cx="6" cy="6" r="4"/>',
    '<rect x="2.5" y="2.5" width="7" height="7"/>',
    '<polygon points="6,1 11,6 6,11 1,6"/>',
    '<polygon points="6,1.5 11,10 1,10"/>',
)
# Ticks that fit side by side on a phone.
TICKS = 6


def chart(results: Results, operator: str) -> str:
    """A ``<figure>`` of the operator's ratios in its longest phase; empty where there are none."""
    rows = [row for row in results.matching(operator=operator) if not row.backend]
    phases = {row.phase for row in rows}
    phase = next((one for one in ("both", "forward", "backward") if one in phases), None)
    rows = [row for row in rows if row.phase == phase]
    if not rows:
        return ""
    names = in_order(row.implementation for row in rows)
    low, high = limits([row.ratio for row in rows])
    ticks = _ticks(low, high)
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.shape, row.variant, row.dtype), []).append(row)
    lines = []
    for (shape, variant, dtype), mine in cases.items():
        title = f"{Case(operator, shape, dtype, variant).title(device_kind(results))}, {dtype}"
        marks = "".join(
            _mark(row, names.index(row.implementation), position(row.ratio, low, high))
            for row in mine
        )
        lines.append(f"<li><p>{escape(title)}</p>{_track(ticks, low, high, marks)}</li>")
    caption = f"{operator}, {phase}: time over ours; right of 1 ours is faster"
    return (
        f'<figure class="plot"><figcaption>{escape(caption)}</figcaption>{_legend(names, rows)}'
        f'<ol><li><p></p><div class="track axis" aria-hidden="true">{_axis(ticks, low, high)}</div></li>'
        f"{''.join(lines)}</ol></figure>"
    )


def limits(ratios: Sequence[float]) -> tuple[float, float]:
    """Powers of two around all ratios and 1."""
    low = 2.0 ** math.floor(math.log2(min(*ratios, 1.0) * 0.98))
    high = 2.0 ** math.ceil(math.log2(max(*ratios, 1.0) * 1.02))
    return low, high


def position(ratio: float, low: float, high: float) -> float:
    """Where a ratio lies, in percent of the line."""
    return 100 * math.log(ratio / low) / math.log(high / low)


def _ticks(low: float, high: float) -> list[float]:
    """Powers of two, 1 among them, as many as fit."""
    steps = round(math.log2(high / low))
    every = max(1, math.ceil(steps / TICKS))
    first = round(math.log2(low))
    return [2.0**power for power in range(first, first + steps + 1) if power % every == 0]


def _axis(ticks: Sequence[float], low: float, high: float) -> str:
    return "".join(
        f'<span style="left:{position(tick, low, high):.1f}%">{number(tick)}</span>'
        for tick in ticks
    )


def _track(ticks: Sequence[float], low: float, high: float, marks: str) -> str:
    lines = "".join(
        f'<i{" class=one" if tick == 1 else ""} style="left:{position(tick, low, high):.1f}%"></i>'
        for tick in ticks
    )
    return f'<div class="track">{lines}{marks}</div>'


def _mark(row: Row, place: int, left: float) -> str:
    """Filled with the default allocator, hollow with huge pages."""
    words = f"{row.implementation}, {row.allocator}: {number(row.ratio)}"
    kind = "huge" if row.allocator == HUGE_PAGES else "plain"
    return (
        f'<svg class="{kind}" viewBox="0 0 12 12" style="left:{left:.1f}%" role="img" '
        f'aria-label="{escape(words)}"><title>{escape(words)}</title>{SHAPES[place % len(SHAPES)]}</svg>'
    )


def _legend(names: Sequence[str], rows: Sequence[Row]) -> str:
    pairs = [("plain", SHAPES[place % len(SHAPES)], name) for place, name in enumerate(names)]
    if any(row.allocator == HUGE_PAGES for row in rows):
        pairs.append(("huge", SHAPES[0], "hollow: with huge pages"))
    items = "".join(
        f'<li><svg class="{kind}" viewBox="0 0 12 12" aria-hidden="true">{shape}</svg>{escape(text)}</li>'
        for kind, shape, text in pairs
    )
    return f'<ul class="legend">{items}</ul>'
