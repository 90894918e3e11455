"""A headless Chromium for tests of pages. Skips, and says why, where there is none."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""Nothing but the page's own traffic."""


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """Playwright's browser. $SHOAL_TEST_BROWSER names another program."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install 'shoal[browser]'"
    )
    program = os.environ.get("SHOAL_TEST_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=list(_ARGUMENTS))
        try:
            yield chromium
        finally:
            chromium.close()


@contextlib.contextmanager
def browser_page(width: int = 1200, height: int = 850, **context: Any) -> Iterator[Any]:
    """Playwright's page, with an empty profile."""
    with launched() as chromium:
        opened = chromium.new_context(viewport={"width": width, "height": height}, **context)
        yield opened.new_page()
