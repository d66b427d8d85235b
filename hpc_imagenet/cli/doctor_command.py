"""The doctor command: check the setup of a cluster."""

from __future__ import annotations

import argparse
import sys

from hpc_imagenet.cli.command import Command
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import RunStore


def _doctor(store: RunStore, options: argparse.Namespace) -> int:
    if unknown := [item for item in options.settings if "=" not in item and not item.startswith("~")]:
        raise UserError(f"doctor: {unknown[0]} is not an option or SETTING=VALUE; see doctor --help")
    from hpc_imagenet.doctor.run import run_checks, run_doctor

    try:
        if options.write is None:
            return run_doctor(options.settings, options.config_dir, options.timeout, options.json)
        from hpc_imagenet.doctor.cluster_file import write_cluster_file

        return write_cluster_file(
            options.write,
            options.settings,
            lambda settings, folder: run_checks(settings, folder, options.timeout, options.json),
            options.json,
        )
    except KeyboardInterrupt:
        print("\ninterrupted: the probe was cancelled", file=sys.stderr)
        return 130


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", metavar="SETTING=VALUE", nargs="*")
    parser.add_argument("-cd", "--config-dir", metavar="FOLDER", help="your own conf/ in addition")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="s to wait for a queued probe job (300)"
    )
    parser.add_argument(
        "--write",
        metavar="NAME",
        help="propose a cluster file from Slurm's answers, check it, and make it your default",
    )
    parser.add_argument("--json", action="store_true", help="print JSON objects instead of lines")


COMMANDS = {
    "doctor": Command(
        "Check the cluster's setup: query Slurm and submit a short probe job to its nodes.",
        _doctor,
        _add_arguments,
        needs_runs=False,
        composes=True,
        epilog="Settings as for a submission, such as cluster=mine workspace=FOLDER.",
    )
}
