"""Leaderboard: trainings and evaluations, sorted by top-1 accuracy, beside published accuracies."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import one_line
from hpc_imagenet.report.attempt_times import gpus_of, intervals, running_hours
from hpc_imagenet.report.durations import clock
from hpc_imagenet.report.jobs_table import job_rows
from hpc_imagenet.report.published import PublishedAccuracy, published_for
from hpc_imagenet.runs.store import Run

# Columns of --csv and --markdown: key of a row, heading of the Markdown table.
_COLUMNS = {
    "run": "run",
    "model": "model",
    "datastore": "datastore",
    "split": "split",
    "seed": "seed",
    "state": "state",
    "top1": "top-1 %",
    "published_top1": "published %",
    "published_protocol": "published by",
    "published_same_protocol": "same protocol",
    "top5": "top-5 %",
    "loss": "val loss",
    "epochs": "epochs",
    "parameters": "parameters",
    "gpu_hours": "GPU-hours",
    "hours": "hours",
    "images_per_second": "images/s",
    "dir": "run folder",
}
_ACCURACIES = ("top1", "published_top1", "top5")
_IN_CSV_ONLY = ("loss", "dir")
_MEASURED = ("top5", "loss", "images_per_second", "epochs", "parameters")


@dataclass(frozen=True)
class Training:
    """A training, its frozen config (empty if that cannot be read), and its row in the leaderboard."""

    run: Run
    frozen: dict[str, Any]
    row: dict[str, Any]
    published: PublishedAccuracy | None


def trainings(runs: Iterable[Run]) -> list[Training]:
    """Return all trainings among `runs`, highest top-1 first; runs without one are last."""
    return _entries(runs, ("train",))


def _entries(runs: Iterable[Run], stages: tuple[str, ...]) -> list[Training]:
    found = [run for run in runs if run.info.get("stage") in stages]
    entries = [_training(run, row) for run, row in zip(found, job_rows(found), strict=True)]
    return sorted(entries, key=lambda entry: (entry.row["top1"] is None, -(entry.row["top1"] or 0)))


def leaderboard_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return one row per training or evaluation, in the order of `trainings`.

    A training is judged on `split` val after its last epoch. An evaluation has a checkpoint of the run
    `training` judged on any split.

    A row is that of `jobs_table.job_rows` with datastore, seed, top5, loss, images_per_second, epochs,
    parameters, hours (of all attempts), gpu_hours (0 without GPUs) and published_top1, published_protocol and
    published_same_protocol (None where nothing is published).
    """
    return [entry.row for entry in _entries(runs, ("train", "evaluate"))]


def render_leaderboard(table: Iterable[dict[str, Any]]) -> Table:
    """Return the leaderboard as a table for a terminal."""
    rows = list(table)
    with_published = any(row["published_top1"] is not None for row in rows)
    rendered = Table(box=None, pad_edge=False, header_style="bold")
    rendered.add_column("model", no_wrap=True)
    rendered.add_column("datastore", no_wrap=True)
    for name in (
        "seed",
        "top-1 %",
        *(("published %",) if with_published else ()),
        "top-5 %",
        "images/s",
        "time",
    ):
        rendered.add_column(name, justify="right", no_wrap=True)
    rendered.add_column("state", no_wrap=True)
    rendered.add_column("run folder", overflow="fold")
    for row in rows:
        is_evaluation = row["stage"] == "evaluate"
        evaluation = escape(f" (evaluation on {one_line(row['split'])})") if is_evaluation else ""
        rendered.add_row(
            escape(one_line(row["model"])) + evaluation,
            escape(one_line(row["datastore"] or "")),
            "" if row["seed"] is None else escape(one_line(row["seed"])),
            _percent(row["top1"]),
            *((_published(row),) if with_published else ()),
            _percent(row["top5"]),
            "" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}",
            clock(row["training_seconds"]),
            row["state"] if row["learned"] in (True, None) else f"{row['state']}, at chance",
            escape(one_line(row["dir"])),
        )
    return rendered


def format_csv(table: Sequence[dict[str, Any]]) -> str:
    """Return the leaderboard as CSV: accuracies from 0 to 1, empty where something is unknown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(_COLUMNS), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def format_markdown(table: Sequence[dict[str, Any]]) -> str:
    """Return the leaderboard as a Markdown table: accuracies in percent."""
    keys = [key for key in _COLUMNS if key not in _IN_CSV_ONLY]
    lines = [[_COLUMNS[key] for key in keys], ["---"] * len(keys)]
    lines += [[_markdown_cell(key, row.get(key)) for key in keys] for row in table]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _training(run: Run, row: dict[str, Any]) -> Training:
    try:
        frozen = run.frozen()  # config() takes 50 ms and may fail for old runs
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        frozen = {}
    frozen = frozen if isinstance(frozen, dict) else {}
    result = row.pop("result")
    row |= {key: _number(result.get(key)) for key in _MEASURED}
    row |= {key: result.get(key) for key in ("learned", "advice")}
    row["top1"] = _number(row["top1"])
    # Wall time of the training loop in the last attempt; `hours` is the time of the jobs of all attempts.
    row["training_seconds"] = result.get("seconds")
    row["datastore"] = _get(frozen, "datastore", "name")
    row["seed"] = frozen.get("seed")
    is_training = row["stage"] == "train"
    row["split"] = "val" if is_training else _get(frozen, "evaluate", "split")
    row["training"] = None if is_training else _get(frozen, "evaluate", "run")
    row["hours"], gpus = _hours(run, row["state"]), 0
    published, same = None, None
    try:
        gpus = gpus_of(run, frozen)
        published, same = (published_for(frozen) if is_training else None) or (None, None)
    except (KeyError, TypeError, ValueError, AttributeError, UserError):  # a config of another version
        pass
    row["gpu_hours"] = round(gpus * row["hours"], 4)
    row["published_top1"] = published.top1 if published else None
    row["published_protocol"] = _protocol(published) if published else None
    row["published_same_protocol"] = same
    return Training(run, frozen, row, published)


def _hours(run: Run, state: str) -> float:
    attempts = run.attempts()
    active = state in ("queued", "running")
    parts = [intervals(attempt, active and attempt is attempts[-1]) for attempt in attempts]
    return round(sum(map(running_hours, parts)), 4)


def _number(value: Any) -> float | None:
    """Return a finite number; None for anything else that a damaged or foreign record may hold."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _get(values: dict[str, Any], group: str, name: str) -> Any:
    inner = values.get(group)
    return inner.get(name) if isinstance(inner, dict) else None


def _protocol(published: PublishedAccuracy) -> str:
    epochs = f"{published.epochs} epochs" if published.epochs else "epochs not stated"
    return f"{published.protocol}, {epochs}, {published.val_size} px"


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.2f}"


def _published(row: dict[str, Any]) -> str:
    """Return the published accuracy; in brackets if it is of another protocol."""
    text = _percent(row["published_top1"])
    return text if not text or row["published_same_protocol"] else f"({text})"


def _markdown_cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key in _ACCURACIES:
        return _percent(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    if isinstance(value, int) and key == "parameters":
        return f"{value:,}"
    text = one_line(value)
    for character, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("[", "\\[")):
        text = text.replace(character, instead)
    return text
