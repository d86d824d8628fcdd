"""The parts of the report, each from its data to HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from softdimo_fast.report import _html, _words
from softdimo_fast.report.contents import PictureRow, ReportData, SearchPairs
from softdimo_fast.report.curves import Curve, stage_curves
from softdimo_fast.report.grid import image_grid, png_bytes

# Images in one strip: two strips stand side by side on a desk, and one below the other on a phone.
STRIP = 8
# The side that one image is enlarged to, so that it stays sharp on dense screens.
SIDE = 96


def header(data: ReportData) -> str:
    """Title, and the run in one line."""
    bars = data.metrics["bars"]
    held = sum(bool(bar["holds"]) for bar in bars)
    checks = f'<a href="#checks">{held} of {len(bars)} checks hold</a>' if bars else "no checks"
    facts = [f"Seed {data.seed}", _html.duration(data.seconds), checks]
    line = "".join(f"<li>{fact}</li>" for fact in facts)
    return f'<header><h1>{_html.escape(data.title)}</h1><ul class="facts">{line}</ul></header>'


def picture(data: ReportData) -> str:
    """The rows of images, and the search before and after."""
    rows = "".join(_picture_row(row) for row in data.rows)
    note = f'<p class="note">{_html.escape(data.picture_note)}</p>' if data.picture_note else ""
    pairs = _pairs(data.pairs) if data.pairs is not None else ""
    return (
        f'<section aria-label="The picture"><div class="sheet">{rows}{pairs}</div>{note}</section>'
    )


def _scale(images: Tensor) -> int:
    return max(1, SIDE // int(images.shape[-1]))


def _image(images: Tensor, columns: int, alt: str) -> str:
    # Grey images are ink on paper; the style sheet turns them round where the page is dark.
    sheet = image_grid(images, columns, _scale(images), ink=True)
    kind = "grey" if images.shape[1] == 1 else "colour"
    return _html.picture(png_bytes(sheet), sheet.width, sheet.height, alt, kind)


def _picture_row(row: PictureRow) -> str:
    strips = []
    for start in range(0, len(row.images), STRIP):
        part = row.images[start : start + STRIP]
        alt = f"{row.label}: images {start + 1} to {start + len(part)} of {len(row.images)}"
        strips.append(_image(part, STRIP, alt))
    return _sheet_row(row.label, row.caption, f'<div class="strips">{"".join(strips)}</div>')


def _pairs(pairs: SearchPairs) -> str:
    figures = []
    for index, wanted in enumerate(pairs.wanted):
        both = [
            _image(images[index : index + 1], 1, f"{when} the search for {wanted}")
            for images, when in ((pairs.before, "before"), (pairs.after, "after"))
        ]
        figures.append(
            f"<figure>{both[0]}{both[1]}<figcaption>{_html.escape(wanted)}</figcaption></figure>"
        )
    caption = (
        "Above, drawn by chance; below, the same drawing after a few steps of search for the digit "
        "written under it."
    )
    return _sheet_row("Search, TTEO", caption, f'<div class="pairs">{"".join(figures)}</div>')


def _sheet_row(label: str, caption: str, body: str) -> str:
    return (
        f'<div class="row"><div class="words"><h3>{_html.escape(label)}</h3>'
        f"<p>{_html.escape(caption)}</p></div>{body}</div>"
    )


def words() -> str:
    """What was done, for somebody who has not heard of it."""
    steps = "".join(
        f"<li><h3>{_html.escape(name)}</h3><p>{_html.escape(text)}</p></li>"
        for name, text in _words.METHOD
    )
    body = f'<ol class="steps">{steps}</ol>'
    return _html.section("method", "What was done", body, _words.INTRODUCTION)


def results(data: ReportData) -> str:
    """The tables of measurements, and what their numbers mean."""
    rows = data.metrics["rows"]
    numbers = [*_words.NUMBERS, *(_words.CONTROL if "cfg2_control" in rows else ())]
    body = _metrics_table(rows) + _html.definitions(numbers, "meanings")
    return _html.section("results", "Results", body, _words.RESULTS)


def _metrics_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    known = {name for group in _words.METRIC_GROUPS for name in group}
    others = {name: name for name in rows if name not in known}
    columns = [name for name in _words.METRIC_COLUMNS if any(name in row for row in rows.values())]
    caption = "Generated images against kept-aside scans"
    counts = {row.get("n") for row in rows.values()}
    if len(counts) == 1 and "n" in columns:  # said once instead of in every row
        columns.remove("n")
        caption += f"; {_html.number(counts.pop(), 0)} images in each row"
    largest = max((_finite(row.get("fd")) for row in rows.values()), default=0.0) or 1.0
    bodies = []
    for group in (*_words.METRIC_GROUPS, others):
        present = {name: title for name, title in group.items() if name in rows}
        body = "".join(
            _metrics_row(title, rows[name], columns, largest) for name, title in present.items()
        )
        if body:
            bodies.append(body)
    headings = [_html.heading("Images from"), *(_heading(name) for name in columns)]
    return _html.table("metrics-table", caption, headings, bodies, "metrics")


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _heading(column: str) -> str:
    title, _, better = _words.METRIC_COLUMNS[column]
    return _html.heading(title, better, number=True, span=2 if column == "fd" else 1)


def _metrics_row(
    title: str, row: Mapping[str, Any], columns: Sequence[str], largest_fd: float
) -> str:
    cells = [f'<th scope="row">{_html.escape(title)}</th>']
    for column in columns:
        text = _html.number(row.get(column), _words.METRIC_COLUMNS[column][1])
        cells.append(f'<td class="num">{text}</td>')
        if column == "fd":
            cells.append(_html.gauge(_finite(row.get("fd")) / largest_fd))
    return f"<tr>{''.join(cells)}</tr>"


def search(data: ReportData) -> str:
    """Best-of-N and test-time optimization; nothing where none was measured."""
    found: Mapping[str, Mapping[str, Any]] = data.metrics["search"]
    if not found:
        return ""
    rows = []
    known = [name for name in _words.SEARCH if name in found]
    for name in [*known, *(name for name in found if name not in known)]:
        rate = found[name].get("hit_rate")
        rows.append(
            f'<tr><th scope="row">{_html.escape(_words.SEARCH.get(name, name))}</th>'
            f'<td class="num">{_html.number(found[name].get("fd"), 2)}</td>'
            f'<td class="num">{_html.number(rate, 3)}</td>{_html.gauge(_finite(rate))}</tr>'
        )
    headings = [
        _html.heading("Search"),
        _html.heading("FD", "lower", number=True),
        _html.heading("Hit rate", "higher", number=True, span=2),
    ]
    table = _html.table("search-table", "Drawing a wanted digit", headings, ["".join(rows)], "bars")
    return _html.section("search", "Search", table, _words.SEARCHING)


def checks(data: ReportData) -> str:
    """Every bar and whether it holds, those that do not first in words."""
    bars = data.metrics["bars"]
    if not bars:
        return ""
    missed = [str(bar["name"]) for bar in bars if not bar["holds"]]
    verdict = f"All {len(bars)} hold."
    if missed:
        verdict = f"{len(bars) - len(missed)} of {len(bars)} hold. Missed: {'; '.join(missed)}."
    rows = "".join(_check_row(bar) for bar in bars)
    headings = [
        _html.heading("Check"),
        *(_html.heading(name, number=True) for name in ("Value", "Bound", "Holds")),
    ]
    table = _html.table("checks-table", "What this run must reach", headings, [rows], "checks")
    return _html.section("checks", "Checks", table, verdict)


def _check_row(bar: Mapping[str, Any]) -> str:
    holds = bool(bar["holds"])
    word = '<span class="yes">✓ yes</span>' if holds else '<span class="no">✗ missed</span>'
    return (
        f'<tr><th scope="row">{_html.escape(_html.significant(str(bar["name"])))}</th>'
        f'<td class="num">{_html.escape(_html.significant(bar["value"]))}</td>'
        f'<td class="num">{_html.escape(_bound(bar))}</td><td class="num">{word}</td></tr>'
    )


def _bound(bar: Mapping[str, Any]) -> str:
    """The bound with its direction; a bare number's is told by the value and the verdict."""
    value, bound = bar["value"], bar["bound"]
    text = _html.significant(bound)
    plain = all(
        isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
        for one in (value, bound)
    )
    if not plain or value == bound:
        return text
    return f"≤ {text}" if (value < bound) == bool(bar["holds"]) else f"≥ {text}"


