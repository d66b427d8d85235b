"""A headless Chromium, as somebody uses it who has just installed it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

FLAGS = (
    "--headless",
    "--no-sandbox",  # which root may not use
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1400,6000",  # so that a whole notebook is drawn
)


@contextlib.contextmanager
def chromium(picture: Path, *more: str) -> Iterator[Chrome]:
    """Open a browser with a new, empty profile; `more` are flags. Should we fail, `picture` shows it."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    profile = tempfile.mkdtemp(prefix="profile-")
    options = ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, *more, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    opened = Chrome(options=options, service=ChromeService(driver))
    try:
        opened.set_page_load_timeout(120)
        yield opened
    except BaseException:
        opened.save_screenshot(str(picture))
        raise
    finally:
        opened.quit()
        shutil.rmtree(profile, ignore_errors=True)
