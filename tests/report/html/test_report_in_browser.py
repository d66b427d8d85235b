"""The page in headless Chromium: no console error, no request, both themes, a phone, and hostile text."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from command_line import Cli, eventually
from selenium.webdriver import Chrome
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By

from hpc_imagenet.io.atomic_files import read_json, write_json
from hpc_imagenet.report.html.live_server import ReportServer
from hpc_imagenet.report.html.page import has_plots, render_page
from hpc_imagenet.report.html.page_data import collect
from hpc_imagenet.runs.store import RunStore

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def opened(url: str, tmp_path: Path, width: int = 1400, dark: bool = False) -> Iterator[Chrome]:
    """Open the page; afterwards the console must be empty."""
    with chromium(tmp_path / "page.png") as browser:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(url)
        eventually(lambda: bool(browser.execute_script("return document.documentElement.dataset.drawn")))
        yield browser
        assert browser.get_log("browser") == []


def page_of(cli: Cli) -> str:
    cli("report", "--html", "page.html")
    return (cli.cwd / "page.html").as_uri()


def rows(browser: Chrome) -> list[str]:
    script = "return [...document.querySelectorAll('#table tbody tr')].map((row) => row.innerText)"
    return browser.execute_script(script)


def test_page_loads_nothing_and_sorts_filters_and_opens_runs(sweep: Cli, tmp_path: Path) -> None:
    with opened(page_of(sweep), tmp_path) as browser:
        loaded = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        assert [name for name in browser.execute_script(loaded) if not name.startswith("data:")] == []
        assert len(rows(browser)) == 20
        assert len(browser.find_elements(By.CSS_SELECTOR, ".chart")) == 8
        drawn = "return [...charts.scatter, ...charts.curves].filter((chart) => chart.view).length"
        assert browser.execute_script(drawn) == (8 if has_plots() else 0)
        assert "convnext_tiny" in rows(browser)[0]
        browser.find_element(By.XPATH, "//th/button[starts-with(., 'parameters')]").click()
        assert "vit_b_16" in rows(browser)[0]
        browser.find_element(By.ID, "search").send_keys("resnet18 finished")
        eventually(lambda: len(rows(browser)) < 5)
        assert all("resnet18" in row for row in rows(browser))
        browser.find_element(By.CSS_SELECTOR, "#table tbody tr .name").click()
        run = browser.find_element(By.ID, "run")
        assert "-resnet18" in run.find_element(By.TAG_NAME, "h3").text
        assert "69.76 %" in run.text
        assert "Worst classes" in run.text
        images = run.find_elements(By.TAG_NAME, "img")
        eventually(lambda: all(image.get_property("naturalWidth") for image in images[:3]))
        assert browser.current_url.endswith("-resnet18")
        browser.find_element(By.XPATH, "//button[.='Clear']").click()
        eventually(lambda: len(rows(browser)) == 20)


@pytest.mark.parametrize(("width", "dark"), [(1400, True), (390, False), (390, True)])
def test_themes_and_a_phone(sweep: Cli, tmp_path: Path, width: int, dark: bool) -> None:
    with opened(page_of(sweep), tmp_path, width, dark) as browser:
        background = "return getComputedStyle(document.body).backgroundColor"
        assert (browser.execute_script(background) == "rgb(18, 22, 28)") is dark
        overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.execute_script(overflow) == 0
        browser.find_element(By.ID, "theme").click()  # auto, then light
        assert browser.execute_script(background) == "rgb(246, 247, 249)"


def test_print_is_light_with_all_parts(sweep: Cli, tmp_path: Path) -> None:
    with opened(page_of(sweep), tmp_path, dark=True) as browser:
        remember = "window.printed = document.documentElement.dataset.theme"
        remember += "; window.copies = document.querySelectorAll('canvas.for-print.inverted').length"
        browser.execute_script(f"addEventListener('beforeprint', () => {{ {remember}; }})")
        pdf = browser.execute_cdp_cmd("Page.printToPDF", {})
        assert len(pdf["data"]) > 50_000
        assert browser.execute_script("return window.printed") == "light"
        assert browser.execute_script("return window.copies") == (8 if has_plots() else 0)
        assert browser.find_elements(By.CSS_SELECTOR, ".for-print") == []
        eventually(lambda: browser.execute_script("return document.documentElement.dataset.theme") == "dark")


X_RANGES = "return charts.curves.map((chart) => [chart.plot.x_range.start, chart.plot.x_range.end])"


def test_points_open_their_run_and_curves_are_enlarged_together(sweep: Cli, tmp_path: Path) -> None:
    pytest.importorskip("bokeh", reason="bokeh, of the extra report, is not installed")
    with opened(page_of(sweep), tmp_path) as browser:
        scatter, _, curves, *_ = browser.find_elements(By.CSS_SELECTOR, ".chart")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", scatter)
        point = browser.execute_script(
            "const { plot, view } = charts.scatter[0], { data } = plot.renderers[0].data_source;"
            "const frame = view.frame_view, box = view.el.getBoundingClientRect();"
            "return [box.x + frame.x_scale.compute(data.x[0]), box.y + frame.y_scale.compute(data.y[0])]"
        )
        mouse = ActionBuilder(browser)
        mouse.pointer_action.move_to_location(*map(round, point))
        mouse.perform()
        tip = browser.find_element(By.ID, "tip")
        eventually(lambda: "GPU-hours" in tip.text)
        mouse.pointer_action.click()
        mouse.perform()
        eventually(lambda: "#" in browser.current_url)
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", curves)
        whole = browser.execute_script(X_RANGES)
        actions = ActionChains(browser).move_to_element_with_offset(curves, -60, 0).click_and_hold()
        actions.move_by_offset(60, 30).release().perform()
        eventually(lambda: browser.execute_script(X_RANGES) != whole)
        enlarged = browser.execute_script(X_RANGES)
        assert len({tuple(each) for each in enlarged}) == 1
        assert enlarged[0][1] - enlarged[0][0] < 4
        ActionChains(browser).double_click(curves).perform()
        eventually(lambda: browser.execute_script(X_RANGES)[0] == whole[0])


def test_a_page_without_bokeh_says_so(sweep: Cli, tmp_path: Path) -> None:
    path = tmp_path / "plain.html"
    path.write_bytes(render_page(collect(RunStore(sweep.workspace), with_images=False), plots=False))
    with opened(path.as_uri(), tmp_path) as browser:
        assert len(rows(browser)) == 20
        assert "written without Bokeh" in browser.find_element(By.ID, "accuracy").text
        assert "written without Bokeh" in browser.find_element(By.ID, "curves").text


HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\u2028\x1b[31m"


def test_hostile_text_is_shown_as_text(sweep: Cli, tmp_path: Path) -> None:
    for folder in (sweep.workspace / "runs").glob("[!.]*"):
        info: dict[str, Any] = read_json(folder / "run.json") or {}
        write_json(folder / "run.json", {**info, "model": HOSTILE, "label": HOSTILE, "sweeps": [HOSTILE]})
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(
            config.replace("momentum: 0.9", f"momentum: {json.dumps(HOSTILE)}")
        )
        classes = folder / "val_classes.csv"
        if classes.exists():
            classes.write_text(classes.read_text().replace("class number", HOSTILE[:-6].replace(",", "")))
        outcome = folder / "attempts/1/outcome.json"
        if outcome.exists():
            write_json(outcome, {**(read_json(outcome) or {}), "reason": HOSTILE})
    with opened(page_of(sweep), tmp_path) as browser:
        assert browser.execute_script("return window.hacked === undefined")
        assert "<img src=x onerror" in rows(browser)[0]
        assert "<img src=x onerror" in browser.find_element(By.CSS_SELECTOR, ".class h4").text
        assert browser.find_elements(By.CSS_SELECTOR, "img[src='x']") == []


def test_empty_page(cli: Cli, tmp_path: Path) -> None:
    with opened(page_of(cli), tmp_path) as browser:
        assert rows(browser) == ["No trainings in this workspace."]
        assert "No attempt has been recorded." in browser.find_element(By.ID, "timeline").text


def test_live_page_follows_the_workspace(sweep: Cli, tmp_path: Path) -> None:
    server = ReportServer(RunStore(sweep.workspace), 0, with_images=False)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/")
        with urllib.request.urlopen(f"{server.url}data.json") as reply:
            tag, data = reply.headers["ETag"], json.load(reply)
        assert len(data["runs"]) == 20
        with opened(server.url, tmp_path) as browser:
            requested = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
            assert browser.execute_script(requested) == []
            assert len(rows(browser)) == 20
            (folder,) = (sweep.workspace / "runs").glob("00000012-*")  # the running one
            attempt = folder / "attempts/1"
            write_json(attempt / "outcome.json", {"state": "cancelled", "reason": "", "time": "2099-01-01"})
            eventually(lambda: any("cancelled" in row for row in rows(browser)))
            names = browser.execute_script(requested)
            assert set(names) == {f"{server.url}data.json"}
        request = urllib.request.Request(f"{server.url}data.json", headers={"If-None-Match": tag})
        with urllib.request.urlopen(request) as reply:
            assert reply.headers["ETag"] != tag
    finally:
        server.shutdown()
        server.server_close()
