"""What the page is made of, without a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from sample_dataset import write_coloured

from hpc_imagenet.report.html import page
from hpc_imagenet.report.html.class_results import read_class_results
from hpc_imagenet.report.html.config_differences import flatten, split_shared
from hpc_imagenet.report.html.data_summary import summarise_datastore
from hpc_imagenet.report.html.learning_curves import read_curves, thin_out
from hpc_imagenet.report.html.live_server import ReportServer
from hpc_imagenet.report.html.page import encode_data, render_page
from hpc_imagenet.runs.store import RunStore

HEADER = "step,epoch,train_loss,learning_rate,images_per_second,val_top1,val_top5,val_loss,data_wait\r\n"


def test_curves_are_read_by_epoch(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert read_curves(path, 10) == {}
    path.write_text(f"{HEADER}5,0,2.5,0.1,,,,,\r\n10,0,2.0,0.05,300.0,,,,0.25\r\n10,0,,,,0.5,0.9,1.5,\r\n")
    assert read_curves(path, 10) == {
        "steps": {"x": [0.5, 1], "train_loss": [2.5, 2], "lr": [0.1, 0.05]},
        "val": {"x": [1], "val_loss": [1.5], "top1": [0.5]},
        "speed": {"x": [1], "rate": [300], "wait": [0.25]},
    }


def test_curves_of_damaged_and_older_files(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train_loss\n1,0,1.5\n2,0,nan\n3,0,inf\n4,0\n5,0,0.5,7\nx,y,z")
    assert read_curves(path, 10)["steps"]["train_loss"] == [1.5, None, None, None]
    path.write_bytes(b"\x00\xff\n\xfe")
    assert read_curves(path, 10) == {}
    path.write_text("")
    assert read_curves(path, 10) == {}


def test_curves_are_thinned_out_to_evenly_spaced_points() -> None:
    assert thin_out(range(100), 4) == [0, 33, 66, 99]
    assert thin_out([1, 2], 4) == [1, 2]


def test_class_results_and_damaged_files(tmp_path: Path) -> None:
    assert read_class_results(tmp_path) is None
    classes = 'label,id,names,images,top1,top5\n0,n0,cat,10,0.5,1\n1,n1,"dog, hound",10,1.0,1\n2,n2,x,0,,\n'
    (tmp_path / "val_classes.csv").write_text(classes)
    results = read_class_results(tmp_path)
    assert results is not None
    assert results.names[1] == ("n1", "dog, hound")
    assert results.worst() == [0]
    assert results.confused == {}
    assert sum(results.histogram()) == 2
    assert (results.histogram()[10], results.histogram()[-1]) == (1, 1)
    (tmp_path / "val_confusion.csv").write_text("label,predicted,images\n0,1,4\n0,77,1\n")
    results = read_class_results(tmp_path)
    assert results is not None
    assert results.confused == {0: [(1, 4)]}  # there is no class 77
    (tmp_path / "val_confusion.csv").write_text("label,predicted,images\n0,1")
    assert read_class_results(tmp_path) is None


def test_settings_are_compared_with_the_most_frequent_value() -> None:
    configs: list[dict[str, Any]] = [{"a": {"b": rate, "c": None}, "workspace": "/x"} for rate in (1, 1, 2)]
    configs[2]["a"]["new"] = "text"
    shared, differences = split_shared([flatten(config) for config in configs])
    assert shared == {"a.b": "1", "a.c": "null", "a.new": "not set"}
    assert differences == [{}, {}, {"a.b": "2", "a.new": "text"}]


def test_source_of_a_network_is_not_on_the_page() -> None:
    source = {"net.py": "import torch\n# secret\n", "more.py": ""}
    (name, value), (_, empty) = flatten({"model": {"source": source}}).items()
    assert (name, value[:9], empty[:9]) == ("model.source net.py", "2 lines, ", "0 lines, ")


def test_values_that_json_does_not_know_are_settings_too() -> None:
    assert flatten({"a": date(2026, 1, 2)}) == {"a": '"2026-01-02"'}


@pytest.mark.parametrize("certificate", [{"counts": {"n": 5}}, {"oddities": {"train": [1]}}, {"files": 5}])
def test_damaged_certificate_is_a_note(tmp_path: Path, certificate: dict[str, Any]) -> None:
    write_coloured(tmp_path / "tiny/v1", 2)
    (tmp_path / "tiny/v1/certificate.json").write_text(json.dumps(certificate))
    assert summarise_datastore({"name": "tiny", "url": str(tmp_path)}, None)["note"]
    assert summarise_datastore({"name": "tiny", "url": -1}, None)["note"]


@pytest.mark.parametrize("top1", ["nan", "inf", "-5", "1.5"])
def test_accuracy_of_a_class_that_is_none(tmp_path: Path, top1: str) -> None:
    (tmp_path / "val_classes.csv").write_text(f"label,id,names,images,top1\n0,n0,cat,10,{top1}\n")
    assert read_class_results(tmp_path) is None


@pytest.mark.parametrize(("error", "printed"), [(BrokenPipeError(), False), (ValueError("x"), True)])
def test_browser_that_closes_its_connection_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, printed: bool
) -> None:
    server = ReportServer(RunStore(tmp_path), 0, with_images=False)
    try:
        raise error
    except Exception:
        server.handle_error(None, ("127.0.0.1", 1))
    server.server_close()
    assert ("Traceback" in capsys.readouterr().err) == printed


@pytest.mark.parametrize(
    "text",
    ["</script><script>alert(1)", "<!--", "\u2028", "\ud800 half of a pair", "a & b", "@@DATA@@", "\\"],
)
def test_any_text_is_safe_within_a_script(text: str) -> None:
    encoded = encode_data({"text": text, "numbers": [float("nan"), float("inf"), 1.5]})
    assert not set("<>&\u2028\u2029") & set(encoded)
    decoded = json.loads(encoded)
    assert decoded == {"text": text.replace("\ud800", "?"), "numbers": [None, None, 1.5]}
    html = render_page({"text": text}, plots=False).decode()
    assert html.count("<script") == html.count("</script>") == len(page._SCRIPTS) + 1
    assert "alert(1)" not in html or "\\u003cscript\\u003ealert(1)" in html


@pytest.mark.slow
def test_scripts_of_bokeh_are_in_the_page_and_in_its_policy() -> None:
    pytest.importorskip("bokeh", reason="bokeh, of the extra report, is not installed")
    plain, html = render_page({}, plots=False).decode(), render_page({}).decode()
    policies = [re.findall(r"'sha256-[^']+'", text.partition("<style>")[0]) for text in (plain, html)]
    own = len(page._SCRIPTS)
    assert [len(hashes) for hashes in policies] == [own, own + 3]
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    hashed = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert [f"'sha256-{each}'" for each in hashed] == policies[1]
    assert "Bokeh Contributors" in html  # its license
    assert "Bokeh Contributors" not in plain


@pytest.mark.slow
def test_only_a_live_page_may_send_requests() -> None:
    assert b"connect-src" not in render_page({})
    assert b"connect-src 'self'" in render_page({}, live="data.json")
    assert b"http://" not in render_page({}, plots=False).replace(b"http://www.w3.org", b"")
