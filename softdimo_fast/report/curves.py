"""Curves of a stage's log as small inline SVGs, drawn with matplotlib.

The SVGs carry no colours or fonts of their own: they take ``currentColor``, the page's font and the custom
properties ``--accent``, ``--rule`` and ``--muted``, so that one drawing serves a light and a dark page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INSTALL = 'pip install "softdimo-fast[report]"'
SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"
# Units of the drawing; a page shows it at about this many CSS pixels, so text keeps its size.
WIDTH, HEIGHT, TEXT = 340, 190, 12.5
# The axes in it, as shares: left, bottom, width, height. Left grows with what stands there.
AXES = (0.15, 0.15, 0.79, 0.79)
# A digit's width in any of the page's fonts, and the gap between a label and its axis.
DIGIT, GAP = 0.62 * TEXT, 5
# More points than this are not seen at that width: longer logs are averaged in groups.
POINTS = 120
# Logged for the record, not for a curve.
NOT_CURVES = frozenset({"step", "epoch", "seconds", "time", "samples", "lr", "learning_rate"})
# Colours that matplotlib draws with, and what stands in their place afterwards.
ACCENT, BAND, RULE, TICK = "#010203", "#010204", "#010205", "#010206"
PROPERTIES = {
    ACCENT: "var(--accent)",
    BAND: "var(--accent)",
    RULE: "var(--rule)",
    TICK: "var(--muted)",
}
# Between ticks, times a power of ten.
STEPS = [1, 2, 2.5, 5, 10]
# A ratio of largest to smallest value from which a curve is drawn on a logarithmic axis.
LOGARITHMIC_FROM = 100.0


@dataclass(frozen=True)
class Curve:
    """One scalar of a log.

    Attributes:
        name: its key in the log.
        svg: the drawing, one ``<svg>`` element without width and height, with ids that start with the
            ``prefix`` it was drawn with.
        description: the same in words, for those who do not see it.
        left_out: how many logged values were NaN or infinite, and are not drawn.
    """

    name: str
    svg: str
    description: str
    left_out: int

    @property
    def is_loss(self) -> bool:
        """Whether this is something that a stage minimises, told by its name."""
        return "loss" in self.name.lower()


def stage_curves(
    stage: str, records: Sequence[Mapping[str, Any]], *, keys: Sequence[str] | None = None
) -> list[Curve]:
    """Draws the scalars of a log, losses first, each as one small curve over the steps.

    Args:
        stage: the name of the stage; it keeps ids apart when several drawings share a page.
        records: of ``log.jsonl``: "step" and scalars. A record without "step", and a value that is not a
            number, is passed over.
        keys: which scalars, in this order; default: every one but the step, the time and the learning
            rate that has at least two finite values.

    Returns:
        One ``Curve`` for each key. The same log gives the same text.

    Raises:
        ValueError: a key of ``keys`` has fewer than two finite values.
        ImportError: matplotlib is missing.
    """
    series = _series(records)
    if keys is None:
        keys = [
            name
            for name, (points, _) in series.items()
            if name not in NOT_CURVES and len(points) > 1
        ]
        keys = sorted(keys, key=lambda name: "loss" not in name.lower())
    curves = []
    for name in keys:
        points, left_out = series.get(name, ([], 0))
        if len(points) < 2:
            raise ValueError(
                f"stage_curves: keys must have at least two finite values, got {name!r} with "
                f"{len(points)} in stage {stage!r}"
            )
        prefix = f"curve-{_slug(stage)}-{_slug(name)}"
        curves.append(Curve(name, draw(points, prefix), _describe(stage, name, points), left_out))
    return curves


def _series(
    records: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[list[tuple[float, float]], int]]:
    """For each scalar its finite (step, value) points in order of steps, and how many were not finite."""
    found: dict[str, tuple[list[tuple[float, float]], int]] = {}
    for record in records:
        step: Any = record.get("step")
        if not _is_number(step):
            continue
        for name, value in record.items():
            if name == "step" or not _is_number(value):
                continue
            points, left_out = found.get(name, ([], 0))
            if math.isfinite(value):
                points.append((float(step), float(value)))
            else:
                left_out += 1
            found[name] = (points, left_out)
    for points, _ in found.values():
        points.sort(key=lambda point: point[0])
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _slug(text: str) -> str:
    """Letters, digits and dashes only, different for different texts."""
    return re.sub(r"[^A-Za-z0-9]", lambda match: f"-{ord(match[0]):x}-", text)


def _describe(stage: str, name: str, points: Sequence[tuple[float, float]]) -> str:
    values = [value for _, value in points]
    return (
        f"{name} of stage {stage}: {values[0]:.4g} at step {points[0][0]:g}, {values[-1]:.4g} at step "
        f"{points[-1][0]:g}; lowest {min(values):.4g}, highest {max(values):.4g}."
    )


def _grouped(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """At most ``POINTS`` (step, mean, lowest, highest) of consecutive points."""
    size = -(-len(points) // POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    found = []
    for group in groups:
        values = [value for _, value in group]
        middle = math.fsum(step for step, _ in group) / len(group)
        found.append((middle, math.fsum(values) / len(values), min(values), max(values)))
    return found


def draw(points: Sequence[tuple[float, float]], prefix: str) -> str:
    """The curve through (step, value) points as one ``<svg>`` element.

    Args:
        points: finite, in order of steps, at least two. Where they are more than can be seen, the line is
            their mean in groups and a band shows the lowest and highest of each group.
        prefix: what every id inside starts with; different drawings of a page need different ones.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"drawing curves needs matplotlib: {INSTALL}") from error
    buffer = io.StringIO()
    # A Figure of its own, not pyplot: no window system, nothing left behind in global state.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": TEXT}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes(AXES)
        _plot(axes, points)
        _make_room(axes)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), prefix)


