"""The page: complete, escaped, self-contained, written as a whole or not at all."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from support.report import HOSTILE, report_data

from softdimo_fast.report import _html, _sections, _words
from softdimo_fast.report.contents import PictureRow, ReportData, SearchPairs
from softdimo_fast.report.page import render, write_report

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

VOID = {"meta", "link", "img", "br"}


class Outline(HTMLParser):
    """Checks nesting, and collects elements and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def data() -> ReportData:
    return report_data()


@pytest.fixture(scope="module")
def page(data: ReportData) -> str:
    return render(data)


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


def changed_metrics(data: ReportData, **changes: Any) -> ReportData:
    return dataclasses.replace(data, metrics={**data.metrics, **changes})


def test_parts_come_in_order_with_the_picture_first(page: str) -> None:
    anchors = ["method", "results", "search", "checks", "curves", "timings", "origins"]
    places = [page.index(f'id="{anchor}"') for anchor in anchors]
    assert places == sorted(places)
    assert page.index("<img") < places[0]


def test_everything_given_is_shown(data: ReportData, outline: Outline) -> None:
    for row in data.rows:
        assert " ".join(row.label.split()) in outline.text
    for part in (data.picture_note, data.command, "Seed 0", "4 min 52 s", "9 of 10 checks hold"):
        assert part in outline.text
    for name in data.metrics["rows"]:
        human = next(group[name] for group in _words.METRIC_GROUPS if name in group)
        assert human in outline.text
    for name in data.metrics["search"]:
        assert _words.SEARCH[name] in outline.text
    for name, version in data.versions.items():
        assert name in outline.text
        assert version in outline.text
    for number in ("40.11", "0.710", "2 min 28 s", "0.6834", "≥ 0.7", "≤ 1.2", "2,000 images"):
        assert number in outline.text
    assert "Missed: coverage, one step." in outline.text
    assert outline.text.count("✓ yes") == 9
    assert outline.text.count("✗ missed") == 1


def test_it_is_one_page_without_reach_outside(page: str, outline: Outline) -> None:
    for tag, attributes in outline.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page
    assert "url(h" not in page
    assert "default-src 'none'" in page


def test_it_can_be_read_by_everybody(outline: Outline) -> None:
    by_tag: dict[str, list[dict[str, str | None]]] = {}
    for tag, attributes in outline.elements:
        by_tag.setdefault(tag, []).append(attributes)
    assert by_tag["html"][0]["lang"] == "en"
    assert len(by_tag["h1"]) == 1
    assert all(attributes.get("alt") for attributes in by_tag["img"])
    assert all(attributes.get("scope") in {"row", "col"} for attributes in by_tag["th"])
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in outline.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
        if str(attributes.get("href")).startswith("#"):
            assert str(attributes["href"])[1:] in ids


def test_text_is_escaped(page: str, data: ReportData) -> None:
    hostile = dataclasses.replace(
        changed_metrics(
            data,
            rows={HOSTILE: {"fd": 1.0, HOSTILE: 2.0}},
            search={HOSTILE: {"hit_rate": 0.5, "fd": 1.0}},
            bars=[{"name": HOSTILE, "value": HOSTILE, "bound": HOSTILE, "holds": False}],
        ),
        title=HOSTILE,
        picture_note=HOSTILE,
        pairs=SearchPairs([HOSTILE], torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)),
        logs={HOSTILE: [{"step": step, HOSTILE: step, "loss": 1} for step in range(3)]},
        stage_seconds={HOSTILE: 1.0},
        versions={HOSTILE: HOSTILE},
        configs={HOSTILE: HOSTILE},
        command=HOSTILE,
    )
    for text in (page, render(hostile)):
        assert "<script" not in text
        assert "alert('no')" not in text
        Outline(text)


