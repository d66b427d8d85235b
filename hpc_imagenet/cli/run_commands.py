"""Commands on runs: jobs, logs, cancel, retry and report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hpc_imagenet.cli.command import RUN_NAMES, Command, add_json, add_run, add_runs
from hpc_imagenet.runs.store import Run, RunStore

if TYPE_CHECKING:
    from rich.table import Table


def _jobs(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report import jobs_table

    rows = jobs_table.job_rows(store.all())
    return _print_rows(rows, jobs_table.render_jobs, f"no runs in {store.folder}", options)


def _report(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report import leaderboard

    rows = leaderboard.leaderboard_rows(store.all())
    return _print_rows(rows, leaderboard.render_leaderboard, f"no trainings in {store.folder}", options)


def _print_rows(
    rows: list[dict[str, Any]],
    render: Callable[[list[dict[str, Any]]], Table],
    if_empty: str,
    options: argparse.Namespace,
) -> int:
    from hpc_imagenet.report.jobs_table import terminal

    if options.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(if_empty)
    else:
        terminal().print(render(rows))
    return 0


def _logs(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report import logs

    logs.show_logs(store.find(options.run), options.follow)
    return 0


def _add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="follow until the run has ended")


def _cancel(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.submission import cancel_run

    for run in _find_all(store, options.runs):
        previous = cancel_run(run)
        print(f"{'cancelled' if previous.active else f'already {previous.name}'}  {run.id}")
    return 0


def _retry(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.longer import refuse_settings
    from hpc_imagenet.launch.submission import retry_run

    settings = [word for word in options.runs if "=" in word]
    options.runs = [word for word in options.runs if word not in settings]
    if settings:
        refuse_settings(_find_all(store, options.runs), settings)
    for run in _find_all(store, options.runs):
        for entry in retry_run(store, run):
            print(f"{entry.label}  {entry.run.id}")
    return 0


def _find_all(store: RunStore, names: Sequence[str]) -> list[Run]:
    # All names are looked up before the first run is changed: one misspelt name stops the whole command.
    return [store.find(name) for name in names]


COMMANDS = {
    "jobs": Command("List all runs with their state and progress.", _jobs, add_json, needs_runs=False),
    "logs": Command(
        "Print the output of a run's newest attempt.", _logs, _add_logs_arguments, epilog=RUN_NAMES
    ),
    "cancel": Command(
        "Stop queued or running runs; retry continues them.", _cancel, add_runs, epilog=RUN_NAMES
    ),
    "retry": Command(
        "Continue failed or cancelled runs from where they stopped.", _retry, add_runs, epilog=RUN_NAMES
    ),
    "report": Command(
        "Print the leaderboard of all trainings and evaluations.", _report, add_json, needs_runs=False
    ),
}
