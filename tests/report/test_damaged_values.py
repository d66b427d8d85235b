"""No value of any type in a record of a run ends a report: jobs, report, the page, show."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_imagenet.report.html.page import encode_data
from hpc_imagenet.report.html.page_data import collect
from hpc_imagenet.report.jobs_table import job_rows, table_lines
from hpc_imagenet.report.leaderboard import format_csv, format_markdown, leaderboard_lines, leaderboard_rows
from hpc_imagenet.report.show.details import render_details, run_details
from hpc_imagenet.report.show.run_differences import compare_runs, render_comparison
from hpc_imagenet.runs.store import Run, RunStore

TIME = "2020-01-01T00:00:00+00:00"
OUTCOME = "attempts/1/outcome.json"
RECORDS: dict[str, Any] = {
    "run.json": {
        **{"format": 2, "stage": "train", "model": "resnet18", "label": "x", "created": TIME},
        "sweeps": ["s"],
    },
    "attempts/1/submitted.json": {
        **{"executor": "local", "time": TIME, "job_id": "1", "host": "elsewhere", "shares_with": ["other"]},
        "code": {"commit": "abc", "difference": ""},
    },
    "attempts/1/started.json": {
        **{"time": TIME, "host": "n1", "nodes": "n1", "restarts": 1},
        "earlier": [{"time": TIME, "host": "n0", "stopped": TIME}],
    },
    OUTCOME: {
        **{"state": "finished", "reason": "", "time": TIME},
        "result": {
            **{"top1": 0.5, "top5": 0.9, "loss": 1.0, "seconds": 10.0, "images_per_second": 5.0, "epochs": 2},
            **{"parameters": 10, "learned": True, "advice": "", "skipped": 1},
        },
    },
    "attempts/1/process.json": {"gpus": ["0"], "job_id": "1"},
    "attempts/1/usage/0-0.json": {
        **{"restarts": 0, "host": "n1", "seconds": 5, "cpus": 2, "cpu_seconds": 3, "memory_bytes": 10},
        "gpus": {"u": {"seconds": 5, "use": 0.5, "joules": 10}},
    },
    "progress.json": {
        **{"done": 1, "total": 2, "unit": "images", "rate": 1.0, "note": "n", "time": TIME, "top1": 0.4},
    },
    "bottleneck.json": {"bottleneck": "input_bound", "waiting": 0.3, "suggestion": "x"},
    "config.yaml": {
        "cluster": {"executor": "local", "nodes": 1, "gpus_per_node": None, "stage": {}},
        **{"stage": {"name": "train"}, "seed": 0, "tracker": [], "dataset": {"name": "imagenet"}},
        "datastore": {"name": "d", "url": "/nonexistent", "version": 1, "content": "c"},
        "model": {"name": "resnet50", "weights": None, "source": {"net.py": "import torch"}},
        "recipe": {"epochs": 90, "val_size": 224},
        "evaluate": {"split": "val", "run": "r", "checkpoint": "c", "fingerprint": "f"},
    },
}
TABLES = {
    "metrics.csv": "step,epoch,train_loss,val_loss,val_top1,val_top5\n5,0,1,,,\n10,0,,1,.5,.9\n9,0,,,,",
    "val_classes.csv": "label,id,names,images,top1\n0,a,A,5,0.4\n1,b,B,5,0.6",
    "val_confusion.csv": "label,predicted,images\n0,1,3",
}
VALUES: list[Any] = ["text", -1, float("nan"), 10**400, None, [], ["a"], {"a": 1}]
CELLS = ["", "nan", "inf", "-1", "x", "1e400", '"', "\0"]
# Together the rotations put each value into each place.
rotated = pytest.mark.parametrize(
    "shift", [0, 1, *(pytest.param(shift, marks=pytest.mark.nightly) for shift in range(2, 8))]
)


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))


def changed(value: Any, path: tuple[str, ...], new: Any) -> Any:
    return {**value, path[0]: changed(value[path[0]], path[1:], new)} if path else new


def write(run: Run, records: dict[str, Any]) -> None:
    for name, content in records.items():
        path = run.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content)
        path.write_text(text)
    for name, text in TABLES.items():
        if not (run.folder / name).exists():
            (run.folder / name).write_text(text)


def check_reports(store: RunStore) -> None:
    runs = store.all()
    table_lines(job_rows(runs), 80)
    rows = leaderboard_rows(store)
    assert len(rows) >= 0.9 * len(runs)  # a damaged run.json names no stage
    leaderboard_lines(rows, 80)
    format_csv(rows)
    format_markdown(rows)
    encode_data(collect(store, with_images=False))
    for run in runs:
        render_details(run_details(run))
        if run.readable_config():
            render_comparison(compare_runs(run, runs[0]))


@pytest.mark.slow
@rotated
def test_value_of_another_type(tmp_path: Path, shift: int) -> None:
    """Every place of every record gets the next of the values, of a training that has ended or that runs."""
    store = RunStore(tmp_path)
    records = {name: content for name, content in RECORDS.items() if shift % 2 == 0 or name != OUTCOME}
    write(store.run("00000000-x"), records)
    changes = ((name, path) for name, content in records.items() for path in places(content))
    for number, (name, path) in enumerate(changes, 1):
        damaged = changed(records[name], path, VALUES[(number + shift) % len(VALUES)])
        write(store.run(f"{number:08x}-x"), {**records, name: damaged})
    check_reports(store)


@pytest.mark.slow
@rotated
def test_cell_of_a_table(tmp_path: Path, shift: int) -> None:
    store, number = RunStore(tmp_path), 0
    for name, text in TABLES.items():
        rows = [line.split(",") for line in text.split("\n")]
        for row, columns in enumerate(rows):
            for column in range(len(columns)):
                run, number = store.run(f"{number:08x}-x"), number + 1
                write(run, RECORDS)
                damaged = copy.deepcopy(rows)
                damaged[row][column] = CELLS[(number + shift) % len(CELLS)]
                (run.folder / name).write_text("\n".join(map(",".join, damaged)))
    check_reports(store)


@pytest.mark.slow
def test_file_that_is_no_text(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    contents = (b"", b"\xff\xfe\x00" * 5, b"\0" * 200_000)
    for number, (name, content) in enumerate(itertools.product((*RECORDS, *TABLES), contents)):
        run = store.run(f"{number:08x}-x")
        write(run, RECORDS)
        (run.folder / name).write_bytes(content)
    check_reports(store)
