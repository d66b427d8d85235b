"""The verbs: they read the record; cancel and retry act on it. The doctor looks at the cluster instead."""

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


def run_command_line(verb: str, arguments: Sequence[str]) -> int:
    """Carry a verb out and return the exit code."""
    if verb == "doctor":
        return _doctor(arguments)
    settings = [word for word in arguments if word.startswith("workspace=")]
    places = [word for word in arguments if verb == "datastores" and word.startswith("datastore.url=")]
    options = _parser(verb).parse_args([word for word in arguments if word not in settings + places])
    default = os.environ.get("HPC_IMAGENET_WORKSPACE", "workspace")
    place = settings[-1].partition("=")[2] if settings else default
    if not place:
        raise UserError("workspace is empty: give a folder; . is the one you are in")
    store = RunStore(Path(place).expanduser().absolute())
    if not store.folder.is_dir() and verb not in ("jobs", "report", "verify", "datastores"):
        raise UserError(f"no runs in {store.folder.parent}: say which workspace=FOLDER holds them")
    if verb == "datastores":
        from hpc_imagenet.cli import datastores

        return datastores.run_datastores(store, places[-1].partition("=")[2] if places else None, options)
    act = {
        "jobs": _jobs,
        "logs": _logs,
        "cancel": _cancel,
        "retry": _retry,
        "connect": _connect,
        "pause": _pause,
        "resume": _resume,
        "report": _report,
        "verify": _verify,
    }[verb]
    return act(store, options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.split()[-1]}: {message}")


def _parser(verb: str) -> argparse.ArgumentParser:
    about = {
        "jobs": "Show every run: what it does, its state, how far it is.",
        "logs": "Print what a run's newest attempt has printed.",
        "cancel": "Stop runs, queued or running; retry takes them up again.",
        "retry": "Take up runs that failed or were cancelled, from where they stopped.",
        "connect": "Print how to reach a session, as soon as it runs.",
        "pause": "End sessions; their folders stay, and resume goes on with them.",
        "resume": "Start a session again in its folder, of another size if settings say so.",
        "report": "Show the leaderboard of all trainings.",
        "verify": "Hold datasets and datastores against their certificates; exit code 1 where one is wrong.",
        "datastores": "Show datasets that jobs can train on, verify, fetch, delete them.",
        "doctor": "Say whether the cluster is set up: ask Slurm, and send a short probe to its nodes.",
    }[verb]
    parser = _Parser(
        prog=f"python -m hpc_imagenet {verb}",
        description=about,
        epilog="workspace=FOLDER names another workspace. RUN: a run's id or label, or either's beginning.",
    )
    if verb in ("jobs", "report"):
        parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    elif verb == "verify":
        parser.epilog = "workspace=FOLDER names another workspace. Without a NAME: all that is in it."
        parser.add_argument("names", metavar="NAME", nargs="*", help="dataset, datastore, NAME@vN or folder")
        parser.add_argument("--quick", action="store_true", help="sizes, counts, a sample; no image is read")
        parser.add_argument(
            "--weights",
            metavar="MODEL[:WEIGHTS][=FILE]",
            help="score torchvision's weights of a model, as they lie in its cache or in FILE, on val",
        )
    elif verb == "datastores":
        from hpc_imagenet.cli import datastores

        datastores.add_arguments(parser)
    elif verb == "doctor":
        parser.epilog = "The settings are those of a submission, such as cluster=mine workspace=FOLDER."
        parser.add_argument("settings", metavar="SETTING=VALUE", nargs="*")
        parser.add_argument("-cd", "--config-dir", metavar="FOLDER", help="your own conf/ beside ours")
        parser.add_argument(
            "--timeout", type=float, default=300, metavar="S", help="s that a probe may queue (300)"
        )
        parser.add_argument("--json", action="store_true", help="a list of objects instead of lines")
    elif verb == "connect":
        parser.add_argument("run", metavar="RUN", help="also the session.name of a session")
    elif verb == "resume":
        parser.add_argument("run", metavar="RUN")
        parser.add_argument("settings", metavar="SETTING=VALUE", nargs="*", help="such as session.gpus=4")
    elif verb == "logs":
        parser.add_argument("run", metavar="RUN")
        parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    else:
        parser.add_argument("runs", metavar="RUN", nargs="+")
    return parser


def _doctor(arguments: Sequence[str]) -> int:
    options = _parser("doctor").parse_intermixed_args(list(arguments))
    if strange := [word for word in options.settings if "=" not in word and not word.startswith("~")]:
        raise UserError(f"doctor: {strange[0]} is no option and no SETTING=VALUE; see doctor --help")
    from hpc_imagenet.doctor.run import run_doctor

    return run_doctor(options.settings, options.config_dir, options.timeout, options.json)


