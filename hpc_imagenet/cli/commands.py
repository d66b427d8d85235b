"""Commands of the command line, such as jobs, logs and cancel: their arguments and what they do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import Run, RunStore

if TYPE_CHECKING:
    from rich.table import Table

COMMANDS = (
    "jobs",
    "logs",
    "cancel",
    "retry",
    "connect",
    "pause",
    "resume",
    "report",
    "verify",
    "datastores",
    "doctor",
)


def run_command_line(command: str, arguments: Sequence[str]) -> int:
    """Run one of `COMMANDS` and return its exit code.

    Raises:
        UserError: invalid arguments, or the command failed.
    """
    if command == "doctor":
        return _doctor(arguments)
    workspaces = [argument for argument in arguments if argument.startswith("workspace=")]
    urls = [
        argument
        for argument in arguments
        if command == "datastores" and argument.startswith("datastore.url=")
    ]
    options = _parser(command).parse_args([a for a in arguments if a not in workspaces + urls])
    default = os.environ.get("HPC_IMAGENET_WORKSPACE", "workspace")
    workspace = workspaces[-1].partition("=")[2] if workspaces else default
    if not workspace:
        raise UserError("workspace is empty: set a folder, such as . for the current one")
    store = RunStore(Path(workspace).expanduser().absolute())
    if not store.folder.is_dir() and command not in ("jobs", "report", "verify", "datastores"):
        raise UserError(f"no runs in {store.folder.parent}: set workspace=FOLDER to the folder of the runs")
    if command == "datastores":
        from hpc_imagenet.cli import datastores

        return datastores.run_datastores(store, urls[-1].partition("=")[2] if urls else None, options)
    handler = {
        "jobs": _jobs,
        "logs": _logs,
        "cancel": _cancel,
        "retry": _retry,
        "connect": _connect,
        "pause": _pause,
        "resume": _resume,
        "report": _report,
        "verify": _verify,
    }[command]
    return handler(store, options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.split()[-1]}: {message}")


def _parser(command: str) -> argparse.ArgumentParser:
    description = {
        "jobs": "List all runs with their state and progress.",
        "logs": "Print the output of a run's newest attempt.",
        "cancel": "Stop queued or running runs; retry continues them.",
        "retry": "Continue failed or cancelled runs from where they stopped.",
        "connect": "Wait until a session runs and print how to connect to it.",
        "pause": "Stop sessions and keep their folders; resume restarts them.",
        "resume": "Restart a session in its folder, optionally with other settings.",
        "report": "Print the leaderboard of all trainings.",
        "verify": "Verify datasets and datastores against their certificates; exit code 1 if one is damaged.",
        "datastores": "List, verify, fetch and delete the datasets that jobs can train on.",
        "doctor": "Check the cluster's setup: query Slurm and submit a short probe job to its nodes.",
    }[command]
    parser = _Parser(
        prog=f"python -m hpc_imagenet {command}",
        description=description,
        epilog="workspace=FOLDER selects another workspace. RUN: a run's id or label, or a prefix of one.",
    )
    if command in ("jobs", "report"):
        parser.add_argument("--json", action="store_true", help="print JSON objects instead of a table")
    elif command == "verify":
        parser.epilog = "workspace=FOLDER selects another workspace. Without a NAME: everything in it."
        parser.add_argument("names", metavar="NAME", nargs="*", help="dataset, datastore, NAME@vN or folder")
        parser.add_argument(
            "--quick", action="store_true", help="check sizes, counts and a sample; read no image"
        )
        parser.add_argument(
            "--weights",
            metavar="MODEL[:WEIGHTS][=FILE]",
            help="evaluate torchvision's weights of a model, from its cache or FILE, on val",
        )
    elif command == "datastores":
        from hpc_imagenet.cli import datastores

        datastores.add_arguments(parser)
    elif command == "doctor":
        parser.epilog = "Settings as for a submission, such as cluster=mine workspace=FOLDER."
        parser.add_argument("settings", metavar="SETTING=VALUE", nargs="*")
        parser.add_argument("-cd", "--config-dir", metavar="FOLDER", help="your own conf/ in addition")
        parser.add_argument(
            "--timeout", type=float, default=300, metavar="S", help="s to wait for a queued probe job (300)"
        )
        parser.add_argument("--json", action="store_true", help="print JSON objects instead of lines")
    elif command == "connect":
        parser.add_argument("run", metavar="RUN", help="or the session.name of a session")
    elif command == "resume":
        parser.add_argument("run", metavar="RUN")
        parser.add_argument("settings", metavar="SETTING=VALUE", nargs="*", help="such as session.gpus=4")
    elif command == "logs":
        parser.add_argument("run", metavar="RUN")
        parser.add_argument("-f", "--follow", action="store_true", help="follow until the run has ended")
    else:
        parser.add_argument("runs", metavar="RUN", nargs="+")
    return parser


def _doctor(arguments: Sequence[str]) -> int:
    options = _parser("doctor").parse_intermixed_args(list(arguments))
    if unknown := [item for item in options.settings if "=" not in item and not item.startswith("~")]:
        raise UserError(f"doctor: {unknown[0]} is not an option or SETTING=VALUE; see doctor --help")
    from hpc_imagenet.doctor.run import run_doctor

    return run_doctor(options.settings, options.config_dir, options.timeout, options.json)


def _jobs(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report import jobs_table

    if_empty = f"no runs in {store.folder}"
    return _print_rows(jobs_table.job_rows(store.all()), jobs_table.render_jobs, if_empty, options)


def _report(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report import leaderboard

    if_empty = f"no trainings in {store.folder}"
    return _print_rows(
        leaderboard.leaderboard_rows(store.all()), leaderboard.render_leaderboard, if_empty, options
    )


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


def _cancel(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.submission import cancel_run

    for run in _find_all(store, options.runs):
        previous = cancel_run(run)
        print(f"{'cancelled' if previous.active else f'already {previous.name}'}  {run.id}")
    return 0


def _retry(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.submission import retry_run

    for run in _find_all(store, options.runs):
        for entry in retry_run(store, run):
            print(f"{ACTION_LABELS[entry.action]}  {entry.run.id}")
    return 0


def _connect(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.cli.connect import connect

    return connect(_find(store, options.run))


def _pause(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.submission import cancel_run

    for run in [_check_session(_find(store, name)) for name in options.runs]:
        previous = cancel_run(run, "paused: resume restarts it")
        print(f"{'paused' if previous.active else f'already {previous.name}'}  {run.id}")
    return 0


def _resume(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.cli.submit import prepare
    from hpc_imagenet.config.compose import with_overrides
    from hpc_imagenet.launch.states import state

    run = _check_session(_find(store, options.run))
    run.check_format()
    wait = [setting for setting in options.settings if setting in ("wait=true", "wait=false")]
    settings = [setting for setting in options.settings if setting not in wait]
    if state(run).active and settings:
        raise UserError(f"{run.id} is running: pause it first, then resume it with {' '.join(settings)}")
    frozen = run.config()
    prepared = prepare([with_overrides(frozen, [f"workspace={store.folder.parent}", *settings])])
    if prepared.jobs[0].run_id != run.id:
        raise UserError(
            f"session.name={prepared.first.session.name} is another session: start it with +stage=session"
        )
    if not prepared.in_background:
        raise UserError(f"{run.id} ran with cluster={prepared.executor}: repeat the command that started it")
    for entry in prepared.submit():
        print(f"{ACTION_LABELS[entry.action]}  {entry.run.id}")
    if "wait=true" in wait:
        from hpc_imagenet.cli.connect import connect

        return connect(run)
    return 0


def _find(store: RunStore, name: str) -> Run:
    """Return the session of that session.name, or the run of that id or label."""
    label = f"session-{name}"
    return store.find(label if any(run.info.get("label") == label for run in store.all()) else name)


def _check_session(run: Run) -> Run:
    if run.info.get("stage") != "session":
        raise UserError(f"{run.id} is not a session: use cancel to stop it and retry to continue it")
    return run


def _verify(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.data.prepare import verify

    workspace, cpus = store.folder.parent, len(os.sched_getaffinity(0))
    folders = [folder for name in options.names for folder in verify.find_folders(workspace, name)]
    folders = folders or verify.all_folders(workspace)
    if not folders:
        raise UserError(f"nothing to verify in {workspace}: set workspace=FOLDER, or add a folder's path")
    intact = True
    for folder in folders:
        print(folder, flush=True)
        report = verify.verify_dataset(
            folder, quick=options.quick, workers=cpus, log=lambda line: print(f"  {line}", flush=True)
        )
        for line in report.problems:
            print(f"  wrong: {line}", flush=True)
        intact = intact and not report.problems
        read = f"{report.bytes / 1e9:.3f} GB read" if report.bytes else "no image read (--quick)"
        count = len(report.problems)
        summary = f"{count} problem{'s' if count > 1 else ''}" if count else "intact"
        print(f"  {summary}: {report.images:,} images, {report.files} files, {read}")
        if options.weights and not report.problems:
            print(f"  {_evaluate(folder, options.weights, cpus)}", flush=True)
    return 0 if intact else 1


def _evaluate(folder: Path, weights: str, workers: int) -> str:
    from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
    from hpc_imagenet.training.evaluate import evaluate

    score = evaluate(DatasetReader(folder), weights, workers)
    accuracy = f"top-1 {score.top1:.2%}, top-5 {score.top5:.2%} of {score.images:,} images of val"
    published = (
        f" (published: {score.published[0]:.2%} and {score.published[1]:.2%})" if score.published else ""
    )
    return f"{score.weights}: {accuracy}{published}"


def _find_all(store: RunStore, names: Sequence[str]) -> list[Run]:
    # All names are looked up before the first run is changed: one misspelt name stops the whole command.
    return [store.find(name) for name in names]


ACTION_LABELS = {"submitted": "submitted", "finished": "already finished", "active": "already running"}


def print_error(error: UserError) -> int:
    """Print a user error in one line and return its exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2
