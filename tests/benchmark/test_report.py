"""The page and the Markdown: complete, escaped, self-contained, readable on a phone and on a desk."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.benchmark import HOSTILE, made_up
from support.browser import (
    DESK,
    LOW_CONTRAST,
    OPEN_ALL,
    PHONE,
    Page,
    assert_nothing_sticks_out,
    browser,
)

from softdimo_fast.benchmark import page, plots, tables
from softdimo_fast.benchmark.results import Results

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
def html() -> str:
    return page.render(made_up())


@pytest.fixture(scope="module")
def outline(html: str) -> Outline:
    return Outline(html)


def test_every_number_is_there(outline: Outline) -> None:
    for text in (
        "4.25",
        "2.12",
        "0.875",
        "8.12",
        "2.75",
        "0.438",
        "50% product",
        "9.5 \N{EN DASH} 11",
    ):
        assert text in outline.text, text
    for text in ("64", "68", "190", "865", "GFLOP/s", "default allocator", "huge pages (THP)"):
        assert text in outline.text, text
    for text in ("0123456789ab", "2026-01-02 03:04 UTC", "2.13.0", HOSTILE):
        assert text in outline.text, text
    assert "MKL runs float32 products on AVX2" in outline.text
    assert "its kernels need a CUDA device" in outline.text
    assert "softdimo::soft_embedding, v4" in outline.text


def test_losing_rows_and_missed_bars_are_marked(html: str, outline: Outline) -> None:
    assert '<td class="num"><span class="no">0.875</span></td>' in html
    assert "✗ no" in outline.text
    assert "✓ yes" in outline.text
    met = sum(bool(one.met) for one in tables.bars.judge(made_up()))
    assert f"{met} of {len(tables.bars.judge(made_up()))} bars met" in outline.text


def test_it_is_one_page_without_reach_outside(html: str, outline: Outline) -> None:
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    assert "default-src 'none'" in html
    for tag, attributes in outline.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name)
        assert not any(name.startswith("on") for name in attributes)


def test_every_operator_has_a_chart_with_its_ratios(outline: Outline) -> None:
    assert "soft_embedding, both: time over ours; right of 1 ours is faster" in outline.text
    assert "sample_tokens, forward: time over ours" in outline.text
    labels = [a["aria-label"] for tag, a in outline.elements if tag == "svg" and "aria-label" in a]
    assert len(labels) == 8
    assert {"eager, default: 4.25", "eager, thp: 2.12", "torch.compile, thp: 0.438"} <= set(labels)
    assert "Over eager: 4.25 to 8.12, faster in 3 of 3." in outline.text
    assert "Over torch.compile: 0.875 to 0.875, faster in 0 of 2." in outline.text


def test_marks_lie_where_the_ratios_are() -> None:
    assert plots.position(1.0, 0.25, 16.0) == pytest.approx(100 / 3)
    assert plots.limits([0.875, 8.2]) == (0.5, 16.0)
    assert plots.limits([3.0]) == (0.5, 4.0)
    assert plots._ticks(0.25, 4.0) == [0.25, 0.5, 1, 2, 4]
    assert 1 in plots._ticks(2.0**-5, 2.0**9)


def test_the_same_results_give_the_same_page(html: str) -> None:
    assert page.render(made_up()) == html


def test_markdown_tables_are_whole() -> None:
    text = tables.markdown(made_up())
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        columns = {line.replace("\\|", "").count("|") for line in lines}
        assert len(columns) <= 1, block
    assert "**0.875**" in text
    assert "| 8.12 |" in text
    assert "**✗ no**" in text


def test_an_empty_run_is_a_page_too() -> None:
    assert Outline(page.render(Results())).text
    assert tables.markdown(Results())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, tables.DASH),
        (0, "0"),
        (1234.5, "1234"),
        (12.345, "12.3"),
        (0.01234, "0.0123"),
        (3.2e-7, "3.2e-7"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert tables.number(value) == text


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_it_can_be_read_in_a_browser(
    chromium: Page, html: str, tmp_path: Path, size: tuple[int, int], scheme: str
) -> None:
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    chromium.open(path, *size, scheme)
    assert_nothing_sticks_out(chromium)
    chromium.run(OPEN_ALL)
    assert_nothing_sticks_out(chromium)
    count, low = chromium.run(LOW_CONTRAST)
    assert count > 100
    assert low == []
    assert chromium.messages() == []