def _jobs(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report import jobs_table

    return _show(
        jobs_table.job_rows(store.all()), jobs_table.render_jobs, f"no runs in {store.folder}", options
    )


def _report(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report import leaderboard

    nothing = f"no trainings in {store.folder}"
    return _show(leaderboard.leaderboard_rows(store.all()), leaderboard.render_leaderboard, nothing, options)


def _show(
    rows: list[dict[str, Any]],
    render: Callable[[list[dict[str, Any]]], Table],
    nothing: str,
    options: argparse.Namespace,
) -> int:
    from hpc_imagenet.report.jobs_table import terminal

    if options.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(nothing)
    else:
        terminal().print(render(rows))
    return 0


def _logs(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report import logs

    logs.show_logs(store.find(options.run), options.follow)
    return 0


def _cancel(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.submission import cancel_run

    for run in _named(store, options.runs):
        was = cancel_run(run)
        print(f"{'cancelled' if was.active else f'was {was.name} already'}  {run.id}")
    return 0


def _retry(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.submission import retry_run

    for run in _named(store, options.runs):
        for entry in retry_run(store, run):
            print(f"{ACTION_LABELS[entry.action]}  {entry.run.id}")
    return 0


def _connect(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.session.connect import connect

    return connect(_find(store, options.run))


def _pause(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.submission import cancel_run

    for run in [_session(_find(store, name)) for name in options.runs]:
        was = cancel_run(run, "paused: resume goes on")
        print(f"{'paused' if was.active else f'was {was.name} already'}  {run.id}")
    return 0


def _resume(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.cli.submit import prepare
    from hpc_imagenet.config.compose import with_overrides
    from hpc_imagenet.launch.states import state

    run = _session(_find(store, options.run))
    wait = [word for word in options.settings if word in ("wait=true", "wait=false")]
    settings = [word for word in options.settings if word not in wait]
    if state(run).active and settings:
        raise UserError(f"{run.id} is under way: pause it first, then resume it with {' '.join(settings)}")
    frozen = run.config()
    again = prepare([with_overrides(frozen, [f"workspace={store.folder.parent}", *settings])])
    if again.jobs[0].run_id != run.id:
        raise UserError(
            f"session.name={again.first.session.name} is another session: +stage=session begins it"
        )
    if again.executor == "foreground":
        raise UserError(f"{run.id} was run by cluster=foreground: give that command again, and it goes on")
    for entry in again.submit():
        print(f"{ACTION_LABELS[entry.action]}  {entry.run.id}")
    if "wait=true" in wait:
        from hpc_imagenet.session.connect import connect

        return connect(run)
    return 0


def _find(store: RunStore, name: str) -> Run:
    """Return the run that is called so, or the session of that session.name."""
    label = f"session-{name}"
    return store.find(label if any(run.info.get("label") == label for run in store.all()) else name)


def _session(run: Run) -> Run:
    if run.info.get("stage") != "session":
        raise UserError(f"{run.id} is no session: cancel stops it, and retry goes on with it")
    return run


def _verify(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.data.prepare import verify

    workspace, cpus = store.folder.parent, len(os.sched_getaffinity(0))
    named = [folder for name in options.names for folder in verify.find_folders(workspace, name)]
    folders = named or verify.all_folders(workspace)
    if not folders:
        raise UserError(f"nothing to verify in {workspace}: say which workspace=FOLDER, or name a folder")
    good = True
    for folder in folders:
        print(folder, flush=True)
        report = verify.verify_dataset(
            folder, quick=options.quick, workers=cpus, say=lambda line: print(f"  {line}", flush=True)
        )
        for line in report.wrong:
            print(f"  wrong: {line}", flush=True)
        good = good and not report.wrong
        read = f"{report.bytes / 1e9:.3f} GB read" if report.bytes else "no image read (--quick)"
        state = f"wrong in {len(report.wrong)} places" if report.wrong else "whole"
        print(f"  {state}: {report.images:,} images, {report.files} files, {read}")
        if options.weights and not report.wrong:
            print(f"  {_scored(folder, options.weights, cpus)}", flush=True)
    return 0 if good else 1


def _scored(folder: Path, weights: str, workers: int) -> str:
    from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
    from hpc_imagenet.training.evaluate import evaluate

    of = evaluate(DatasetReader(folder), weights, workers)
    stated = f" (published: {of.published[0]:.2%} and {of.published[1]:.2%})" if of.published else ""
    return f"{of.weights}: top-1 {of.top1:.2%}, top-5 {of.top5:.2%} of {of.images:,} images of val{stated}"


def _named(store: RunStore, names: Sequence[str]) -> list[Run]:
    # All names are looked up first: a misspelt third one must not leave two cancelled.
    return [store.find(name) for name in names]


ACTION_LABELS = {"submitted": "submitted", "finished": "already finished", "active": "already running"}


def print_error(error: UserError) -> int:
    """Print a user's error in one line and return the exit code for it."""
    print(f"error: {error}", file=sys.stderr)
    return 2