def _plot(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    steps, means, lowest, highest = zip(*_grouped(points), strict=True)
    if len(points) > len(steps):
        axes.fill_between(steps, lowest, highest, color=BAND, alpha=0.18, linewidth=0)
    axes.plot(steps, means, color=ACCENT, linewidth=1.6, solid_joinstyle="round")
    first, last = points[0][0], points[-1][0]
    axes.set_xlim(0 if 0 <= first <= 0.05 * last else first, max(last, first + 1))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    smallest, largest = min(lowest), max(highest)
    if smallest > 0 and largest / smallest >= LOGARITHMIC_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS, min_n_ticks=3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=GAP, labelcolor=TICK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _make_room(axes: Axes) -> None:
    """Moves the axes to the right where their labels would stick out on the left."""
    low, high = axes.get_ylim()
    locations = [value for value in axes.get_yticks() if low <= value <= high]
    labels = axes.yaxis.get_major_formatter().format_ticks(locations)
    left, bottom, width, height = AXES
    needed = (max(map(len, labels), default=0) * DIGIT + GAP) / WIDTH
    if needed > left:
        axes.set_position((needed, bottom, left + width - needed, height))


def _inline(text: str, prefix: str) -> str:
    """matplotlib's file as an element for the middle of a page: small, and without reach outside itself."""
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        for child in list(parent):
            # The style sheet of an inline SVG would apply to the whole page.
            if _tag(child) in {"metadata", "style"}:
                parent.remove(child)
    used = set(re.findall(r"#([\w.-]+)", " ".join(_references(root))))
    for element in root.iter():
        _tidy(element, used, prefix)
    root.attrib.clear()
    root.set("viewBox", f"0 0 {WIDTH} {HEIGHT}")
    root.set("aria-hidden", "true")
    return ElementTree.tostring(_collapsed(root), encoding="unicode")


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _references(root: ElementTree.Element) -> list[str]:
    return [
        value
        for element in root.iter()
        for name, value in element.attrib.items()
        if name == LINK or "url(#" in value
    ]


def _tidy(element: ElementTree.Element, used: set[str], prefix: str) -> None:
    element.tag = _tag(element)
    element.tail = None
    if element.text is not None and not element.text.strip():
        element.text = None
    for name, value in list(element.attrib.items()):
        del element.attrib[name]
        if name == "id":
            if value in used:
                element.set("id", f"{prefix}-{value}")
        elif name == LINK:
            element.set("href", f"#{prefix}-{value[1:]}")
        elif name == "style":
            element.set("style", _restyled(value))
        elif name == "clip-path":
            element.set(name, value.replace("url(#", f"url(#{prefix}-"))
        elif not (name == "transform" and value.startswith("rotate(-0 ")):
            element.set(name, _rounded(value))


def _restyled(style: str) -> str:
    for colour, place in PROPERTIES.items():
        style = style.replace(colour, place)
    parts = [part.strip() for part in style.split(";")]
    return ";".join(part for part in parts if part and not part.startswith("font-family"))


def _rounded(value: str) -> str:
    """Coordinates to a tenth of a unit, on one line."""
    value = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value)
    return " ".join(value.split())


def _collapsed(element: ElementTree.Element) -> ElementTree.Element:
    """Without the groups that hold one thing or nothing, and carry no attribute."""
    children = [_collapsed(child) for child in element]
    for child in list(element):
        element.remove(child)
    for child in children:
        plain_group = child.tag == "g" and not child.attrib
        element.extend(child if plain_group else [child])
    return element
