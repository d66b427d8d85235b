"""The leaderboard says what an evaluation has judged, where it differs from its training."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

import pytest
from command_line import Cli
from recorded_runs import record_run

from hpc_imagenet.report.html.page import encode_data
from hpc_imagenet.report.html.page_data import collect
from hpc_imagenet.report.leaderboard import format_csv, format_markdown, leaderboard_lines, leaderboard_rows
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import Run, RunStore

RECIPE = {"epochs": 5, "val_size": 224, "val_resize": 256, "val_flip": False}
DATASTORE = {"name": "birds", "version": 1, "content": "c0ffee01"}


def recorded(store: RunStore, number: int, stage: str, result: dict[str, Any], **config: Any) -> Run:
    run = record_run(store, number, FINISHED, stage=stage, result={"top1": 0.5, **result})
    values = {"stage": {"name": stage}, "datastore": DATASTORE, "seed": 0, "recipe": RECIPE, **config}
    (run.folder / "config.yaml").write_text(json.dumps(values))
    return run


def training(store: RunStore) -> Run:
    """Record a training of 50 steps whose best epoch is the fourth."""
    run = recorded(store, 1, "train", {})
    lines = [f"{10 * n},{n - 1},{top1},0.9,1" for n, top1 in enumerate((0.1, 0.2, 0.3, 0.5, 0.4), 1)]
    header = "step,epoch,val_top1,val_top5,val_loss"
    (run.folder / "metrics.csv").write_text("\n".join([header, *lines, ""]))
    return run


def evaluated(
    store: RunStore, number: int, of: Run, checkpoint: str = "best", step: int | None = 40, **config: Any
) -> None:
    evaluate = {"split": "val", "run": of.id, "checkpoint": f"/runs/{of.id}/checkpoints/{checkpoint}.ckpt"}
    recorded(store, number, "evaluate", {"step": step}, evaluate=evaluate, **config)


def names(store: RunStore) -> list[str]:
    """Return the names in the leaderboard."""
    lines = [line[0][0] for line in leaderboard_lines(leaderboard_rows(store))[1:]]
    return [re.split(" {2,}", line.strip())[0] for line in lines]


def test_evaluations_of_one_training_are_distinguished(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    of = training(store)
    evaluated(store, 2, of)
    evaluated(store, 3, of, recipe={**RECIPE, "val_size": 288, "val_resize": 320})
    evaluated(store, 4, of, recipe={**RECIPE, "val_size": 192})
    evaluated(store, 5, of, recipe={**RECIPE, "val_flip": True}, checkpoint="last", step=50)
    evaluated(store, 6, of, step=20)  # best.ckpt as it was then
    evaluated(store, 7, of, datastore={**DATASTORE, "version": 2, "content": "c0ffee02"})
    rows = leaderboard_rows(store)
    assert names(store) == [
        "resnet18",
        "evaluation on val",
        "evaluation on val, 288 of 320 px",
        "evaluation on val, 192 px",
        "evaluation on val, mirrored, last.ckpt of step 50",
        "evaluation on val, best.ckpt of step 20",
        "evaluation on val of birds@v2",
    ]
    assert max(len(line[0][0]) for line in leaderboard_lines(rows, 80)) <= 80
    assert [row["replaced"] for row in rows] == [None, False, False, False, None, True, False]
    table = list(csv.DictReader(io.StringIO(cli("report", "--csv").stdout)))
    for row in table:
        del row["run"], row["dir"], row["hours"]
    assert len({tuple(row.values()) for row in table}) == 7
    assert [row["stage"] for row in table] == ["train", *["evaluate"] * 6]
    assert (table[2]["val_size"], table[5]["step"], table[6]["datastore"]) == ("288", "20", "birds@v2")
    assert {row["training"] for row in table[1:]} == {of.id}
    heading, _, *cells = cli("report", "--markdown").stdout.splitlines()
    assert "| datastore | split | val px | mirrored | checkpoint | step |" in heading
    assert "| birds@v1 | val | 224 | yes | last.ckpt | 50 |" in cells[4]


def test_checkpoints_of_one_file_name_are_distinguished(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    of = training(store)
    checkpoints = [
        *(("last", 30), ("last", 50), ("previous", 20), ("previous", 40)),
        *(("epoch-3", 30), ("best", None), ("last", None)),
    ]
    for number, (checkpoint, step) in enumerate(checkpoints, 2):
        evaluated(store, number, of, checkpoint, step)
    assert names(store)[1:] == [
        *("evaluation on val, last.ckpt of step 30", "evaluation on val, last.ckpt of step 50"),
        *("evaluation on val, previous.ckpt of step 20", "evaluation on val, previous.ckpt of step 40"),
        *("evaluation on val, epoch-3.ckpt", "evaluation on val", "evaluation on val, last.ckpt"),
    ]


def test_checkpoints_outside_runs_are_distinguished(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    elsewhere = store.run("00000001-resnet18")
    for number, checkpoint in enumerate(("best", "epoch-3", "model"), 2):
        for step in (10, 20):
            evaluated(store, 100 * number + step, elsewhere, checkpoint, step)
    assert sorted(names(store)) == [
        f"resnet18 (evaluation on val, 224 px, {name}.ckpt of step {step})"
        for name in ("best", "epoch-3", "model")
        for step in (10, 20)
    ]


def test_a_crop_fraction_replaces_val_resize(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    model = {"name": "timm/resnet18", "preprocessing": {}}
    of = recorded(store, 1, "train", {}, model=model)
    evaluated(store, 2, of, model=model, recipe={**RECIPE, "val_size": 288, "val_resize": 288}, step=None)
    evaluated(store, 3, of, model=model, recipe={**RECIPE, "val_resize": 240}, step=None)  # nothing changes
    assert names(store)[1:] == ["evaluation on val, 288 px", "evaluation on val"]
    assert {row["val_resize"] for row in leaderboard_rows(store)} == {None}


def test_the_training_of_a_pipeline_has_the_version_that_another_run_knows(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    for number, content in enumerate(("c0ffee01", "c0ffee02", "c0ffee03"), 1):
        recorded(store, number, "train", {}, datastore={**DATASTORE, "version": None, "content": content})
    recorded(store, 4, "train", {})
    recorded(store, 5, "train", {}, datastore={"name": "birds@v2", "version": None, "content": "c0ffee02"})
    found = {int(row["run"][:8]): row["datastore"] for row in leaderboard_rows(store)}
    assert found == {1: "birds@v1", 2: "birds@v2", 3: "birds", 4: "birds@v1", 5: "birds@v2"}
    table = csv.DictReader(io.StringIO(cli("report", "--csv").stdout))
    assert {row["content"] for row in table if row["datastore"] == "birds"} == {"c0ffee03"}


def test_a_long_name_does_not_take_the_columns_of_all_rows(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    of = training(store)
    evaluated(store, 2, of, recipe={"val_size": 288, "val_resize": 320, "val_flip": True}, step=20)
    assert " seed " in leaderboard_lines(leaderboard_rows(store), 80)[0][0][0]
    wide = [line[0][0] for line in leaderboard_lines(leaderboard_rows(store), 300)]
    assert "evaluation on val, 288 of 320 px, mirrored, best.ckpt of step 20  " in wide[2]


def test_a_long_name_is_cut_in_a_narrow_terminal(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    of = training(store)
    evaluated(store, 2, of, recipe={"val_size": 288, "val_resize": 320, "val_flip": True}, step=20)
    lines = [line[0][0] for line in leaderboard_lines(leaderboard_rows(store), 80)]
    assert [len(line.rstrip()) for line in lines[1:]] == [80, 80]
    assert lines[2].startswith("  evaluation on val, 288 of 320 px, mirrored…")
    assert lines[2].endswith("00000002")


def test_the_size_is_named_if_the_training_is_elsewhere(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    evaluated(store, 2, store.run("00000001-resnet18"))
    assert "resnet18 (evaluation on val, 224 px, best.ckpt of step 40)" in cli("report").stdout


@pytest.mark.parametrize("value", [[], {"a": 1}, "text", -1, None])
def test_damaged_values_of_an_evaluation(cli: Cli, value: Any) -> None:
    store = RunStore(cli.workspace)
    of = training(store)
    for number, name in enumerate(("split", "run", "checkpoint"), 2):
        evaluate = {"split": "val", "run": of.id, "checkpoint": "best.ckpt", name: value}
        recorded(store, number, "evaluate", {"step": value}, evaluate=evaluate)
    for number, name in enumerate(RECIPE, 5):
        evaluated(store, number, of, recipe={**RECIPE, name: value})
    evaluated(store, 9, of, recipe=value)
    evaluated(store, 10, of, datastore={"name": value, "version": value, "content": value})
    rows = leaderboard_rows(store)
    assert len(rows) == 10
    assert len(leaderboard_lines(rows, 80)) == 11
    format_csv(rows)
    format_markdown(rows)
    encode_data(collect(store, with_images=False))


def test_the_page_names_the_newest_evaluation(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    of = training(store)
    evaluated(store, 2, of, step=20)
    cli("report", "--html", "page.html", "--no-images")
    found = re.search(r'id="page-data">(.*?)</script>', (cli.cwd / "page.html").read_text(), re.DOTALL)
    assert found
    (shown,) = json.loads(found[1])["runs"][0]["evaluations"]
    assert (shown["name"], shown["step"], shown["checkpoint"]) == (
        "val, best.ckpt of step 20",
        20,
        "best.ckpt",
    )
