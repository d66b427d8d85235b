"""The export command: write a trained network to a folder that needs nothing of this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc_imagenet.cli.command import Command
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.runs.checkpoints import find_checkpoint
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.training.export.export_formats import DEFAULT, FORMATS, check_target, find_format

CHECKPOINT = "checkpoint=NAME selects best, last or epoch-N of a run (best, if there is one, else last)."


def _export(store: RunStore, options: argparse.Namespace) -> int:
    find_format(options.format)  # before torch is imported
    out = check_target(Path(options.out))
    checkpoint = find_checkpoint(find_source(store, options.run), options.set.get("checkpoint"))

    from hpc_imagenet.report.show.evaluations import evaluations
    from hpc_imagenet.training.torch_import import torch_import

    with torch_import():
        from hpc_imagenet.training.export.exporter import export_network
        from hpc_imagenet.training.trained import load_trained

    trained = load_trained(checkpoint)
    export_network(trained, out, options.format, evaluations(store, trained.fingerprint, trained.config))
    print(f"exported {checkpoint} to {out}; how to use it: {out / 'README.md'}")
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("out", metavar="OUT", help="a new folder")
    meanings = "; ".join(f"{name}: {entry.meaning}" for name, entry in FORMATS.items())
    parser.add_argument("--format", default=DEFAULT, help=f"{meanings} (default: {DEFAULT})")


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select a trained network."""
    parser.add_argument("run", metavar="RUN", help="a training: its id or label, or a checkpoint file")


def find_source(store: RunStore, name: str) -> Path | Run:
    """Return the run, the folder of a run, or the checkpoint file that `name` selects.

    Raises:
        UserError: there is none.
    """
    path = expand_home(name)
    return path if path.is_file() or (path / "run.json").exists() else store.find(name)


COMMANDS = {
    "export": Command(
        "Write a trained network to a folder, for torchvision, timm or onnxruntime without this package.",
        _export,
        _add_arguments,
        settings=("checkpoint",),
        needs_runs=False,
        epilog=CHECKPOINT,
    )
}
