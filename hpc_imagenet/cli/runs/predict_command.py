"""The predict command: classify images with a trained network, on this machine's CPUs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hpc_imagenet.cli.command import Command, add_json
from hpc_imagenet.cli.runs.export_command import CHECKPOINT, add_source, find_source
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import escape_name
from hpc_imagenet.runs.checkpoints import find_checkpoint
from hpc_imagenet.runs.store import RunStore


def _predict(store: RunStore, options: argparse.Namespace) -> int:
    if options.top < 1:
        raise UserError(f"--top {options.top}: type 1 or more")
    checkpoint = find_checkpoint(find_source(store, options.run), options.set.get("checkpoint"))

    from hpc_imagenet.training.torch_import import torch_import

    with torch_import():
        from hpc_imagenet.training.predictor import find_image_files, predict_images, prediction_row
        from hpc_imagenet.training.trained import load_trained

    rows, failed, paths = [], False, find_image_files(options.images)
    for prediction in predict_images(load_trained(checkpoint), paths, options.top):
        failed = failed or bool(prediction.problem)
        rows.append(prediction_row(prediction))
        if not options.json:
            print(_line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows, indent=2))
    return 1 if failed else 0


def _line(row: dict[str, Any]) -> str:
    """Return the classes of an image as one line that a terminal shows as written."""
    classes = ", ".join(f"{entry['name']} {entry['probability']:.1%}" for entry in row["classes"])
    return escape_name(f"{row['image']}  {classes or 'unreadable: ' + row['problem']}")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes per image (5)")
    add_json(parser)


COMMANDS = {
    "predict": Command(
        "Classify images with a trained network, on CPUs; exit code 1 if an image is unreadable.",
        _predict,
        _add_arguments,
        settings=("checkpoint",),
        needs_runs=False,
        epilog=CHECKPOINT,
    )
}
