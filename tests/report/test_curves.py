"""Curves of logs: every value is there, drawings share a page, and the same log gives the same text."""

from __future__ import annotations

import builtins
import itertools
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from support.report import HOSTILE, log

from softdimo_fast.report.curves import POINTS, Curve, draw, stage_curves

pytest.importorskip("matplotlib")


def ids(svg: str) -> set[str]:
    return set(re.findall(r' id="([^"]+)"', svg))


def references(svg: str) -> set[str]:
    return set(re.findall(r'(?:href="|url\()#([^")]+)', svg))


def line(curve: Curve) -> list[tuple[float, float]]:
    """The points of the drawn line, in the drawing's units."""
    paths = re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--accent\)', curve.svg)
    numbers = [float(text) for text in re.findall(r"-?\d+(?:\.\d+)?", paths[-1])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_losses_come_first_and_the_clock_is_left_out() -> None:
    records = log(50, 5, {"grad_norm": (5, 1), "auxiliary_loss": (3, 2), "Loss": (2, 1)})
    curves = stage_curves("teacher", records)
    assert [curve.name for curve in curves] == ["auxiliary_loss", "Loss", "grad_norm"]
    assert [curve.is_loss for curve in curves] == [True, True, False]
    assert [curve.name for curve in stage_curves("teacher", records, keys=["lr"])] == ["lr"]


def test_the_line_goes_through_the_values() -> None:
    records = [{"step": step, "loss": float(value)} for step, value in enumerate([4, 1, 3, 2])]
    (curve,) = stage_curves("s", records)
    points = line(curve)
    assert len(points) == 4
    xs, ys = zip(*points, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[3] - xs[2], abs=0.2)
    top, bottom = ys[0], ys[1]  # y grows downwards
    assert ys[2] == pytest.approx(bottom + (top - bottom) * 2 / 3, abs=0.2)
    assert ys[3] == pytest.approx(bottom + (top - bottom) * 1 / 3, abs=0.2)


def test_records_out_of_order_are_sorted() -> None:
    records = [{"step": step, "loss": step / 10} for step in (3, 0, 2, 1)]
    assert [x for x, _ in line(stage_curves("s", records)[0])] == sorted(
        x for x, _ in line(stage_curves("s", records)[0])
    )


def test_a_long_log_is_grouped_and_keeps_its_extremes() -> None:
    records = [{"step": step, "loss": 1.0} for step in range(3000)]
    records[1500]["loss"] = 9.0
    (curve,) = stage_curves("s", records)
    assert len(line(curve)) <= POINTS
    assert "fill-opacity" in curve.svg
    assert "highest 9." in curve.description
    (short,) = stage_curves("s", records[:POINTS])
    assert "fill-opacity" not in short.svg
    assert len(curve.svg) < 12_000


def test_values_that_are_not_finite_are_counted_and_not_drawn() -> None:
    records: list[dict[str, Any]] = [{"step": step, "loss": 1.0 + step} for step in range(5)]
    records[2]["loss"] = math.nan
    records[3]["loss"] = math.inf
    records.append({"loss": 7.0})  # no step
    records.append({"step": 9, "event": "saved", "finished": True, "loss": None})
    (curve,) = stage_curves("s", records)
    assert curve.left_out == 2
    assert len(line(curve)) == 3
    assert "nan" not in curve.svg.lower()


def test_wide_ranges_get_a_logarithmic_axis() -> None:
    records = [{"step": step, "loss": 10.0**-step} for step in range(5)]
    ys = [y for _, y in line(stage_curves("s", records)[0])]
    steps = [after - before for before, after in itertools.pairwise(ys)]
    assert max(steps) - min(steps) < 0.3


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 1e30])
def test_a_constant_is_drawn(value: float) -> None:
    (curve,) = stage_curves("s", [{"step": 7, "loss": value}, {"step": 7, "loss": value}])
    assert line(curve)


def test_nothing_to_draw() -> None:
    assert stage_curves("s", []) == []
    assert stage_curves("s", [{"step": 0, "loss": 1.0}]) == []
    with pytest.raises(ValueError, match="got 'other' with 0 in stage 's'"):
        stage_curves("s", [{"step": 0, "loss": 1.0}], keys=["other"])


def test_drawings_share_a_page() -> None:
    """Ids differ between stages and keys, refer to themselves, and no style reaches outside."""
    records = log(900, 2, {"a_loss": (2, 1), "a-loss": (2, 1), "a.loss": (2, 1)})
    curves = stage_curves("one", records) + stage_curves("two", records)
    seen: set[str] = set()
    for curve in curves:
        found = ids(curve.svg)
        assert found
        assert found == references(curve.svg)
        assert not found & seen
        seen |= found
        assert "<style" not in curve.svg
        assert "font-family" not in curve.svg
        assert "http" not in curve.svg
        assert not re.search(
            r"#[0-9a-f]{6}\b", curve.svg.replace("url(#", "(").replace('href="#', "")
        )


def test_the_same_log_gives_the_same_text() -> None:
    records = log(900, 2, {"loss": (2, 1)})
    assert stage_curves("one", records) == stage_curves("one", records)


def test_text_is_of_a_readable_size() -> None:
    svg = ElementTree.fromstring(draw([(0, 1), (10, 2)], "p"))
    sizes = [
        re.search(r"font-size: ([\d.]+)px", text.get("style", "")) for text in svg.iter("text")
    ]
    assert sizes
    assert all(size is not None and float(size[1]) >= 12 for size in sizes)
    assert svg.get("viewBox") == "0 0 340 190"
    assert svg.get("width") is None


def test_hostile_names_stay_out_of_the_drawing() -> None:
    (curve,) = stage_curves(HOSTILE, log(50, 5, {HOSTILE + "loss": (2, 1)}))
    assert "script" not in re.sub(r"curve-[\w-]+", "", curve.svg)
    ElementTree.fromstring(curve.svg)


def test_nothing_is_left_in_matplotlib() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw([(0, 1), (10, 2)], "p")
    assert dict(matplotlib.rcParams) == before


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "softdimo-fast\[report\]"'):
        draw([(0, 1), (10, 2)], "p")
