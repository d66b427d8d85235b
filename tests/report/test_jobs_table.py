"""The command `jobs`: a row of 80 columns per run, results in a few words, filters, safe text."""

from __future__ import annotations

import io
import json
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from fake_slurm import queue_row, write_command
from recorded_runs import change, record_run, set_times
from rich.console import Console

from hpc_imagenet.io.printable import one_line, printable
from hpc_imagenet.report import jobs_table
from hpc_imagenet.report.durations import clock, parse_span, span
from hpc_imagenet.report.jobs_table import job_rows, table_lines
from hpc_imagenet.report.run_summary import describe, summary
from hpc_imagenet.report.terminal_text import columns, fit
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, RUNNING
from hpc_imagenet.runs.store import RunStore

HOSTILE = "\x1b[31m[bold]a\x1b]0;title\x07b\x9b2J\r\nc\u202ed\ud800[/] \x1b[2J日本"
RUN = {"progress": {}, "reason": "", "attempt": 1, "requeued": 0, "stage": "train", "seconds_left": None}


def text_of(rows: list[dict[str, Any]], width: int | None) -> list[str]:
    return ["".join(part for part, _ in line) for line in table_lines(rows, width)]


@pytest.fixture
def store(cli: Cli) -> RunStore:
    return RunStore(cli.workspace)


def test_rows_fit_80_columns_and_name_what_matters(store: RunStore) -> None:
    progress = {
        "done": 43.0,
        "total": 100.0,
        "unit": "images",
        "rate": 0.5,
        "note": "epoch 3/9",
        "top1": 0.7613,
    }
    record_run(
        store, 1, label="mobilenet_v3_small", started={"nodes": "gpu-a100-[0001-0016]"}, progress=progress
    )
    record_run(
        store,
        2,
        FAILED,
        "out of memory on the node: raise cluster.memory_gb, or lower loader.workers",
        started={"host": "n3"},
    )
    record_run(store, 3, stage="process", label="process-imagenet-of-the-whole-institute.12-of-64")
    rows = job_rows(store.all())
    rows[0] |= {"state": RUNNING, "reason": "", "seconds_left": 114.0}
    header, running, failed, queued = text_of(rows, 80)
    assert max(map(columns, (header, running, failed, queued))) <= 80
    assert running.split()[:7] == ["00000001", "mobilenet_v3_small", "running", "43%", "1m", "left", "0.5"]
    assert "76.13 gpu-a100… 0s" in running
    assert re.search(r" failed  out of \S.*… {7}n3 ", failed)
    assert queued.startswith("00000003 process-imagenet-…")
    assert "lower loader.workers" in text_of(rows, None)[2]  # a pipe gets all of it
    assert {len(line) for line in text_of(rows, 40)} <= set(range(41, 80))  # what cannot be cut is kept
    assert max(map(len, text_of(rows, 200))) < 200


@pytest.mark.parametrize(
    ("stage", "result", "expected"),
    [
        ("download", {"bytes": 154.6e9, "files": 3, "downloaded": 154.6e9}, "154.6 GB"),
        ("download", {"bytes": 154.6e9, "files": 3, "downloaded": 0}, "154.6 GB · complete already"),
        ("process", {"images": 1331167, "train": 1281167, "classes": 1000, "skipped": 0},
         "1.3 M images · 1,000 classes"),
        ("process", {"images": 1797, "classes": 10, "skipped": 1},
         "1,797 images · 10 classes · 1 image skipped"),
        ("upload", {"datastore": "imagenet@v3", "images": 900, "bytes": 2e9, "reused": 0, "kept": 0},
         "imagenet@v3 · 900 images · 2.0 GB"),
        ("train", {"top1": 0.7, "epochs": 90, "images_per_second": 2345.6, "seconds": 46000.0, "skipped": 0},
         "90 epochs in 12:46:40 · 2,346 img/s"),
        ("train", {"top1": 0.7, "images_per_second": None}, ""),
        ("evaluate", {"top1": 0.7, "top5": 0.9, "loss": 1.2, "split": "test", "datastore": "imagenet@v3",
         "images": 900, "skipped": 0, "checkpoint": "best.ckpt"},
         "test of imagenet@v3 · 900 images · top-5 90.00 %"),
        ("evaluate", {"top5": None}, ""),
        ("session", {"ended": "idle for 60 minutes", "minutes": 75.5}, "idle for 60 minutes · 76 minutes"),
        ("search", {"trials": 6, "study": "night", "top1": 0.9, "trial": "0badcafe-resnet18"},
         "6 trials · best so far 0badcafe-resnet18"),
        ("search", {"trials": 1, "study": "night", "budget": 200.0}, "1 trial · search.budget=200 is spent"),
        (None, {"key": "value"}, "key value"),
    ],
)  # fmt: skip
def test_results_are_a_few_words(stage: str | None, result: dict[str, Any], expected: str) -> None:
    assert summary(stage, result) == expected


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        ({}, "starting"),
        ({"done": 5, "total": 10, "unit": "images", "rate": 1e6}, "50% 1.0 M img/s"),
        ({"done": 20, "total": 10, "unit": "images", "rate": 0}, "100%"),
        ({"done": 5, "total": None, "unit": "files", "rate": None}, "5 files"),
        (
            {"done": 0, "total": 0, "unit": "", "note": "waiting for another upload"},
            "waiting for another upload",
        ),
        ({"done": "x", "total": [], "rate": {}}, "starting"),
        ({"done": 1, "total": 2, "rate": float("nan"), "note": "n"}, "50% · n"),
    ],
)
def test_progress_of_any_shape_is_described(progress: dict[str, Any], expected: str) -> None:
    assert describe({**RUN, "state": RUNNING, "progress": progress}) == expected


