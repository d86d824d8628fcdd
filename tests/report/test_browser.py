"""The report in a real browser, as on a phone and on a desk, in light and in dark."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import (
    BROKEN_IMAGES,
    DESK,
    LOW_CONTRAST,
    OPEN_ALL,
    OVERFLOWING,
    PHONE,
    Page,
    assert_nothing_sticks_out,
    assert_whole,
    browser,
)
from support.report import report_data

from softdimo_fast.report.page import write_report

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("run"), report_data())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_report_is_whole(
    chromium: Page, report: Path, size: tuple[int, int], scheme: str
) -> None:
    assert_whole(chromium, report, size, scheme, pictures=40, texts=200)
    assert chromium.run("return document.title") == report_data().title


def test_the_scheme_changes_the_page(chromium: Page, report: Path) -> None:
    colours: list[Any] = []
    for scheme in ("light", "dark"):
        chromium.open(report, *DESK, scheme)
        colours.append(chromium.run("return getComputedStyle(document.body).backgroundColor"))
    assert colours[0] == "rgb(255, 255, 255)"
    assert colours[1] != colours[0]


def test_the_picture_is_what_one_sees_first(chromium: Page, report: Path) -> None:
    for size in (PHONE, DESK):
        chromium.open(report, *size)
        top = chromium.run("return document.images[0].getBoundingClientRect().top")
        assert top < size[1] / 3


def test_long_words_do_not_widen_the_page(chromium: Page, tmp_path: Path) -> None:
    data = report_data()
    word = "W" * 200
    bars = [{"name": word, "value": 1.0, "bound": 2.0, "holds": False}]
    rows = {**data.metrics["rows"], word: {"fd": 1e9}}
    data = dataclasses.replace(
        data,
        title=word,
        command=word,
        rows=[dataclasses.replace(data.rows[0], label=word, caption=word)],
        metrics={**data.metrics, "bars": bars, "rows": rows},
        stage_seconds={word: 1.0},
        logs={word: [{"step": step, word: 1e9 + step} for step in range(5)]},
        versions={word: word},
        configs={word: word},
    )
    chromium.open(write_report(tmp_path, data), *PHONE)
    chromium.run(OPEN_ALL)
    assert_nothing_sticks_out(chromium)


def test_long_labels_of_an_axis_stay_on_the_page(chromium: Page, tmp_path: Path) -> None:
    values = {"large": -3.3e5, "small": -1.35e-3}
    logs = [
        {"step": step, **{name: value * (1 + step / 500) for name, value in values.items()}}
        for step in range(20)
    ]
    chromium.open(
        write_report(tmp_path, dataclasses.replace(report_data(), logs={"one": logs})), *PHONE
    )
    chromium.run(OPEN_ALL)
    assert_nothing_sticks_out(chromium)


def test_the_checks_see_what_is_wrong(chromium: Page, tmp_path: Path) -> None:
    """The browser reports what these tests rely on it to report."""
    page = tmp_path / "wrong.html"
    page.write_text(
        "<!DOCTYPE html><title>x</title><body style='margin:0'><p style='width:900px;color:#aaa'>pale</p>"
        "<img src='missing.png'><img src='https://127.0.0.1:9/x.png'><script>console.warn('w')</script>"
    )
    chromium.open(page, *PHONE)
    assert not chromium.run("return document.scrollingElement.scrollWidth <= innerWidth")
    assert chromium.run(OVERFLOWING)
    assert chromium.run(BROKEN_IMAGES) == 2
    assert chromium.run(LOW_CONTRAST)[1]
    assert any("WARNING" in message for message in chromium.messages())
    requests = chromium.requests()
    assert ("request", "https://127.0.0.1:9/x.png") in requests
    assert ("failed", (tmp_path / "missing.png").as_uri()) in requests
