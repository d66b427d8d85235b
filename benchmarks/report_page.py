"""Measure the report page of many trainings: time to write it, its size, and the time until it is drawn.

    python benchmarks/report_page.py [--runs 1000] [--repeats 5] [--keep FOLDER]

It writes run folders of a sweep that never ran (fake_trainings.py) to a temporary workspace, runs
`report --html` on it, and opens the page in headless Chromium with an empty profile. The time is that from
the request of the page until everything is drawn: tables, plots and images. Exit code 1: a limit is exceeded.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fake_trainings import write_trainings
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.ui import WebDriverWait

LIMITS = {"seconds": 2.0, "bytes": 10e6}
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder for the workspace and the page, which are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="report-page-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{platform.machine()}, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f} at the start")
        if not (folder / "workspace").exists():
            write_trainings(folder / "workspace", options.runs)
        page = folder / "report.html"
        command = [sys.executable, "-m", "hpc_imagenet", "report", "--html", str(page)]
        began = time.monotonic()
        subprocess.run([*command, f"workspace={folder / 'workspace'}"], check=True, stdout=subprocess.DEVNULL)
        print(f"{options.runs:,} trainings, written in {time.monotonic() - began:.1f} s")
        size = page.stat().st_size
        drawn, memory = measure(page, options.repeats)
    middle = statistics.median(drawn)
    print(f"size               {size / 1e6:6.2f} MB   at most {LIMITS['bytes'] / 1e6:.0f} MB")
    spread = f"{min(drawn):.2f} to {max(drawn):.2f} in {options.repeats} browsers"
    print(f"drawn, median      {middle:6.2f} s    at most {LIMITS['seconds']:.0f} s, {spread}")
    print(f"JavaScript's heap  {memory / 1e6:6.1f} MB")
    sys.exit(0 if middle <= LIMITS["seconds"] and size <= LIMITS["bytes"] else 1)


def measure(page: Path, repeats: int) -> tuple[list[float], int]:
    """Return the seconds until the page was drawn, each in a new browser, and the memory of the last."""
    drawn, memory = [], 0
    for _ in range(repeats):
        profile = tempfile.mkdtemp(prefix="profile-")
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or "chromium"
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        chrome = Chrome(options=options, service=ChromeService(shutil.which("chromedriver")))
        try:
            chrome.get(page.as_uri())
            drawn.append(int(WebDriverWait(chrome, 60).until(_time_drawn)) / 1000)
            memory = chrome.execute_script("return performance.memory.usedJSHeapSize")
        finally:
            chrome.quit()
            shutil.rmtree(profile, ignore_errors=True)
    return drawn, memory


def _time_drawn(chrome: Chrome) -> str | None:
    """Return when everything had been drawn, in ms since the page was requested; None before that."""
    return chrome.execute_script("return document.documentElement.dataset.drawn")


if __name__ == "__main__":
    main()
