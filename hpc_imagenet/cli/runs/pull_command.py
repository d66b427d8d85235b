"""The command pull: bring runs from cluster.host to this machine."""

from __future__ import annotations

import argparse
import json
import os

from hpc_imagenet.cli.command import RUN_NAMES, Command, add_json, add_runs
from hpc_imagenet.config.host import find_host
from hpc_imagenet.config.input.stored_settings import SENT
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.runs.store import RunStore


def _pull(store: RunStore, options: argparse.Namespace) -> int:
    if SENT in os.environ:  # on the host
        if not store.folder.is_dir():
            raise UserError(
                f"no runs in {store.folder.parent}: set workspace=FOLDER to the folder of the runs"
            )
        runs = [store.find(name) for name in options.runs]
        print(json.dumps([{"run": run.id, "folder": str(run.folder)} for run in runs]))
        return 0
    settings = [f"{key}={value}" for key, value in options.set.items()]
    host = find_host([*settings, *([f"--config-dir={options.config_dir}"] if options.config_dir else [])])
    if host is None:
        raise UserError(
            "pull brings runs from cluster.host, which is not set: add cluster.host=user@login.centre.org, "
            "or cluster=NAME of a file that sets host"
        )
    from hpc_imagenet.remote.pull import pull_runs

    words = [*options.runs, *(word for word in settings if word.startswith("workspace="))]
    return pull_runs(host, words, expand_home(options.to), not options.results, options.json)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument(
        "--to", metavar="FOLDER", default="pulled", help="a workspace on this machine (pulled)"
    )
    parser.add_argument("--results", action="store_true", help="without checkpoints")
    parser.add_argument("-cd", "--config-dir", metavar="FOLDER", help="your own conf/ in addition")
    add_json(parser)


COMMANDS = {
    "pull": Command(
        "Bring results and checkpoints of runs from cluster.host to this machine.",
        _pull,
        _add_arguments,
        settings=("cluster", "cluster.host", "cluster.host_folder", "cluster.host_python"),
        needs_runs=False,
        epilog=RUN_NAMES,
    )
}
