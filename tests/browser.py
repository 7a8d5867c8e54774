"""A browser for tests, where there is one."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def chromium_if_any() -> Iterator[Browser]:
    """Chromium; while it runs, no other event loop may. Tests are skipped where it is missing."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-background-networking", "--disable-sync"],
        )
        yield browser
        browser.close()
