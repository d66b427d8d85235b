"""Leaderboard: all trainings and evaluations of a workspace, sorted by top-1 accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.table import Table

from hpc_imagenet.report.jobs_table import clock, job_rows
from hpc_imagenet.runs.store import Run


def leaderboard_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return one row per training or evaluation: `jobs_table.job_rows` plus top5, seed, split and others.

    A training is judged on `split` val after its last epoch. An evaluation has a checkpoint of the run
    `training` judged on any split.

    Sorted by top-1, highest first; runs without one are last.
    """
    scored = [run for run in runs if run.info.get("stage") in ("train", "evaluate")]
    table = job_rows(scored)
    for run, row in zip(scored, table, strict=True):
        frozen, result = run.frozen(), row.pop("result")  # config() takes 50 ms and may fail for old runs
        row |= {key: result.get(key) for key in ("top5", "loss", "images_per_second", "epochs", "parameters")}
        # Wall time of the training loop; `seconds` counts from the start of the job.
        row["training_seconds"] = result.get("seconds")
        row["datastore"] = frozen["datastore"]["name"]
        row["seed"] = frozen["seed"]
        evaluated = frozen["evaluate"] if row["stage"] == "evaluate" else {"split": "val", "run": None}
        row |= {"split": evaluated["split"], "training": evaluated["run"]}
    return sorted(table, key=lambda row: -1.0 if row["top1"] is None else row["top1"], reverse=True)


def render_leaderboard(table: Iterable[dict[str, Any]]) -> Table:
    """Return the leaderboard as a table for a terminal."""
    rendered = Table(box=None, pad_edge=False, header_style="bold")
    rendered.add_column("model", no_wrap=True)
    rendered.add_column("datastore", no_wrap=True)
    for name in ("seed", "top-1 %", "top-5 %", "images/s", "time"):
        rendered.add_column(name, justify="right", no_wrap=True)
    rendered.add_column("state", no_wrap=True)
    rendered.add_column("run folder", overflow="fold")
    for row in table:
        evaluation = f" (evaluation on {row['split']})" if row["stage"] == "evaluate" else ""
        rendered.add_row(
            escape(row["model"] + evaluation),
            escape(row["datastore"]),
            str(row["seed"]),
            "" if row["top1"] is None else f"{100 * row['top1']:.2f}",
            "" if row["top5"] is None else f"{100 * row['top5']:.2f}",
            "" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}",
            clock(row["training_seconds"]),
            row["state"],
            escape(row["dir"]),
        )
    return rendered
