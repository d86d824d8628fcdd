"""The few pieces of HTML that the report is made of; text is escaped here and nowhere else."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from typing import Any

MISSING = "\N{EN DASH}"


def escape(text: object) -> str:
    """``text`` for an element or a quoted attribute."""
    return html.escape(str(text), quote=True)


def number(value: Any, decimals: int) -> str:
    """A measured number with thousands separators; a dash where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return MISSING
    return f"{value:,.{decimals}f}"


def significant(value: Any) -> str:
    """Four significant digits; texts as they are, with typographic signs of comparison."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.4g}" if math.isfinite(value) else MISSING
    if value is None:
        return MISSING
    return str(value).replace("<=", "≤").replace(">=", "≥")


def duration(seconds: float) -> str:
    """``4 min 52 s``, ``12 s`` or ``0.4 s``."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def picture(png: bytes, width: int, height: int, alt: str, kind: str) -> str:
    """An ``<img>`` of class ``kind`` that carries its file."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<img class="{kind}" src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}">'
    )


def heading(text: str, better: str = "", *, number: bool = False, span: int = 1) -> str:
    """A column's heading; ``better`` is "lower", "higher" or empty, ``span`` counts a gauge beside it."""
    shown = escape(text)
    if better:
        arrow = {"lower": "↓", "higher": "↑"}[better]
        shown += (
            f' <span aria-hidden="true">{arrow}</span>'
            f'<span class="unseen"> ({better} is better)</span>'
        )
    kind = ' class="num"' if number else ""
    cell = f'<th scope="col"{kind}>{shown}</th>'
    # Not a colspan: the gauges vanish where there is no room, and their column with them.
    return cell + '<td class="gauge"></td>' * (span - 1)


def gauge(share: float) -> str:
    """A cell with a bar of ``share`` (0 to 1) of its width, for the eye only: the number is beside it."""
    return (
        f'<td class="gauge" aria-hidden="true"><i style="width:{100 * min(1, max(0, share)):.1f}%">'
        "</i></td>"
    )


def table(
    anchor: str, caption: str, headings: Sequence[str], bodies: Sequence[str], kind: str
) -> str:
    """A table inside a box that scrolls by itself, so that the page never does.

    ``headings`` and ``bodies`` are HTML: cells of ``heading``, and whole ``<tr>`` rows. The caption
    stands above the box, or it would scroll away.
    """
    groups = "".join(f"<tbody>{body}</tbody>" for body in bodies)
    return (
        f'<p class="caption" id="{anchor}">{escape(caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{anchor}">'
        f'<table class="{kind}" aria-labelledby="{anchor}">'
        f"<thead><tr>{''.join(headings)}</tr></thead>{groups}</table></div>"
    )


def section(anchor: str, name: str, body: str, lead: str = "") -> str:
    """A part of the page under its heading, with a sentence or two beside that."""
    beside = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return (
        f'<section aria-labelledby="{anchor}"><div class="head"><h2 id="{anchor}">{escape(name)}</h2>'
        f"{beside}</div>{body}</section>"
    )


def definitions(pairs: Sequence[tuple[str, str]], kind: str) -> str:
    """A list of names and their explanations."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs
    )
    return f'<dl class="{kind}">{items}</dl>'


def folded(summary: str, body: str) -> str:
    """Something that opens on request."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
