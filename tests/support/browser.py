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
