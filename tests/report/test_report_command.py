from __future__ import annotations

import csv
import io
import json
import re
import shutil
from typing import Any

import pytest
from command_line import Cli
from recorded_runs import record_run

from hpc_imagenet.runs.attempt import FAILED, FINISHED
from hpc_imagenet.runs.store import RunStore


def page_data(cli: Cli, *options: str) -> dict[str, Any]:
    """Write the page and return the data in it."""
    printed = cli("report", "--html", "page.html", *options).stdout
    page = (cli.cwd / "page.html").read_text()
    assert printed.startswith(f"wrote {cli.cwd / 'page.html'}: ")
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.mark.slow
def test_page_of_a_sweep(sweep: Cli) -> None:
    data = page_data(sweep)
    runs = {run["state"]: run for run in data["runs"]}
    assert len(data["runs"]) == 20
    assert set(runs) == {"finished", "failed", "running", "queued"}
    finished = data["runs"][0]
    assert finished["published_top1"] == pytest.approx(0.8252)
    assert finished["published_same_protocol"] is False
    assert finished["gpu_hours"] == pytest.approx(8 * finished["hours"], rel=1e-3)
    assert {"steps", "val", "speed"} == finished["curves"].keys()
    assert len(finished["classes"]["top1"]) == 12
    label, top1, images, confused = finished["classes"]["worst"][0]
    assert (images, len(confused)) == (50, 3)
    assert 0 <= top1 < 1
    store = data["datastores"]["imagenet@v1"]
    assert store["names"][label][0] == f"n{label:08d}"
    assert [len(found) for found in store["thumbnails"].values()] == [3] * 12
    assert store["thumbnails"][str(label)][0].startswith("data:image/jpeg;base64,")
    assert finished["attempts"][0]["parts"][0][0] == "queued"
    assert any("recipe.learning_rate" in run["config"] for run in data["runs"])


@pytest.mark.slow
def test_page_without_images_or_without_the_datastore(sweep: Cli) -> None:
    data = page_data(sweep, "--no-images")
    assert data["datastores"]["imagenet@v1"]["thumbnails"] == {}
    shutil.rmtree(sweep.workspace / "datastores")
    data = page_data(sweep)
    assert "no datastore imagenet" in data["datastores"]["imagenet@v1"]["note"]


@pytest.mark.slow
def test_page_of_damaged_moved_and_foreign_runs(sweep: Cli) -> None:
    folders = sorted((sweep.workspace / "runs").glob("[!.]*"))
    (folders[0] / "config.yaml").unlink()
    (folders[1] / "config.yaml").write_text("model: {name: [")
    (folders[2] / "config.yaml").write_text("of: another version\n")
    (folders[3] / "val_classes.csv").write_text("label,id\n0")
    (folders[4] / "metrics.csv").write_text("half a li")
    (folders[5] / "attempts/1/outcome.json").write_text('{"state": "fin')
    (folders[6] / "bottleneck.json").write_text("{")
    shutil.rmtree(folders[7])
    (sweep.workspace / "runs" / "deadbeef-empty").mkdir()
    data = page_data(sweep)
    assert len(data["runs"]) == 19
    assert sum(run["state"] == FAILED for run in data["runs"]) == 2
    rows = json.loads(sweep("report", "--json").stdout)
    assert len(rows) == 19
    assert sweep("report").stdout.count(str(sweep.workspace)) == 19


