"""Everything about one run: its state, settings, result, checkpoints and files, as data or for a terminal."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hpc_imagenet.config.default_values import default_values
from hpc_imagenet.config.names.tracker_names import parse_trackers
from hpc_imagenet.io.printable import one_line
from hpc_imagenet.report.durations import clock
from hpc_imagenet.report.jobs_table import job_rows
from hpc_imagenet.report.show.attempt_details import attempt_details, attempt_lines
from hpc_imagenet.report.show.resources import total_energy
from hpc_imagenet.report.show.validations import validations
from hpc_imagenet.runs.checkpoints import list_checkpoints
from hpc_imagenet.runs.store import Run

# Sections of the config that decide what a stage does.
_SECTIONS: dict[str, tuple[str, ...]] = {
    "download": ("dataset", "download"),
    "process": ("dataset", "process"),
    "upload": ("dataset", "datastore", "upload"),
    "train": ("datastore", "model", "recipe", "loader", "train"),
    "evaluate": ("evaluate", "datastore", "recipe", "loader"),
    "price": ("datastore", "model", "recipe", "loader", "train"),
    "search": ("search", "datastore", "model", "recipe", "loader", "train"),
    "session": ("session",),
}
_ALWAYS = ("model.name", "datastore.name")  # shown whether or not they are defaults
_EMPTY: tuple[Any, ...] = (None, [], "")


def run_details(run: Run) -> dict[str, Any]:
    """Return what is known about a run.

    Returns:
        The row of `jobs_table.job_rows`, and settings (model, datastore and seed, and those that differ from
        the defaults of conf/config.yaml and the groups it chooses, by section; "": without a section),
        validations (of a training: the last and the best, with step, epoch, top1, top5 and loss), checkpoints
        and files (each with path and bytes), the bytes of the whole folder on disk, attempts (each with
        number, state, reason, executor, job, nodes, requeued, code, submitted, started and ended (ISO 8601),
        queued_seconds, resources (see `resources.resources_of`) and diagnosis (class, text, remedy,
        command; None unless it failed)), gpu_hours and kwh (of all attempts; kwh is None if unknown).
    """
    frozen, (row,) = run.readable_config(), job_rows([run])
    attempts = attempt_details(run, row)
    inside = (Path(folder, name) for folder, _, names in os.walk(run.folder) for name in names)
    states = _states(sorted(inside))
    logs = _states(run.attempt.logs() if run.attempt else ())
    checkpoints = {path: states[path] for path in list_checkpoints(run.folder) if path in states}
    others = {path: states[path] for path in states if path not in checkpoints and _is_shown(path, run)}
    return {
        **row,
        "settings": _changed_settings(str(row["stage"]), frozen),
        "validations": validations(run.folder / "metrics.csv"),
        "checkpoints": _sizes(checkpoints),
        "files": _sizes({**others, **logs}),
        # Checkpoints that are names of one file count once.
        "bytes": sum({(each.st_dev, each.st_ino): each.st_size for each in states.values()}.values()),
        "attempts": attempts,
        "gpu_hours": sum(each["resources"]["gpu_hours"] for each in attempts),
        "kwh": total_energy([_energy(each["resources"]) for each in attempts])[0],
    }


def render_details(details: dict[str, Any]) -> Table:
    """Return the result of `run_details` as a table for a terminal."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, *parts: str) -> None:
        if text := " · ".join(part for part in parts if part):
            table.add_row(name, escape(one_line(text)))

    add("run", details["run"])
    again = f"attempt {details['attempt']}" if details["attempt"] > 1 else ""
    add("state", details["state"], details["reason"], again, clock(details["seconds"]))
    add("folder", details["dir"], f"{size(details['bytes'])} on disk")
    newest = details["attempts"][-1:]
    if newest and (diagnosis := newest[0]["diagnosis"]):
        add("diagnosis", diagnosis["text"])
        add("remedy", diagnosis["command"])
    add("job", " ".join(["one loader with", *details["shares_with"]]) if details["shares_with"] else "")
    settings = [
        " ".join(f"{section}{'.' if section else ''}{name}={_typed(value)}" for name, value in values.items())
        for section, values in details["settings"].items()
    ]
    for number, line in enumerate([*settings, "all others are the defaults"] if settings else []):
        add("" if number else "settings", line)
    add("result", *(f"{name} {_short(value)}" for name, value in details["result"].items()))
    for name, metrics in details["validations"].items():
        accuracy = f"top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, loss {metrics['loss']:.4g}"
        add(name, f"{accuracy} on val after epoch {metrics['epoch']}")
    for each in details["attempts"]:
        for number, line in enumerate(attempt_lines(each, len(details["attempts"]) > 1)):
            add("" if number else f"attempt {each['number']}", line)
    if len(details["attempts"]) > 1 and details["gpu_hours"]:
        energy = "energy unknown" if details["kwh"] is None else f"{details['kwh']:.3g} kWh"
        add("total", f"{details['gpu_hours']:.2f} GPU-hours", energy)
    for title in ("checkpoints", "files"):
        for number, file in enumerate(details[title]):
            path = Path(file["path"])
            inside = path.relative_to(details["dir"]) if path.is_relative_to(details["dir"]) else path
            add("" if number else title, f"{size(file['bytes']):>8}  {inside}")
    return table


