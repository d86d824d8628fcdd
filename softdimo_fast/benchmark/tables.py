"""The report's tables as data, and their Markdown; ``page`` shows the same ones as HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from softdimo_fast.benchmark import bars, words
from softdimo_fast.benchmark.bars import Verdict
from softdimo_fast.benchmark.cases import Case
from softdimo_fast.benchmark.machine import mkl_sentence
from softdimo_fast.benchmark.results import Results, Row, in_order
from softdimo_fast.benchmark.settings import DEFAULT, HUGE_PAGES
from softdimo_fast.benchmark.workloads.names import MEANINGS

DASH = "\N{EN DASH}"
THP = "THP"


@dataclass(frozen=True)
class Cell:
    """A text, and what it is: "" for words, "num", "yes" or "no" (a bar missed, a ratio that loses)."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A caption, headings (with whether numbers stand below) and rows, in groups that belong together."""

    caption: str
    headings: Sequence[tuple[str, bool]]
    groups: Sequence[Sequence[Sequence[Cell]]]


def number(value: float | None, digits: int = 3) -> str:
    """In so many significant digits, without an exponent where it can be; a dash for None."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}"
        return f"{value:.0f}" if "e" in text else text
    return f"{value:.{max(digits - 2, 0)}e}".replace("e-0", "e-")


def device_kind(results: Results) -> str:
    """Where it was measured."""
    return "cuda" if "device" in results.machine else "cpu"


def operators(results: Results) -> list[str]:
    """Those that were measured."""
    return in_order(row.operator for row in results.rows)


def ceilings(results: Results) -> Table:
    """What the machine can do, by allocator."""
    allocators = list(results.ceilings)
    rows = []
    for name, (title, unit) in words.CEILINGS.items():
        values = [results.ceilings[one].get(name) for one in allocators]
        shown = [Cell(number(None if v is None else v / 1e9), "num") for v in values]
        rows.append([Cell(title), *shown, Cell(unit)])
    headings = [("measured", False), *((words.ALLOCATORS[one], True) for one in allocators)]
    return Table("Ceilings, each the best of many calls", [*headings, ("", False)], [rows])


def bar_line(verdict: Verdict) -> str:
    """A bar in one line of text."""
    cells = _bar_cells(verdict, "cpu")
    case, dtype, phase, what, bound, here, *_ = (cell.text for cell in cells)
    return f"{verdict.bar.case.operator}, {case}, {dtype}, {phase}: {what} {here} ({bound})"


def bar_table(results: Results) -> Table:
    """Every bar that has a number, by operator."""
    verdicts = bars.judge(results)
    names = in_order(one.bar.case.operator for one in verdicts)
    kind = device_kind(results)
    groups = []
    for name in names:
        mine = [one for one in verdicts if one.bar.case.operator == name]
        groups.append([[Cell(name), *_bar_cells(one, kind)] for one in mine])
    headings = [
        *((text, False) for text in ("operator", "case", "dtype", "phase", "what")),
        *(
            (text, True)
            for text in ("bar", "measured", f"bar {THP}", f"measured {THP}", "at the floor", "met")
        ),
    ]
    return Table("Bars, and what was measured", headings, groups)


def _bar_cells(verdict: Verdict, kind: str) -> list[Cell]:
    bar = verdict.bar
    sign = "≥" if bar.metric in (bars.RATIO, bars.SHARE) else "≤"
    what = f"over {bar.against}" if bar.metric == bars.RATIO else words.METRICS[bar.metric]
    met = {True: Cell("✓ yes", "yes"), False: Cell("✗ no", "no"), None: Cell(DASH)}[verdict.met]
    huge = DASH if bar.bound_huge is None else f"{sign} {number(bar.bound_huge)}"
    return [
        Cell(bar.case.title(kind)),
        Cell(bar.case.dtype),
        Cell(bar.phase),
        Cell(what),
        Cell(f"{sign} {number(bar.bound)}", "num"),
        Cell(number(verdict.measured), "num"),
        Cell(huge, "num"),
        Cell(number(verdict.measured_huge), "num"),
        Cell(number(verdict.limit), "num"),
        met,
    ]


def ratios(results: Results, operator: str) -> Table:
    """One line a case and phase: ours, its share of the ceiling, and every comparator's time over ours."""
    mine = list(results.matching(operator=operator))
    here = [row for row in mine if row.allocator == DEFAULT]
    huge = {row.key[1:]: row for row in mine if row.allocator == HUGE_PAGES}
    comparators = in_order(row.implementation for row in here if not row.backend)
    kind = device_kind(results)
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in here:
        lines.setdefault((row.shape, row.variant, row.dtype, row.phase), {})[row.implementation] = (
            row
        )
    groups: dict[tuple[str, ...], list[list[Cell]]] = {}
    for (shape, variant, dtype, phase), found in lines.items():
        ours = next(row for row in found.values() if row.backend)
        title = Case(operator, shape, dtype, variant).title(kind)
        cells = [
            Cell(title),
            Cell(dtype),
            Cell(phase),
            Cell(f"{number(ours.median_ms)}", "num"),
            Cell(f"{number(ours.low_ms)} {DASH} {number(ours.high_ms)}", "num"),
            Cell(_share(ours), "num"),
        ]
        for name in comparators:
            there = found.get(name)
            cells.append(_ratio(there))
            if huge:
                cells.append(_ratio(None if there is None else huge.get(there.key[1:])))
        groups.setdefault((shape, variant, dtype), []).append(cells)
    headings = [
        *((text, False) for text in ("case", "dtype", "phase")),
        *((text, True) for text in ("ours, ms", "20 to 80 %", "of ceiling")),
    ]
    for name in comparators:
        headings += [(name, True)] + ([(THP, True)] if huge else [])
    return Table(f"{operator}: times of others over ours", headings, list(groups.values()))


