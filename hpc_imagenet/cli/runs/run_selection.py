"""Options that select runs, of `jobs`, `cancel` and `retry`: --running --failed --stage --sweep --since."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hpc_imagenet.config.schema import STAGES
from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.runs.attempt import FAILED, QUEUED, RUNNING, instant
from hpc_imagenet.runs.store import Run, RunStore

if TYPE_CHECKING:
    from hpc_imagenet.runs.run_records import RecordCache

_OPTIONS = ("running", "failed", "stage", "sweep", "since")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the options that select runs."""
    stages = [stage for stage in STAGES if stage != "pipeline"]
    parser.add_argument("--running", action="store_true", help="running runs")
    parser.add_argument("--failed", action="store_true", help="failed runs")
    parser.add_argument("--stage", metavar="S", choices=stages, help=f"runs of a stage: {', '.join(stages)}")
    parser.add_argument("--sweep", metavar="S", help="runs of a sweep: its name, or the beginning of it")
    parser.add_argument(
        "--since", metavar="T", help="active, submitted or ended since: 30m, 12h, 2d, 1w or 2026-01-31"
    )


def add_runs_or_selection(parser: argparse.ArgumentParser) -> None:
    """Add the argument RUN, any number, and the options that select runs."""
    parser.add_argument("runs", metavar="RUN", nargs="*")
    add_selection(parser)


def has_selection(options: argparse.Namespace) -> bool:
    """Whether an option that selects runs was given."""
    return any(getattr(options, name) for name in _OPTIONS)


def selected_rows(
    store: RunStore, cache: RecordCache, options: argparse.Namespace, since: float | None = None
) -> list[dict[str, Any]]:
    """Return the rows of `jobs_table.workspace_rows` that the options select; without options all.

    Args:
        store: the runs of the workspace.
        cache: the records of ended runs.
        options: the parsed arguments.
        since: when polling began, as in `states.states`.

    Raises:
        UserError: no such sweep, or an invalid time.
    """
    from hpc_imagenet.report.jobs_table import workspace_rows

    matches = _time_filter(options.since) if options.since else lambda _: True
    rows = workspace_rows(store, cache, since)
    sweep = find_sweep((each for row in rows for each in row["sweeps"]), options.sweep)
    states = [name for name, given in ((RUNNING, options.running), (FAILED, options.failed)) if given]
    return [
        row
        for row in rows
        if (not states or row["state"] in states)
        and options.stage in (None, row["stage"])
        and (sweep is None or sweep in row["sweeps"])
        and matches(row)
    ]


def named_or_selected(store: RunStore, options: argparse.Namespace, command: str) -> tuple[list[Run], bool]:
    """Return the runs that are named, else this user's that the options select, and whether it is these.

    Raises:
        UserError: neither or both are given, a name does not match, or nothing is selected.
    """
    from hpc_imagenet.runs.run_records import RecordCache

    if bool(options.runs) == has_selection(options):
        raise UserError(
            f"{command}: give RUN …, or an option that selects runs, such as --sweep NAME or --failed"
        )
    if options.runs:
        # All names are looked up before the first run is changed: one misspelt name stops the whole command.
        return [store.find(name) for name in options.runs], False
    found = [store.run(row["run"]) for row in selected_rows(store, RecordCache(store), options)]
    runs = [run for run in found if run.is_mine]
    if len(found) > len(runs):
        others = sorted({run.owner for run in found if not run.is_mine})
        print(f"left out: {len(found) - len(runs)} that belong to {', '.join(others)}", file=sys.stderr)
    if not found:
        raise UserError(f"{command}: no run in {store.folder} matches: python -m hpc_imagenet jobs lists all")
    return runs, True


def find_sweep(known: Iterable[object], name: str | None) -> str | None:
    """Return the sweep that `--sweep` selects by its name, or the beginning of it; None without the option.

    Args:
        known: the sweeps of all runs; one of several runs occurs several times.
        name: value of the option.

    Raises:
        UserError: no such sweep, or several.
    """
    if not name:
        return None
    sweeps = list(dict.fromkeys(map(str, known)))
    found = [sweep for sweep in sweeps if sweep == name] or [s for s in sweeps if s.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"--sweep {name} matches {' and '.join(found)}: type more of the name")
    raise UserError(f"--sweep {name}: no such sweep{did_you_mean(name, sweeps)}")


def _time_filter(text: str) -> Callable[[dict[str, Any]], bool]:
    """Return whether a row was active at or after a time; one whose times are unknown counts as such.

    Raises:
        UserError: `text` is neither a duration nor a time.
    """
    from hpc_imagenet.report.durations import parse_span

    span = parse_span(text)
    try:
        # Without a zone it is local time.
        begin = time.time() - span if span is not None else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise UserError(
            f"--since {text} is not a time: write 30m, 12h, 2d, 1w, or a date such as 2026-01-31"
        ) from None

    def matches(row: dict[str, Any]) -> bool:
        changed = instant(row["changed"])
        return row["state"] in (QUEUED, RUNNING) or changed is None or changed.timestamp() >= begin

    return matches
