"""The show command: everything about one run."""

from __future__ import annotations

import argparse

from hpc_imagenet.cli.command import RUN_NAMES, Command, add_json, add_run
from hpc_imagenet.runs.store import RunStore


def _show(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report import jobs_table
    from hpc_imagenet.report.json_text import json_text
    from hpc_imagenet.report.show import details, run_differences

    run = store.find(options.run)
    if options.diff:
        found = run_differences.compare_runs(run, store.find(options.diff))
    else:
        found = details.run_details(run)
    if options.json:
        print(json_text(found))
    elif options.diff:
        jobs_table.terminal().print(run_differences.render_comparison(found))
    else:
        jobs_table.terminal().print(details.render_details(found))
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--diff", metavar="OTHER", help="compare with another run: settings that differ, code, results"
    )
    add_json(parser)


COMMANDS = {
    "show": Command(
        "Print a run's state, settings, result, checkpoints with their sizes, and files.",
        _show,
        _add_arguments,
        epilog=RUN_NAMES,
    )
}
