"""A headless Chromium for tests that look at pages."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tenacity import Retrying, retry_if_exception_message, stop_after_delay, wait_fixed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROUGHT = Path(sys.prefix) / "chromium"
"""Where `make test-slow` puts the one that it brings."""
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Chromium:
    program: str
    libraries: Path | None = None


def find() -> Chromium | None:
    """The browser that `requirements/chromium.py` brought, or the machine's own."""
    if (BROUGHT / ".ready").exists():
        return Chromium(str(BROUGHT / "chromium"), BROUGHT / "lib")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    return Chromium(program) if program else None


@contextmanager
def opened(chromium: Chromium) -> Iterator["Browser"]:
    """The running browser."""
    from playwright.sync_api import sync_playwright

    environ: dict[str, str | float | bool] = {**os.environ}
    if chromium.libraries is not None:
        environ["LD_LIBRARY_PATH"] = str(chromium.libraries)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium.program, env=environ)
        try:
            yield browser
        finally:
            browser.close()


def picture(page: "Page", path: Path) -> None:
    """The whole page as a PNG file.

    Chromium sometimes refuses a picture of a long page, and takes the same one when it is
    asked again: on a busy machine 15 of 72 of a page 17,000 pixels tall, at most twice in a row.
    """
    for attempt in Retrying(
        retry=retry_if_exception_message(match=r"(?s).*Unable to capture screenshot"),
        wait=wait_fixed(0.2),
        stop=stop_after_delay(60),
        reraise=True,
    ):
        with attempt:
            page.screenshot(path=path, full_page=True)