def in_short(results: Results, operator: str) -> str:
    """What ran as ours, and how it stands against each comparator with the default allocator."""
    kernels = "; ".join(results.kernels.get(operator, []))
    parts = [f"Ours: {kernels}."]
    rows = [
        row for row in results.matching(operator=operator, allocator=DEFAULT) if not row.backend
    ]
    for name in in_order(row.implementation for row in rows):
        mine = sorted(row.ratio for row in rows if row.implementation == name)
        faster = sum(ratio > 1 for ratio in mine)
        parts.append(
            f"Over {name}: {number(mine[0])} to {number(mine[-1])}, faster in {faster} of {len(mine)}."
        )
    return " ".join(parts)


def _share(row: Row) -> str:
    return DASH if row.share is None else f"{row.share:.0%} {row.bound}"


def _ratio(row: Row | None) -> Cell:
    if row is None:
        return Cell(DASH, "num")
    return Cell(number(row.ratio), "no" if row.ratio < 1 else "num")


def details(results: Results, operator: str) -> Table:
    """Memory, errors and compilation of every implementation, as measured with the default allocator."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in results.matching(operator=operator, allocator=DEFAULT):
        key = (row.shape, row.variant, row.dtype, row.implementation)
        found.setdefault(key, {})[row.phase] = row
    kind = device_kind(results)
    groups: dict[tuple[str, ...], list[list[Cell]]] = {}
    for (shape, variant, dtype, name), phases in found.items():
        forward, both = phases.get("forward"), phases.get("both")
        any_row = next(iter(phases.values()))
        compiled = max((row.compile_s or 0 for row in phases.values()), default=0)
        groups.setdefault((shape, variant, dtype), []).append(
            [
                Cell(Case(operator, shape, dtype, variant).title(kind)),
                Cell(dtype),
                Cell(name),
                Cell(number(forward.extra_mib if forward else None), "num"),
                Cell(number(both.extra_mib if both else None), "num"),
                Cell(number(any_row.error_value), "num"),
                Cell(number(both.error_gradient if both else None), "num"),
                Cell(number(compiled or None), "num"),
            ]
        )
    headings = [
        *((text, False) for text in ("case", "dtype", "implementation")),
        *((text, True) for text in ("MiB, forward", "MiB, both")),
        *((text, True) for text in ("error", "gradient's", "compiled in, s")),
    ]
    caption = f"{operator}: extra memory, errors against float64, compilation"
    return Table(caption, headings, list(groups.values()))


def missing(results: Results) -> Table:
    """Comparators that did not run, and why."""
    rows = [
        [Cell(one.operator), Cell(one.implementation), Cell(one.reason)] for one in results.missing
    ]
    headings = [("operator", False), ("what", False), ("why", False)]
    return Table("Not run here", headings, [rows] if rows else [])


# ---------------------------------------------------------------------------------------------------
# Markdown


def markdown(results: Results) -> str:
    """The report for places that show no HTML; ratios below 1 are bold."""
    parts = [f"# {words.TITLE}", _facts(results), words.INTRODUCTION]
    if results.machine:
        parts.append(mkl_sentence(results.machine))
    parts += ["## Ceilings", words.CEILING_WORDS, table_markdown(ceilings(results))]
    parts += ["## Bars", words.BAR_WORDS, table_markdown(bar_table(results))]
    for operator in operators(results):
        parts += [
            f"## {operator}",
            in_short(results, operator),
            table_markdown(ratios(results, operator)),
        ]
        parts.append(table_markdown(details(results, operator)))
    if results.missing:
        parts += ["## Not run", table_markdown(missing(results))]
    parts += [
        "## How it was measured",
        *_list(words.METHOD, lambda pair: f"**{pair[0]}.** {pair[1]}"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def comparators(results: Results) -> list[tuple[str, str]]:
    """The implementations of this run and what they are."""
    names = in_order(row.implementation for row in results.rows)
    return [(name, MEANINGS[name]) for name in names if name in MEANINGS]


def _facts(results: Results) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in results.machine.items())


def _list(pairs: Iterable[tuple[str, str]], show: Callable[[tuple[str, str]], str]) -> list[str]:
    return ["\n".join(f"- {show(pair)}" for pair in pairs)]


def table_markdown(table: Table) -> str:
    """A table with its caption; nothing of one without rows."""
    if not table.groups:
        return ""
    rows = [row for group in table.groups for row in group]
    lines = [
        f"{table.caption}:\n",
        "| " + " | ".join(text or " " for text, _ in table.headings) + " |",
        "| " + " | ".join("---:" if right else "---" for _, right in table.headings) + " |",
    ]
    for row in rows:
        lines.append("| " + " | ".join(_cell(cell) for cell in row) + " |")
    return "\n".join(lines)


def _cell(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|").replace("\n", " ")
    return f"**{text}**" if cell.kind == "no" else text
