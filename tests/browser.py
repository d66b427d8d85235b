"""A headless Chromium with a new profile."""

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
    "--no-sandbox",  # the sandbox does not work as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1400,6000",  # tall enough to render a whole notebook
)


@contextlib.contextmanager
def chromium(screenshot: Path, *more: str) -> Iterator[Chrome]:
    """Start a browser with an empty profile and quit it afterwards.

    Args:
        screenshot: path of the PNG that is written if the block raises.
        more: further Chromium flags.
    """
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    profile = tempfile.mkdtemp(prefix="profile-")
    options = ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, *more, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    chrome = Chrome(options=options, service=ChromeService(driver))
    try:
        chrome.set_page_load_timeout(120)
        yield chrome
    except BaseException:
        chrome.save_screenshot(str(screenshot))
        raise
    finally:
        chrome.quit()
        shutil.rmtree(profile, ignore_errors=True)
