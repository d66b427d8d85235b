"""Leaderboard: trainings and evaluations, sorted by top-1 accuracy, beside published accuracies."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpc_imagenet.config.recipe import VAL_SETTINGS
from hpc_imagenet.io.printable import one_line
from hpc_imagenet.report.durations import clock
from hpc_imagenet.report.jobs_table import workspace_rows
from hpc_imagenet.report.leaderboard_details import Details, DetailsCache
from hpc_imagenet.report.published import PublishedAccuracy
from hpc_imagenet.report.show.resources import energies_of
from hpc_imagenet.report.show.validations import validation_difference, validations
from hpc_imagenet.report.terminal_text import Line, columns, fit
from hpc_imagenet.runs.attempt import RUNNING, is_number
from hpc_imagenet.runs.checkpoints import BEST
from hpc_imagenet.runs.run_records import RecordCache
from hpc_imagenet.runs.store import Run, RunStore

# Columns of --csv and --markdown: key of a row, heading of the Markdown table.
_COLUMNS = {
    "run": "run",
    "model": "model",
    "stage": "stage",
    "datastore": "datastore",
    "content": "content",
    "split": "split",
    "val_size": "val px",
    "val_resize": "val_resize",
    "val_flip": "mirrored",
    "training": "training",
    "checkpoint": "checkpoint",
    "step": "step",
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
_IN_CSV_ONLY = (
    *("content", "val_resize", "training", "learned", "loss", "dir"),
    *("gpu_hours_per_point", "energy_of"),
)
_MEASURED = ("top5", "loss", "images_per_second", "epochs", "parameters", "step")
_OF_DETAILS = ("datastore", "content", "seed", "split", "training", "checkpoint", "hours", *VAL_SETTINGS)
# Columns of a name in a narrow terminal: at least, and before another column is left out for it.
_LEAST_NAME, _USUAL_NAME = 20, 40


@dataclass(frozen=True)
class Training:
    """A training or an evaluation: its row, what is published of it, and its evaluations."""

    run: Run
    row: dict[str, Any]
    published: PublishedAccuracy | None
    evaluations: tuple[Training, ...] = ()  # newest last

    @functools.cached_property
    def frozen(self) -> dict[str, Any]:
        """The frozen config; empty if it cannot be read."""
        return self.run.readable_config()


def trainings(store: RunStore) -> list[Training]:
    """Return all trainings that this user may read, highest top-1 first; those without one are last."""
    return [entry for entry in _entries(store) if entry.row["stage"] == "train"]


def _entries(store: RunStore) -> list[Training]:
    """Return trainings with their evaluations, and the evaluations of other checkpoints, best first."""
    rows = workspace_rows(store, RecordCache(store))
    rows = [row for row in rows if row["stage"] in ("train", "evaluate")]
    cache = DetailsCache(store, {row["run"] for row in rows if row["state"] == RUNNING})
    runs = [store.run(row["run"]) for row in rows]
    details = cache.read(runs)
    cache.save(runs)
    energies = energies_of(run for run in runs if run.id in details and not details[run.id].measured)
    entries = []
    for run, row in zip(runs, rows, strict=True):
        if run.id in details:
            found = details[run.id]
            kwh, energy_of = energies.get(run.id, (found.kwh, found.energy_of))
            entries.append(_training(run, row, found._replace(kwh=kwh, energy_of=energy_of)))
    _find_versions([entry.row for entry in entries])
    known = {entry.run.id for entry in entries}
    evaluations: dict[str, list[Training]] = {}
    for entry in entries:
        if entry.row["training"] in known:
            evaluations.setdefault(entry.row["training"], []).append(entry)
    for entry in entries:
        if own := evaluations.get(entry.run.id):
            _find_replaced(entry.run, [each.row for each in own])
    first = [
        replace(entry, evaluations=tuple(evaluations.get(entry.run.id, ())))
        for entry in entries
        if entry.row["training"] not in known
    ]
    return sorted(first, key=lambda entry: (entry.row["top1"] is None, -(entry.row["top1"] or 0)))


def _find_versions(rows: Sequence[dict[str, Any]]) -> None:
    """Set the version of a datastore in rows of pipelines, which know its content alone, by other rows."""
    versions = {}
    for row in rows:
        name, at, _ = str(row["datastore"]).partition("@")
        if at and row["content"]:
            versions[name, row["content"]] = row["datastore"]
    for row in rows:
        row["datastore"] = versions.get((str(row["datastore"]), row["content"]), row["datastore"])


def _find_replaced(training: Run, evaluations: Iterable[dict[str, Any]]) -> None:
    """Set in rows of evaluations of a best.ckpt whether the training has replaced it since."""
    with contextlib.suppress(OSError):  # such as no permission
        found = validations(training.folder / "metrics.csv")
        for row in evaluations:
            if found and row["step"] is not None and row["checkpoint"] == BEST:
                row["replaced"] = row["step"] < found["best"]["step"]


def leaderboard_rows(store: RunStore) -> list[dict[str, Any]]:
    """Return one row per training or evaluation: trainings as in `trainings`, each before its evaluations.

    A training is judged on `split` val after its last epoch. An evaluation has a checkpoint of the run
    `training` judged on any split.

    A row is that of `jobs_table.job_rows` with datastore (name@vN; without a version that is unknown), its
    content, seed, val_size, val_resize and val_flip, top5, loss, images_per_second, epochs, parameters, hours
    (of all attempts), gpu_hours (0 without GPUs), kwh (None if unknown), energy_of (`GPUs` or `nodes`),
    gpu_hours_per_point and kwh_per_point (of top-1, in percent), learned (False: at chance) with
    its advice, and published_top1, published_protocol and published_same_protocol (None where nothing is
    published). An evaluation also has checkpoint (file name), its step, and replaced: whether the training
    has replaced that best.ckpt since (None if unknown, and for other checkpoints).
    """
    return [each.row for entry in _entries(store) for each in (entry, *entry.evaluations)]


def leaderboard_lines(table: Iterable[dict[str, Any]], width: int | None = None) -> list[Line]:
    """Return a header and one line per row, for a terminal.

    Args:
        table: result of `leaderboard_rows`.
        width: columns of the terminal; less important columns are left out until it fits. None: all.
    """
    rows = list(table)
    cells = {name: [cell(row) for row in rows] for name, cell in _TERMINAL.items()}
    runs = {row["run"]: row for row in rows}
    cells["model"] = [_name(row, runs) for row in rows]
    for name in ("published %", "GPU-hours", "kWh", "kWh/point"):
        if not any(cells[name]):
            del cells[name]
    widths = {name: max(map(columns, (name, *texts))) for name, texts in cells.items()}
    longest = widths["model"]
    if width is not None:  # long names of evaluations do not take the columns of all rows
        own = [columns(_name(row, runs)) for row in rows if row["stage"] == "train"]
        widths["model"] = min(longest, max([_USUAL_NAME, *own]))
    for name in ("run folder", *_LEFT_OUT):
        if width is not None and name in cells and sum(widths[each] + 2 for each in cells) - 2 > width:
            del cells[name]
            if name == "run folder":
                cells["run"], widths["run"] = [one_line(row["run"])[:8] for row in rows], 8
    if width is not None:  # names get what is left, and long ones are cut; the first digits of the run stay
        left = width - sum(widths[each] + 2 for each in cells if each != "model")
        widths["model"] = min(longest, max(_LEAST_NAME, left))

    def line(texts: Sequence[str]) -> str:
        parts = zip(cells, texts, strict=True)
        return "  ".join(fit(text, widths[name], right=name not in _TEXTS) for name, text in parts)

    return [[(line(list(cells)), "bold")], *([(line(row), "")] for row in zip(*cells.values(), strict=True))]


def format_csv(table: Sequence[dict[str, Any]]) -> str:
    """Return the leaderboard as CSV: accuracies from 0 to 1, empty where something is unknown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(_COLUMNS), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in table:
        writer.writerow(
            {key: one_line(value) if isinstance(value, str) else value for key, value in row.items()}
        )
    return text.getvalue()


