"""Leaderboard: trainings and evaluations, sorted by top-1 accuracy, beside published accuracies."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import one_line
from hpc_imagenet.report.durations import clock
from hpc_imagenet.report.jobs_table import job_rows
from hpc_imagenet.report.published import PublishedAccuracy, published_for
from hpc_imagenet.report.show.attempt_times import gpus_of, intervals, running_hours
from hpc_imagenet.report.show.resources import energies_of
from hpc_imagenet.report.terminal_text import columns
from hpc_imagenet.runs.store import Run

# Columns of --csv and --markdown: key of a row, heading of the Markdown table.
_COLUMNS = {
    "run": "run",
    "model": "model",
    "datastore": "datastore",
    "split": "split",
    "seed": "seed",
    "state": "state",
    "learned": "learned",
    "top1": "top-1 %",
    "published_top1": "published %",
    "published_protocol": "published by",
    "published_same_protocol": "same protocol",
    "top5": "top-5 %",
    "loss": "val loss",
    "epochs": "epochs",
    "parameters": "parameters",
    "gpu_hours": "GPU-hours",
    "gpu_hours_per_point": "GPU-hours per point",
    "kwh": "kWh",
    "kwh_per_point": "kWh per point",
    "energy_of": "energy of",
    "hours": "hours",
    "images_per_second": "images/s",
    "dir": "run folder",
}
_ACCURACIES = ("top1", "published_top1", "top5")
_IN_CSV_ONLY = ("learned", "loss", "dir", "gpu_hours_per_point", "energy_of")
_MEASURED = ("top5", "loss", "images_per_second", "epochs", "parameters")


@dataclass(frozen=True)
class Training:
    """A training, its frozen config (empty if that cannot be read), its row, and its evaluations."""

    run: Run
    frozen: dict[str, Any]
    row: dict[str, Any]
    published: PublishedAccuracy | None
    evaluations: tuple[Training, ...] = ()  # newest last


def trainings(runs: Iterable[Run]) -> list[Training]:
    """Return all trainings among `runs`, highest top-1 first; runs without one are last."""
    return [entry for entry in _entries(runs) if entry.row["stage"] == "train"]


def _entries(runs: Iterable[Run]) -> list[Training]:
    """Return trainings with their evaluations, and the evaluations of other checkpoints, best first."""
    found = [run for run in runs if run.info.get("stage") in ("train", "evaluate")]
    rows, energies = job_rows(found), energies_of(found)
    entries = [_training(run, row, *energies[run.id]) for run, row in zip(found, rows, strict=True)]
    known = {entry.run.id for entry in entries}
    evaluations: dict[str, list[Training]] = {}
    for entry in entries:
        if entry.row["training"] in known:
            evaluations.setdefault(entry.row["training"], []).append(entry)
    first = [
        replace(entry, evaluations=tuple(evaluations.get(entry.run.id, ())))
        for entry in entries
        if entry.row["training"] not in known
    ]
    return sorted(first, key=lambda entry: (entry.row["top1"] is None, -(entry.row["top1"] or 0)))


def leaderboard_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return one row per training or evaluation: trainings as in `trainings`, each before its evaluations.

    A training is judged on `split` val after its last epoch. An evaluation has a checkpoint of the run
    `training` judged on any split.

    A row is that of `jobs_table.job_rows` with datastore, seed, top5, loss, images_per_second, epochs,
    parameters, hours (of all attempts), gpu_hours (0 without GPUs), kwh (None if unknown), energy_of (`GPUs`
    or `nodes`), gpu_hours_per_point and kwh_per_point (of top-1, in percent), learned (False: at chance) with
    its advice, and published_top1, published_protocol and published_same_protocol (None where nothing is
    published).
    """
    return [each.row for entry in _entries(runs) for each in (entry, *entry.evaluations)]


def render_leaderboard(table: Iterable[dict[str, Any]], width: int | None = None) -> Table:
    """Return the leaderboard as a table for a terminal.

    Args:
        table: result of `leaderboard_rows`.
        width: columns of the terminal; less important columns are left out until it fits. None: all.
    """
    rows = list(table)
    cells = {name: [cell(row) for row in rows] for name, cell in _TERMINAL.items()}
    runs = {row["run"] for row in rows}
    cells["model"] = [_name(row, runs) for row in rows]
    for name in ("published %", "GPU-hours", "kWh", "kWh/point"):
        if not any(cells[name]):
            del cells[name]
    widths = {name: max(map(columns, (name, *texts))) + 2 for name, texts in cells.items()}
    for name in ("run folder", *_LEFT_OUT):
        if width is not None and name in cells and sum(widths[each] for each in cells) - 2 > width:
            del cells[name]
            if name == "run folder":
                cells["run"], widths["run"] = [one_line(row["run"])[:8] for row in rows], 10
    rendered = Table(box=None, pad_edge=False, header_style="bold")
    for name in cells:
        is_text = name in ("model", "datastore", "state", "run", "run folder")
        rendered.add_column(name, justify="left" if is_text else "right", no_wrap=name != "run folder")
    rendered.columns[-1].overflow = "fold"
    for row in zip(*cells.values(), strict=True):
        rendered.add_row(*map(escape, row))
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
    for row in table:
        shown = {**row, "state": _state(row)}
        lines.append([_markdown_cell(key, shown.get(key)) for key in keys])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _name(row: dict[str, Any], runs: Collection[str]) -> str:
    model = one_line(row["model"] or row["label"])  # a damaged run.json has no model
    if row["stage"] != "evaluate":
        return model
    evaluation = f"evaluation on {one_line(row['split'])}"
    return f"  {evaluation}" if row["training"] in runs else f"{model} ({evaluation})"


def _training(run: Run, row: dict[str, Any], kwh: float | None, energy_of: str) -> Training:
    frozen = run.readable_config()  # config() takes 50 ms and may fail for old runs
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
    row["kwh"], row["energy_of"] = kwh, energy_of
    for name in ("gpu_hours", "kwh"):
        row[f"{name}_per_point"] = row[name] / (100 * row["top1"]) if row[name] and row["top1"] else None
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


def _amount(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _state(row: dict[str, Any]) -> str:
    return str(row["state"]) if row["learned"] in (True, None) else f"{row['state']}, at chance"


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
        return f"{value:.2f}" if 0.1 <= abs(value) < 100 else _amount(value)
    if isinstance(value, int) and key == "parameters":
        return f"{value:,}"
    text = one_line(value)
    for character, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("[", "\\[")):
        text = text.replace(character, instead)
    return text


# Columns in a terminal, and the order in which they are left out of a narrow one.
_TERMINAL: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda row: one_line(row["model"] or row["label"]),
    "datastore": lambda row: one_line(row["datastore"] or ""),
    "seed": lambda row: "" if row["seed"] is None else one_line(row["seed"]),
    "top-1 %": lambda row: _percent(row["top1"]),
    "published %": _published,
    "top-5 %": lambda row: _percent(row["top5"]),
    "images/s": lambda row: "" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}",
    "time": lambda row: clock(row["training_seconds"]),
    "GPU-hours": lambda row: _amount(row["gpu_hours"] or None),
    "kWh": lambda row: _amount(row["kwh"]),
    "kWh/point": lambda row: _amount(row["kwh_per_point"]),
    "state": _state,
    "run folder": lambda row: one_line(row["dir"]),
}
_LEFT_OUT = (
    *("kWh/point", "images/s", "top-5 %", "time", "datastore", "seed", "published %"),
    *("kWh", "GPU-hours"),
)
