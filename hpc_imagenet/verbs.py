"""The verbs: jobs, logs, cancel, retry, report. They read the record; cancel and retry act on it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hpc_imagenet.errors import UserError
from hpc_imagenet.runs import Record, Run

if TYPE_CHECKING:
    from rich.table import Table

VERBS = ("jobs", "logs", "cancel", "retry", "report")


def main(verb: str, arguments: Sequence[str]) -> int:
    """Carry a verb out and return the exit code."""
    settings = [word for word in arguments if word.startswith("workspace=")]
    options = _parser(verb).parse_args([word for word in arguments if word not in settings])
    default = os.environ.get("HPC_IMAGENET_WORKSPACE", "workspace")
    record = Record(Path(settings[-1].partition("=")[2] if settings else default).expanduser().absolute())
    if not record.folder.is_dir() and verb not in ("jobs", "report"):
        raise UserError(f"no runs in {record.folder.parent}: say which workspace=FOLDER holds them")
    act = {"jobs": _jobs, "logs": _logs, "cancel": _cancel, "retry": _retry, "report": _report}[verb]
    return act(record, options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.split()[-1]}: {message}")


def _parser(verb: str) -> argparse.ArgumentParser:
    about = {
        "jobs": "Show every run: what it does, its state, how far it is.",
        "logs": "Print what a run's newest attempt has printed.",
        "cancel": "Stop runs, queued or running; retry takes them up again.",
        "retry": "Take up runs that failed or were cancelled, from where they stopped.",
        "report": "Show the leaderboard of all trainings.",
    }[verb]
    parser = _Parser(
        prog=f"python -m hpc_imagenet {verb}",
        description=about,
        epilog="workspace=FOLDER names another workspace. RUN is a run's id or its beginning.",
    )
    if verb in ("jobs", "report"):
        parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    elif verb == "logs":
        parser.add_argument("run", metavar="RUN")
        parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    else:
        parser.add_argument("runs", metavar="RUN", nargs="+")
    return parser


def _jobs(record: Record, options: argparse.Namespace) -> int:
    from hpc_imagenet.monitor import table

    return _show(table.rows(record.all()), table.render, f"no runs in {record.folder}", options)


def _report(record: Record, options: argparse.Namespace) -> int:
    from hpc_imagenet.monitor import leaderboard

    nothing = f"no trainings in {record.folder}"
    return _show(leaderboard.board(record.all()), leaderboard.render, nothing, options)


def _show(
    rows: list[dict[str, Any]],
    render: Callable[[list[dict[str, Any]]], Table],
    nothing: str,
    options: argparse.Namespace,
) -> int:
    from hpc_imagenet.monitor.table import terminal

    if options.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(nothing)
    else:
        terminal().print(render(rows))
    return 0


def _logs(record: Record, options: argparse.Namespace) -> int:
    from hpc_imagenet.monitor import logs

    logs.show(record.find(options.run), options.follow)
    return 0


def _cancel(record: Record, options: argparse.Namespace) -> int:
    from hpc_imagenet.submit import cancel

    for run in _named(record, options.runs):
        was = cancel(run)
        print(f"{'cancelled' if was.active else f'was {was.name} already'}  {run.id}")
    return 0


def _retry(record: Record, options: argparse.Namespace) -> int:
    from hpc_imagenet.submit import retry

    for run in _named(record, options.runs):
        for entry in retry(record, run):
            print(f"{WORDS[entry.what]}  {entry.run.id}")
    return 0


def _named(record: Record, names: Sequence[str]) -> list[Run]:
    # All names are looked up first: a misspelt third one must not leave two cancelled.
    return [record.find(name) for name in names]


WORDS = {"submitted": "submitted", "finished": "finished before", "active": "under way already"}


def fail(error: UserError) -> int:
    """Print a user's error in one line and return the exit code for it."""
    print(f"error: {error}", file=sys.stderr)
    return 2
