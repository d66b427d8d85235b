"""Commands on runs: jobs, logs, cancel and retry."""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Iterator

from hpc_imagenet.cli.command import RUN_NAMES, Command, add_json, add_run, raise_all, say_left_out
from hpc_imagenet.cli.runs.run_selection import (
    add_runs_or_selection,
    add_selection,
    has_selection,
    named_or_selected,
    selected_rows,
)
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import error_line, one_line
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, QUEUED
from hpc_imagenet.runs.store import Run, RunStore


def _jobs(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report.jobs_table import print_jobs, terminal
    from hpc_imagenet.report.json_text import json_text
    from hpc_imagenet.runs.run_records import RecordCache

    if options.watch:
        from hpc_imagenet.report.jobs_screen import watch_jobs

        cache = RecordCache(store)
        watch_jobs(lambda began: selected_rows(store, cache, options, began))
        return 0
    with _without_garbage_collection():
        rows = selected_rows(store, RecordCache(store), options)
        if options.json:
            print(json_text(rows))
        elif rows:
            print_jobs(rows, terminal())
    if not rows and not options.json:
        print(f"no runs in {store.folder}" + (" match" if has_selection(options) else ""))
    say_left_out(store)
    return 0


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Search for no cycles of references: a fifth of the time of a table of thousands of rows."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _add_jobs_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    parser.add_argument("--watch", action="store_true", help="update the table until q is pressed")
    add_json(parser)


def _logs(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report import logs

    run = store.find(options.run)
    logs.show_logs(run, options.follow, options.rank, options.attempt, options.lines)
    return 0


def _add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--rank", type=int, metavar="N", help="only the output of this rank; else of all")
    parser.add_argument("--attempt", type=int, metavar="N", help="an earlier attempt; else the newest")
    parser.add_argument("-n", "--lines", type=int, help="only the last LINES lines of each log file")
    parser.add_argument("-f", "--follow", action="store_true", help="follow until the run has ended")


def _cancel(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.states import states
    from hpc_imagenet.launch.submission import cancel_run, end_jobs

    runs, by_options = named_or_selected(store, options, "cancel")
    state_of = states(runs)
    errors = []
    # Queued runs first: at the end of a running one the local queue would start the next.
    runs = sorted(runs, key=lambda run: state_of[run.id].name != QUEUED)
    ended = end_jobs(runs, state_of)
    for run in runs:
        status = state_of[run.id]
        try:
            cancel_run(run, status=status, job_has_ended=run.id in ended)
        except UserError as error:  # the others are cancelled all the same
            errors.append(error)
        else:
            if not status.ended or not by_options:
                print(f"{f'already {status.name}' if status.ended else 'cancelled'}  {one_line(run.id)}")
    if by_options and all(status.ended for status in state_of.values()):
        print("no run of yours that matches is queued or running")
    raise_all(errors)
    return 0


def _retry(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.executor import JobsRefused
    from hpc_imagenet.launch.executors import start_queued
    from hpc_imagenet.launch.retries.longer import refuse_longer
    from hpc_imagenet.launch.retries.retry_plan import plan_retry, send_retry
    from hpc_imagenet.launch.slurm_jobs.waiting import describe_waiting
    from hpc_imagenet.launch.states import states

    settings = [word for word in options.runs if "=" in word]
    options.runs = [word for word in options.runs if "=" not in word]
    runs, by_options = named_or_selected(store, options, "retry")
    queued: list[Run] = []  # of a selection; if their worker was killed, nothing else would start them
    if longer := [line for line in settings if line.startswith("recipe.epochs=") and runs]:
        refuse_longer(runs[0], longer[0])
    if by_options:
        state_of = states(runs)
        again = {key for key, each in state_of.items() if each.waiting or each.name in (FAILED, CANCELLED)}
        queued = [run for run in runs if state_of[run.id].name == QUEUED and run.id not in again]
        runs = [run for run in runs if run.id in again]
        if not runs:
            print("no run that matches has failed, was cancelled, or waits to be submitted")
    # One that cannot be continued must not keep the others of a selection from it.
    plan = plan_retry(store, runs, settings, options.again, leave_out=by_options)
    for error in plan.refused:
        print(f"left out  {error_line(error)}", file=sys.stderr)
    for planned in plan.planned:
        print(f"{one_line(planned.run.id)}  {one_line(planned)}")
    if options.dry_run:
        print("nothing was submitted (--dry-run)")
        return 0
    errors: list[UserError] = []
    try:
        entries = send_retry(store, plan)
    except JobsRefused as refused:
        entries, errors = refused.entries, refused.errors
    start_queued(store, queued)
    for entry in entries:
        print(f"{entry.label}  {one_line(entry.run.id)}")
    command = f"--sweep {options.sweep}" if options.sweep else ""
    if line := describe_waiting(entries, command):
        print(line)
    raise_all(errors)
    return 0


def _add_retry_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN|SETTING=VALUE", nargs="*")
    add_selection(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would change, and submit nothing")
    parser.add_argument(
        "--again",
        action="store_true",
        help="submit unchanged, also what would fail, or failed twice, the same way",
    )


COMMANDS = {
    "jobs": Command(
        "List all runs with their state and progress.", _jobs, _add_jobs_arguments, needs_runs=False
    ),
    "logs": Command(
        "Print the output of a run: stdout, then stderr, of its newest attempt.",
        _logs,
        _add_logs_arguments,
        epilog=RUN_NAMES,
    ),
    "cancel": Command(
        "Stop queued or running runs; retry continues them.", _cancel, add_runs_or_selection, epilog=RUN_NAMES
    ),
    "retry": Command(
        "Continue failed or cancelled runs from where they stopped, each with the remedy of its failure.",
        _retry,
        _add_retry_arguments,
        epilog=f"{RUN_NAMES} SETTING=VALUE: a setting outside the signature, such as cluster.time=600.",
    ),
}