def curves(data: ReportData) -> str:
    """Loss curves of every stage that logged something, and the rest of its log on request."""
    found = [
        (stage, curve)
        for stage, records in data.logs.items()
        for curve in stage_curves(stage, records)
    ]
    if not found:
        return ""
    losses = [(stage, curve) for stage, curve in found if curve.is_loss]
    health = [(stage, curve) for stage, curve in found if not curve.is_loss]
    parts = [_charts(losses)] if losses else []
    if health:
        parts.append(_html.folded(f"Health: {len(health)} more curves", _charts(health)))
    return _html.section("curves", "Curves", "".join(parts), _words.CURVES)


def _charts(found: Sequence[tuple[str, Curve]]) -> str:
    charts = []
    for stage, curve in found:
        more = f", {curve.left_out} not finite" if curve.left_out else ""
        name = title(curve.name).lower() + more
        charts.append(
            f'<figure role="img" aria-label="{_html.escape(curve.description)}">'
            f'<figcaption aria-hidden="true"><b>{_html.escape(title(stage))}</b> '
            f"{_html.escape(name)}</figcaption>{curve.svg}</figure>"
        )
    return f'<div class="charts">{"".join(charts)}</div>'


def title(name: str) -> str:
    """A key as a name: ``grad_norm`` is ``Grad norm``."""
    text = name.replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def timings(data: ReportData) -> str:
    """How long each stage took."""
    if not data.stage_seconds:
        return ""
    longest = max(map(_finite, data.stage_seconds.values())) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{_html.escape(title(name))}</th>'
        f'<td class="num">{_html.duration(seconds)}</td>{_html.gauge(_finite(seconds) / longest)}</tr>'
        for name, seconds in data.stage_seconds.items()
    )
    total = (
        f'<tr><th scope="row">Whole run</th><td class="num">{_html.duration(data.seconds)}</td>'
        "<td></td></tr>"
    )
    headings = [_html.heading("Stage"), _html.heading("Time", number=True, span=2)]
    table = _html.table("time-table", "Time per stage", headings, [rows, total], "bars")
    lead = ""
    if sum(map(_finite, data.stage_seconds.values())) > data.seconds * 1.02:
        lead = "Stages ran side by side, so they add up to more than the whole run."
    return _html.section("timings", "Time", table, lead)


def origins(data: ReportData) -> str:
    """The command, versions and configurations that lead to this page again."""
    parts = []
    if data.command:
        parts.append(f'<pre tabindex="0">{_html.escape(data.command)}</pre>')
    if data.versions:
        parts.append(_html.definitions(list(data.versions.items()), "versions"))
    for name, text in data.configs.items():
        parts.append(
            _html.folded(
                f"Configuration: {title(name)}", f'<pre tabindex="0">{_html.escape(text)}</pre>'
            )
        )
    return _html.section("origins", "Versions", "".join(parts)) if parts else ""
