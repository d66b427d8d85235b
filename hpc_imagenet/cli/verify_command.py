"""The verify command: find missing or changed data, and evaluate published weights on it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hpc_imagenet.cli.command import Command
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import RunStore


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


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="dataset, datastore, NAME@vN or folder")
    parser.add_argument(
        "--quick", action="store_true", help="check sizes, counts and a sample; read no image"
    )
    parser.add_argument(
        "--weights",
        metavar="MODEL[:WEIGHTS][=FILE]",
        help="evaluate torchvision's weights of a model, from its cache or FILE, on val",
    )


COMMANDS = {
    "verify": Command(
        "Verify datasets and datastores against their certificates; exit code 1 if one is damaged.",
        _verify,
        _add_arguments,
        needs_runs=False,
        epilog="Without a NAME: everything in it.",
    )
}
