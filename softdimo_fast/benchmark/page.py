"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from softdimo_fast.benchmark import bars, plots, tables, words
from softdimo_fast.benchmark.machine import mkl_sentence
from softdimo_fast.benchmark.results import Results
from softdimo_fast.benchmark.tables import Cell, Table
from softdimo_fast.report import _html

# What the page may load: nothing from outside. A browser holds it to that.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Facts that stand in the page's head; all of them are at its end.
HEAD = ("processor", "device", "threads", "torch", "C++ kernels", "commit", "date")


def render(results: Results) -> str:
    """The page as text; the same results give the same text."""
    style = "".join(
        resources.files(package).joinpath("style.css").read_text(encoding="utf-8")
        for package in ("softdimo_fast.report", "softdimo_fast.benchmark")
    )
    parts = [
        _bars(results),
        _ceilings(results),
        *(_operator(results, name) for name in tables.operators(results)),
        _missing(results),
        _method(results),
        _origins(results),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_html.escape(words.TITLE)}</title>\n"
        f'<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n'
        f"{_header(results)}\n<main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(results: Results) -> str:
    verdicts = bars.judge(results)
    met = sum(bool(one.met) for one in verdicts)
    facts = [_html.escape(f"{results.machine[name]}") for name in HEAD if name in results.machine]
    if "threads" in results.machine:
        facts = [
            fact + (" threads" if fact == results.machine["threads"] else "") for fact in facts
        ]
    facts.append(f'<a href="#bars">{met} of {len(verdicts)} bars met</a>')
    line = "".join(f"<li>{fact}</li>" for fact in facts)
    return f'<header><h1>{_html.escape(words.TITLE)}</h1><ul class="facts">{line}</ul></header>'


def _bars(results: Results) -> str:
    table = tables.bar_table(results)
    body = _table("bars-table", table) if table.groups else '<p class="note">None was measured.</p>'
    return _html.section("bars", "Bars", body, words.BAR_WORDS)


def _ceilings(results: Results) -> str:
    note = ""
    if results.machine:
        note = f'<p class="note">{_html.escape(mkl_sentence(results.machine))}</p>'
    body = _table("ceilings-table", tables.ceilings(results)) + note
    return _html.section("ceilings", "Ceilings", body, words.CEILING_WORDS)


def _operator(results: Results, name: str) -> str:
    more = tables.details(results, name)
    body = (
        plots.chart(results, name)
        + _table(f"{name}-ratios", tables.ratios(results, name))
        + _html.folded("Memory, errors, compilation", _table(f"{name}-details", more))
    )
    return _html.section(name, name, body, tables.in_short(results, name))


def _missing(results: Results) -> str:
    if not results.missing:
        return ""
    return _html.section("missing", "Not run", _table("missing-table", tables.missing(results)))


def _method(results: Results) -> str:
    body = _html.definitions([*words.METHOD, *tables.comparators(results)], "meanings")
    return _html.section("method", "How it was measured", body, words.INTRODUCTION)


def _origins(results: Results) -> str:
    body = _html.definitions(list(results.machine.items()), "versions")
    return _html.section("origins", "Where it comes from", body)


def _table(anchor: str, table: Table) -> str:
    headings = [_html.heading(text, number=right) for text, right in table.headings]
    bodies = ["".join(_row(row) for row in group) for group in table.groups]
    return _html.table(anchor, table.caption, headings, bodies, "measured")


def _row(row: Sequence[Cell]) -> str:
    first, *others = row
    cells = [f'<th scope="row">{_html.escape(first.text)}</th>', *map(_cell, others)]
    return f"<tr>{''.join(cells)}</tr>"


def _cell(cell: Cell) -> str:
    text = _html.escape(cell.text)
    if cell.kind in ("yes", "no"):
        return f'<td class="num"><span class="{cell.kind}">{text}</span></td>'
    return f'<td class="{cell.kind}">{text}</td>' if cell.kind else f"<td>{text}</td>"