def test_numbers_that_are_missing_are_dashes(data: ReportData) -> None:
    rows = {
        "dimo": {"fd": math.nan, "accuracy": None, "recall": 0.5, "n": 10},
        "unknown": {"fd": 2.0},
    }
    bars = [{"name": "a ratio", "value": math.nan, "bound": 0.3, "holds": False}]
    text = Outline(render(changed_metrics(data, rows=rows, search={}, bars=bars))).text
    assert "nan" not in text
    assert "unknown" in text
    assert f"a ratio {_html.MISSING} 0.3 ✗ missed" in text
    assert "Drawing a wanted digit" not in text
    assert "Guided teacher" not in text


def test_a_bare_run_has_only_what_it_has() -> None:
    metrics = {"seed": 3, "seconds": 0.4, "rows": {}, "search": {}, "bars": []}
    text = render(ReportData("Bare", [PictureRow("a", "b", torch.zeros(1, 3, 4, 4))], metrics))
    outline = Outline(text)
    assert "Seed 3 0.4 s no checks" in outline.text
    for anchor in ("search", "checks", "curves", "timings", "origins"):
        assert f'id="{anchor}"' not in text
    assert 'class="colour"' in text


@pytest.mark.parametrize(
    ("value", "bound", "holds", "shown"),
    [
        (0.2, 0.3, True, "≤ 0.3"),
        (0.4, 0.3, False, "≤ 0.3"),
        (0.4, 0.3, True, "≥ 0.3"),
        (0.2, 0.3, False, "≥ 0.3"),
        (0.3, 0.3, True, "0.3"),
        (0.2, "<= 0.3", True, "≤ 0.3"),
        (math.nan, 2.0, False, "2"),
        (None, None, False, _html.MISSING),
    ],
)
def test_bounds_show_their_direction(value: Any, bound: Any, holds: bool, shown: str) -> None:
    assert _sections._bound({"value": value, "bound": bound, "holds": holds}) == shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (3661, "1 h 1 min"),
        (math.inf, _html.MISSING),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert _html.duration(seconds) == text


def test_the_same_data_gives_the_same_page(page: str) -> None:
    assert render(report_data()) == page


def test_writing_replaces_the_old_page(tmp_path: Path, data: ReportData, page: str) -> None:
    (tmp_path / "report.html").write_text("old")
    path = write_report(tmp_path, data)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == page
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, data: ReportData, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "replace", full)))
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, data)
    assert (tmp_path / "report.html").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_folder_must_exist(tmp_path: Path, data: ReportData) -> None:
    with pytest.raises(NotADirectoryError, match=r"existing folder, got .*missing"):
        write_report(tmp_path / "missing", data)


def test_wrong_data_is_refused_before_anything_is_drawn(data: ReportData) -> None:
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="at least one PictureRow"):
        dataclasses.replace(data, rows=[])
    with pytest.raises(
        ValueError, match="metrics must hold seconds, rows, search, bars, got only seed"
    ):
        dataclasses.replace(data, metrics={"seed": 0})
    with pytest.raises(ValueError, match="every bar must hold bound, holds, got"):
        changed_metrics(data, bars=[{"name": "a", "value": 1.0}])
    with pytest.raises(ValueError, match=r"same shape, got \[2, 1, 8, 8\] and \[1, 1, 8, 8\]"):
        SearchPairs([1, 2], images, images[:1])
    with pytest.raises(ValueError, match="each of the 2 samples, got 1"):
        SearchPairs([1], images, images)
    with pytest.raises(KeyError, match=r"one of real, recon, .*got 'dimmo'"):
        PictureRow.of("dimmo", images)


def test_words_are_there_for_every_row_of_the_picture() -> None:
    needed = {"real", "recon", "teacher1", "teacher4", "teacher16", "dimo", "cfg2_gan", "reward"}
    assert needed <= set(_words.PICTURE)
    for label, caption in _words.PICTURE.values():
        assert label
        assert re.fullmatch(r"[A-Z].*\.", caption)