def format_markdown(table: Sequence[dict[str, Any]]) -> str:
    """Return the leaderboard as a Markdown table: accuracies in percent."""
    keys = [key for key in _COLUMNS if key not in _IN_CSV_ONLY]
    lines = [[_COLUMNS[key] for key in keys], ["---"] * len(keys)]
    for row in table:
        shown = {**row, "state": _state(row)}
        lines.append([_markdown_cell(key, shown.get(key)) for key in keys])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def evaluation_name(row: dict[str, Any], training: dict[str, Any] | None) -> str:
    """Return what an evaluation has judged: its split, and where it differs from its training or best.ckpt.

    The step distinguishes checkpoints of one file name. It is left out only of a known training's present
    best.ckpt and epoch-N.ckpt.

    Args:
        row: row of the evaluation.
        training: row of its training; None if that is not in the workspace.
    """
    data = row["split"]
    if training and training["content"] and training["content"] != row["content"]:
        data = f"{data} of {row['datastore']}"
    parts = [str(data), validation_difference(row, training or {})]
    checkpoint = row["checkpoint"] or ""
    numbered = training and checkpoint.startswith("epoch-")
    if row["step"] is not None and row["replaced"] is not False and not numbered:
        parts.append(f"{checkpoint} of step {row['step']}".strip())
    elif checkpoint != BEST:
        parts.append(checkpoint)
    return one_line(", ".join(filter(None, parts)))


def _name(row: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    model = one_line(row["model"] or row["label"])  # a damaged run.json has no model
    if row["stage"] != "evaluate":
        return model
    training = runs.get(row["training"])
    evaluation = f"evaluation on {evaluation_name(row, training)}"
    return f"  {evaluation}" if training else f"{model} ({evaluation})"


def _training(run: Run, row: dict[str, Any], details: Details) -> Training:
    result = row.pop("result")
    row |= {key: _number(result.get(key)) for key in _MEASURED}
    row |= {key: result.get(key) for key in ("learned", "advice")}
    row["top1"] = _number(row["top1"])
    # Wall time of all starts, without work that a kill has lost; `hours` is that of the jobs of all attempts.
    row["training_seconds"] = _number(result.get("seconds"))
    row |= {key: getattr(details, key) for key in _OF_DETAILS}
    row["replaced"] = None
    row["gpu_hours"] = details.gpu_hours
    row["kwh"], row["energy_of"] = details.kwh, details.energy_of
    for name in ("gpu_hours", "kwh"):
        row[f"{name}_per_point"] = row[name] / (100 * row["top1"]) if row[name] and row["top1"] else None
    published = details.published
    row["published_top1"] = published.top1 if published else None
    row["published_protocol"] = _protocol(published) if published else None
    row["published_same_protocol"] = details.same_protocol
    return Training(run, row, published)


def _number(value: Any) -> float | None:
    """Return a finite number; None for anything else that a damaged or foreign record may hold."""
    return value if is_number(value) else None


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
_TEXTS = ("model", "datastore", "state", "run", "run folder")  # the others are numbers
_LEFT_OUT = (
    *("kWh/point", "images/s", "top-5 %", "time", "datastore", "seed", "published %"),
    *("kWh", "GPU-hours"),
)
