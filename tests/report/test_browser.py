"""The report in a real browser, as on a phone and on a desk, in light and in dark."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import Page, browser
from support.report import report_data

from softdimo_fast.report.page import write_report

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

PHONE, DESK = (390, 844), (1280, 900)
OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true)"

BROKEN_IMAGES = """
return [...document.images].filter(i => !i.complete || i.naturalWidth === 0 || i.clientWidth < 20).length
"""

# Visible elements past the right edge, unless a box of their own scrolls them.
OVERFLOWING = """
const scrolls = e => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX);
const boxed = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
  if (scrolls(p)) return true; return false; };
return [...document.body.querySelectorAll('*')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5) && !boxed(e);
}).map(e => e.tagName + '.' + e.getAttribute('class') + ' ' + e.getBoundingClientRect().right);
"""

# WCAG 2.1: the contrast of every text with the nearest opaque background behind it.
LOW_CONTRAST = """
const channels = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const light = c => { const [r, g, b] = channels(c).slice(0, 3).map(v => v / 255).map(
  v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = e => { for (; e; e = e.parentElement) {
  const c = getComputedStyle(e).backgroundColor; if (channels(c)[3] === 1) return c; }
  return 'rgb(255, 255, 255)'; };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const low = []; let texts = 0;
while (walker.nextNode()) {
  const node = walker.currentNode, e = node.parentElement;
  if (!node.data.trim() || e.getClientRects().length === 0) continue;
  texts += 1;
  const style = getComputedStyle(e);
  const front = light(e.closest('svg') ? style.fill : style.color), back = light(behind(e));
  const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  if (ratio < 4.5) low.push(node.data.trim().slice(0, 40) + ' ' + ratio.toFixed(2));
}
return [texts, low];
"""

SMALL_TEXT = """
return [...document.querySelectorAll('svg text')].filter(e => e.getBoundingClientRect().height > 0)
  .filter(e => parseFloat(getComputedStyle(e).fontSize) * e.closest('svg').clientWidth / 340 < 11.5).length;
"""


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
    chromium.open(report, *size, scheme)
    assert chromium.run("return document.title") == report_data().title
    assert chromium.run("return [innerWidth, innerHeight]") == list(size)
    # Closed as it opens, and with everything unfolded.
    assert_nothing_sticks_out(chromium)
    chromium.run(OPEN_ALL)
    assert_nothing_sticks_out(chromium)
    assert chromium.run("return document.images.length") > 40
    assert chromium.run(BROKEN_IMAGES) == 0
    texts, low = chromium.run(LOW_CONTRAST)
    assert texts > 200
    assert low == []
    assert chromium.run(SMALL_TEXT) == 0
    assert chromium.messages() == []
    requests = chromium.requests()
    assert ("request", report.as_uri()) in requests
    outside = [
        entry for entry in requests if entry[0] == "failed" or not own(entry[1], report.as_uri())
    ]
    assert outside == []


def own(address: str, page: str) -> bool:
    return address == page or address.startswith("data:")


def assert_nothing_sticks_out(page: Page) -> None:
    assert page.run("return document.scrollingElement.scrollWidth <= innerWidth")
    assert page.run(OVERFLOWING) == []


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
