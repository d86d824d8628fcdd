"""A headless Chromium with everything that a page made it complain about."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRIVER = "chromedriver"
OPTIONS = (
    "--headless=new",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--disable-dev-shm-usage",  # containers give /dev/shm too little
    "--hide-scrollbars",
)
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


def _missing(what: str) -> None:
    """Skips, or fails where a browser is required: otherwise a set-up that lost it would stay green."""
    message = f"{what}; Debian has it all in the packages chromium and chromium-driver"
    if os.environ.get("SOFTDIMO_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{message} (SOFTDIMO_REQUIRE_BROWSER=1)")
    pytest.skip(message)


class Page:
    """One page in the browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int, height: int, scheme: str = "light") -> None:
        """Loads ``path`` as a device of that size in CSS pixels, with ``scheme`` "light" or "dark"."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.messages()
        self.requests()
        self.driver.get(path.as_uri())

    def run(self, script: str) -> Any:
        """What the body of a JavaScript function returns."""
        return self.driver.execute_script(script)

    def messages(self) -> list[str]:
        """The console's messages of every level since the last call."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def requests(self) -> list[tuple[str, str]]:
        """(event, address) of everything that was asked for or failed since the last call."""
        found, addresses = [], {}
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            parameters = message["params"]
            if message["method"] == "Network.requestWillBeSent":
                addresses[parameters["requestId"]] = parameters["request"]["url"]
                found.append(("request", parameters["request"]["url"]))
            elif message["method"] == "Network.loadingFailed":
                found.append(("failed", addresses.get(parameters["requestId"], "?")))
        return found


@contextmanager
def browser() -> Iterator[Page]:
    """Starts Chromium through its driver; skips the test where there is none."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver_path = shutil.which(DRIVER)
    if binary is None or driver_path is None:
        _missing("no Chromium" if binary is None else f"no {DRIVER}")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        _missing("selenium is not installed (the dev extra)")
    options = webdriver.ChromeOptions()
    options.binary_location = str(binary)
    for option in OPTIONS:
        options.add_argument(option)
    if os.geteuid() == 0:  # Chromium's sandbox does not start for root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        yield Page(driver)
    finally:
        driver.quit()


def assert_whole(
    page: Page, path: Path, size: tuple[int, int], scheme: str, *, pictures: int, texts: int
) -> None:
    """Opens ``path``: nothing sticks out, is broken, pale, small, complained about or fetched from elsewhere.

    Args:
        pictures, texts: it has more than so many.
    """
    page.open(path, *size, scheme)
    assert page.run("return [innerWidth, innerHeight]") == list(size)
    # Closed as it opens, and with everything unfolded.
    assert_nothing_sticks_out(page)
    page.run(OPEN_ALL)
    assert_nothing_sticks_out(page)
    assert page.run("return document.images.length") > pictures
    assert page.run(BROKEN_IMAGES) == 0
    count, low = page.run(LOW_CONTRAST)
    assert count > texts
    assert low == []
    assert page.run(SMALL_TEXT) == 0
    assert page.messages() == []
    requests = page.requests()
    assert ("request", path.as_uri()) in requests
    assert [entry for entry in requests if entry[0] == "failed" or not _own(entry[1], path)] == []


def _own(address: str, path: Path) -> bool:
    return address == path.as_uri() or address.startswith("data:")


def assert_nothing_sticks_out(page: Page) -> None:
    assert page.run("return document.scrollingElement.scrollWidth <= innerWidth")
    out = page.run(OVERFLOWING)
    assert not out, f"at {page.run('return innerWidth')} pixels: {out}"