def _energy(resources: dict[str, Any]) -> tuple[tuple[float | None, str], float]:
    return (resources["kwh"], resources["energy_of"]), resources["hours"]


def size(count: int) -> str:
    """Return a number of bytes as 12 B, 3.4 kB, 5.6 MB or 7.8 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _changed_settings(stage: str, frozen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of a stage that differ from the defaults, by section; see `run_details`."""
    defaults, found = default_values(), {}
    for section in (*_SECTIONS.get(stage, ()), "cluster"):
        usual = dict(_flat(_section(defaults, section)))
        found[section] = {
            name: value
            for name, value in _flat(_section(frozen, section))
            if f"{section}.{name}" in _ALWAYS or _differs(value, usual.get(name), section)
        }
    found["cluster"] = {
        name: value
        for name, value in found["cluster"].items()
        if not name.startswith("stage.") or name.startswith(f"stage.{stage}.")  # those of other stages
    }
    if stage == "evaluate":
        found["recipe"] = {name: value for name, value in found["recipe"].items() if name.startswith("val_")}
    if stage == "train":
        found[""] = {"seed": frozen["seed"]} if "seed" in frozen else {}
        with contextlib.suppress(ValueError):  # a damaged record
            names = parse_trackers(frozen.get("tracker"))
            if names != parse_trackers(defaults["tracker"]) and "tracker" in frozen:
                found[""]["tracker"] = names
    return {section: values for section, values in found.items() if values}


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section; empty if a damaged config has something else there."""
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _differs(value: Any, usual: Any, section: str) -> bool:
    """Whether a value is no default; what a dataset leaves empty is another one's, such as an MD5."""
    empty = value in _EMPTY and (usual in _EMPTY or section == "dataset")
    return not empty and value != usual


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name == "source" and isinstance(value, dict):  # text of a user's network
            yield f"{prefix}{name}", f"[{', '.join(map(str, value))}]" if value else None
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _states(paths: Iterable[Path]) -> dict[Path, os.stat_result]:
    """Return the state of those paths that are files; a training may have removed some meanwhile."""
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            state = path.stat()
            if stat.S_ISREG(state.st_mode):
                found[path] = state
    return found


def _sizes(states: dict[Path, os.stat_result]) -> list[dict[str, Any]]:
    return [{"path": str(path), "bytes": state.st_size} for path, state in states.items()]


def _is_shown(path: Path, run: Run) -> bool:
    """Whether a file of a run is no record of an attempt, and no hidden file."""
    parts = path.relative_to(run.folder).parts
    return parts[0] != "attempts" and not any(part.startswith(".") for part in parts)


def _typed(value: Any) -> str:
    """Return a value as it is typed in an override."""
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
