"""A command of the command line: its arguments and what it does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import error_line
from hpc_imagenet.runs.store import RunStore


@dataclass(frozen=True)
class Command:
    """One command, such as `jobs`; its module is listed in `commands.COMMANDS`.

    Attributes:
        description: one sentence for --help.
        run: does the work and returns the exit code. It is given the runs of the workspace and the parsed
            arguments; `options.set` holds the values of `settings` by name.
        add_arguments: adds the arguments to the parser.
        settings: the settings, such as datastore.url, that are accepted as SETTING=VALUE beside workspace=.
        needs_runs: whether a workspace without runs is an error.
        composes: whether all SETTING=VALUE, workspace= among them, are left to `add_arguments`.
        epilog: more about the arguments, for --help.
    """

    description: str
    run: Callable[[RunStore, argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    settings: tuple[str, ...] = ()
    needs_runs: bool = True
    composes: bool = False
    epilog: str = ""


def say_left_out(store: RunStore) -> None:
    """Print one line to stderr about runs that a table leaves out, since this user may not read them."""
    if not store.left_out:
        return
    owners: dict[str, list[str]] = {}
    for run_id, owner in sorted(store.left_out.items()):
        owners.setdefault(owner, []).append(run_id)
    parts = [
        f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of {owner}" for owner, runs in owners.items()
    ]
    fix = f"their owner can run chmod -R g+rX {store.folder}/RUN"
    print(f"left out, since you may not read them: {', '.join(parts)} ({fix})", file=sys.stderr)


def raise_all(errors: Sequence[UserError]) -> None:
    """Raise the last of several errors, if there are any, after printing the others as it will be printed."""
    for error in errors[:-1]:
        print(f"error: {error_line(error)}", file=sys.stderr)
    if errors:
        raise errors[-1]


RUN_NAMES = "RUN: a run's id or label, or a prefix of one."


def add_run(parser: argparse.ArgumentParser, text: str | None = None) -> None:
    """Add the argument RUN."""
    parser.add_argument("run", metavar="RUN", help=text)


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the argument RUN, one or more."""
    parser.add_argument("runs", metavar="RUN", nargs="+")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option --json of commands that print a table."""
    parser.add_argument("--json", action="store_true", help="print JSON objects instead of a table")