def test_attempts_and_requeues_are_counted() -> None:
    row = {**RUN, "state": CANCELLED, "reason": "by hand", "attempt": 2, "requeued": 1}
    assert describe(row) == "by hand · attempt 2 · requeued 1 time"


def test_best_top1_is_that_of_all_validations(store: RunStore) -> None:
    record_run(store, 1, FINISHED, result={"top1": 0.5}, progress={"top1": 0.6})
    record_run(store, 2, FINISHED, result={"top1": 0.7}, progress={"top1": 0.6})
    record_run(store, 3, FAILED, "NaN", progress={"top1": 0.6})
    record_run(store, 4, FINISHED, result={})
    assert [row["best_top1"] for row in job_rows(store.all())] == [0.6, 0.7, 0.6, None]


@pytest.mark.slow
def test_filters_select_rows(cli: Cli, store: RunStore) -> None:
    record_run(store, 1, FINISHED, stage="download", label="download-x")
    record_run(store, 2, FAILED, "why", sweeps=("seed-1a", "mine"))
    record_run(store, 3, started={}, sweeps=("mine",))
    record_run(store, 4, sweeps=("seed-2b",))
    record_run(store, 5, CANCELLED)
    for run in store.all()[:2]:
        set_times(run, created=timedelta(days=9), submitted=timedelta(days=9), started=timedelta(days=9))
    set_times(store.all()[0], outcome=timedelta(days=3))
    set_times(store.all()[1], outcome=timedelta(hours=3))

    def selected(*words: str) -> str:
        rows = json.loads(cli("jobs", "--json", *words).stdout)
        return "".join(sorted(row["id"][-1] for row in rows))

    assert selected() == "12345"
    assert selected("--running") == "3"
    assert selected("--failed") == "2"
    assert selected("--running", "--failed") == "23"
    assert selected("--stage", "download") == "1"
    assert selected("--sweep", "mine") == "23"
    assert selected("--sweep", "seed-2") == "4"
    assert selected("--sweep", "mine", "--failed") == "2"
    assert selected("--since", "2d") == "2345"
    assert selected("--since", "1h") == "345"
    assert selected("--since", "2001-01-31") == "12345"
    assert selected("--since", "4d", "--stage", "download") == "1"
    assert "00000002" in cli("jobs", "--failed").stdout
    assert "no runs" in cli("jobs", "--stage", "upload").stdout


@pytest.mark.slow
def test_runs_that_slurm_ended_are_selected_by_when_they_ended(
    cli: Cli, store: RunStore, tmp_path: Path
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    write_command(folder, "squeue", f"echo '{queue_row(7, 'TIMEOUT')}'; echo '{queue_row(8, 'NODE_FAIL')}'")
    cli.env["PATH"] = f"{folder}:{cli.env['PATH']}"
    for number, hours in ((7, 6), (8, 29)):
        last = (datetime.now(timezone.utc) - timedelta(hours=hours)).isoformat()
        run = record_run(store, number, started={}, progress={"done": 1, "time": last})
        times = dict.fromkeys(("created", "submitted", "started"), timedelta(hours=30))
        assert run.attempt
        change(run.attempt.folder / "submitted.json", executor="slurm", job_id=str(number))
        set_times(run, **times)
    (row,) = json.loads(cli("jobs", "--failed", "--since", "12h", "--json").stdout)
    assert (row["job_id"], round(row["seconds"] / 3600)) == ("7", 24)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("--sweep", "nothing"), "no such sweep; one of: seed-1a, seed-2b"),
        (("--sweep", "seed-"), "matches seed-1a and seed-2b"),
        (("--since", "soon"), "--since soon is not a time: write 30m, 12h, 2d, 1w"),
        (("--since", "-2d"), "--since"),
        (("--stage", "trian"), "--stage"),
    ],
)
def test_bad_filter_is_one_line(cli: Cli, store: RunStore, words: tuple[str, ...], fragment: str) -> None:
    record_run(store, 1, sweeps=("seed-1a",))
    record_run(store, 2, sweeps=("seed-2b",))
    assert fragment in cli.refused("jobs", *words)


def test_labels_and_reasons_cannot_command_a_terminal(cli: Cli, store: RunStore) -> None:
    label = HOSTILE.replace("\ud800", "")  # JSON files are UTF-8
    record_run(store, 1, FAILED, label, label=label)
    printed = cli("jobs").stdout
    assert "\x1b" not in printed
    assert printed.replace("\n", "").isprintable()
    (row,) = job_rows(store.all())
    assert row["reason"] == label  # data is not changed
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="truecolor")
    assert not jobs_table.watch(store.all(), console)
    jobs_table.print_jobs([row], console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]ab c" in shown
    assert "\x1b[2J" not in shown
    assert "title" not in shown
    assert "\x1b[31mfailed" in shown  # its own colour


def test_text_is_made_printable() -> None:
    assert one_line(HOSTILE) == "[bold]ab cd?[/] 日本"
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b]8;;http://x") == ""
    assert printable("\x1bPq\x1b\\x\x1b(B\x1b") == "x"
    assert (fit("日本語", 5), fit("ab", 4), fit("abcd", 3), fit("x", 0)) == ("日本…", "ab  ", "ab…", "")


def test_durations() -> None:
    assert [span(s) for s in (None, 0, 59, 60, 7200, 86400 * 13, 86400 * 14, 86400 * 400)] == [
        *("", "0s", "59s", "1m", "2h", "13d", "2w", "57w")
    ]
    assert [parse_span(text) for text in ("90s", "1.5h", "2d", "1w", "", "d", "-1d", "nand", "2 days")] == [
        *(90, 5400, 172800, 604800, None, None, None, None, None)
    ]
    assert [clock(s) for s in (None, 7, 725, 11049)] == ["", "0:07", "12:05", "3:04:09"]