def test_results_of_wrong_types_and_a_training_at_chance(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    record_run(store, 1, FINISHED, result={"top1": "high", "top5": None, "loss": float("nan"), "epochs": []})
    record_run(store, 2, FINISHED, result={"top1": 0.1, "learned": False, "advice": "lower the rate"})
    (store.folder / "00000001-resnet18/run.json").write_text('{"stage": "train"}')
    at_chance, damaged = page_data(cli)["runs"]
    assert (at_chance["learned"], at_chance["advice"]) == (False, "lower the rate")
    assert (damaged["top1"], damaged["loss"], damaged["epochs"]) == (None, None, None)
    assert damaged["model"] == "resnet18"  # of the folder's name
    for form in ((), ("--markdown",)):
        table = cli("report", *form).stdout
        assert "finished, at chance" in table
        assert "None" not in table
    table = list(csv.DictReader(io.StringIO(cli("report", "--csv").stdout)))
    assert [line["learned"] for line in table] == ["False", ""]


def test_failed_training_has_its_diagnosis_on_the_page(cli: Cli) -> None:
    run = record_run(RunStore(cli.workspace), 1, FAILED, "ended without an outcome")
    assert run.attempt
    (run.attempt.folder / "1_0_log.err").write_text("MemoryError: </script>\x1b[2J\n")
    (row,) = page_data(cli)["runs"]
    assert row["diagnosis"]["text"] == "out of host memory: MemoryError: </script>"
    assert "cluster.memory_gb" in row["diagnosis"]["command"]


def test_page_of_a_workspace_without_trainings(cli: Cli) -> None:
    data = page_data(cli)
    assert data["runs"] == []
    record_run(RunStore(cli.workspace), 1, FINISHED, stage="download", label="download-digits")
    assert len(page_data(cli)["other_jobs"]) == 1
    assert cli("report", "--csv").stdout.startswith("run,model,")
    assert cli("report", "--markdown").stdout.splitlines()[1].startswith("| --- |")


@pytest.mark.slow
def test_csv_and_markdown(sweep: Cli) -> None:
    rows = list(csv.DictReader(io.StringIO(sweep("report", "--csv").stdout)))
    assert len(rows) == 20
    assert float(rows[0]["top1"]) > float(rows[1]["top1"])
    assert rows[0]["published_protocol"] == "torchvision IMAGENET1K_V1, 600 epochs, 224 px"
    heading, rule, *lines = sweep("report", "--markdown").stdout.splitlines()
    assert len(lines) == 20
    assert {line.count("|") for line in (heading, rule, *lines)} == {heading.count("|")}
    assert "(82.52)" in sweep("report").stdout


def test_markdown_of_hostile_names(cli: Cli) -> None:
    record_run(
        RunStore(cli.workspace), 1, FINISHED, result={"top1": 0.5}, label="a|b<img>`x`\x1b[2J[y](z)\nc"
    )
    line = cli("report", "--markdown").stdout.splitlines()[-1]
    assert r"a\|b&lt;img>\`x\`\[y](z) c" in line
    assert "\x1b" not in cli("report").stdout
    assert "\x1b" not in cli("report", "--csv").stdout


def test_json_has_null_for_a_loss_that_is_not_finite(cli: Cli) -> None:
    run = record_run(RunStore(cli.workspace), 1, FINISHED, result={"top1": 0.1, "loss": float("nan")})
    (run.folder / "metrics.csv").write_text("step,epoch,val_top1,val_top5,val_loss\n1,0,0.1,0.5,nan\n")

    def read(*words: str) -> Any:
        return json.loads(cli(*words, "--json").stdout, parse_constant=pytest.fail)

    assert read("show", run.id)["validations"]["last"]["loss"] is None
    assert read("jobs")[0]["result"] == {"top1": 0.1, "loss": None}
    assert read("report")[0]["loss"] is None


def test_page_that_cannot_be_written(cli: Cli) -> None:
    assert "/proc/page.html cannot be written (" in cli.refused("report", "--html", "/proc/page.html")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--html", "."), "is a folder: type a file, such as"),
        (("--html", "missing/page.html"), "missing does not exist: create it, or type another file"),
        (("--html", "x.html", "--csv"), "not allowed with argument"),
        (("--port", "8000"), "--port belong"),
        (("--no-images",), "belong to --html FILE or --serve"),
        (("--html", "x.html", "--port", "1"), "--port belongs to --serve"),
        (("--serve", "--port", "70000"), "argument --port: invalid port value: '70000'"),
    ],
)
def test_refused_options(cli: Cli, words: tuple[str, ...], message: str) -> None:
    assert message in cli.refused("report", *words)
