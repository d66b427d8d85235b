"""Checkpoint files of a run, written atomically.

checkpoints/last.ckpt      weights (with EMA weights, if any), optimizer, schedule, and position in the epoch
checkpoints/previous.ckpt  the checkpoint before it, in case the last one is damaged
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


@dataclass(frozen=True)
class Checkpoint:
    """A readable checkpoint.

    Attributes:
        path: path of the file.
        step: number of completed steps.
        identity: recipe, model, data and seed of its training, and the state of the code.
    """

    path: Path
    step: int
    identity: dict[str, Any]


def identity_differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the differences of two identities, such as `recipe.epochs was 90, is 30 now`.

    The state of the code is not compared, so that a run can resume after a bug fix.
    """
    differences = []
    for name in sorted({*saved, *current} - ({"code"} if not prefix else set())):
        old, new = saved.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += identity_differences(old, new, f"{prefix}{name}.")
        elif old != new:
            old, new = ("not set" if value is None else value for value in (old, new))
            differences.append(f"{prefix}{name} was {old}, is {new} now")
    return differences


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that writes a checkpoint atomically and keeps the previous one.

    Args:
        check_lease: called when the file is written, just before it is renamed; raises `Superseded` if this
            job has lost the run's lease.
    """

    def __init__(self, check_lease: Callable[[], object] | None = None) -> None:
        super().__init__()
        self._check_lease = check_lease

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path` atomically, and keep the old file as `previous.ckpt`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, self._check_lease) as file:
            torch.save(checkpoint, file)
            if path.exists():
                link = path.with_name(f".{PREVIOUS}.tmp")
                link.unlink(missing_ok=True)
                os.link(path, link)
                link.replace(path.with_name(PREVIOUS))


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest readable checkpoint in `folder`; None if there are no checkpoints.

    Raises:
        UserError: there are checkpoints, but none is readable.
    """
    broken = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            # Memory-mapped: this checks that the archive is complete, without reading the weights.
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return Checkpoint(path, int(content["global_step"]), dict(content["identity"]))
        except Exception as error:  # unpickling a damaged file may raise anything
            broken.append(f"{path} cannot be read ({(str(error).splitlines() or [''])[0][:80]})")
            print(f"warning: {broken[-1]}: trying the previous checkpoint", file=sys.stderr, flush=True)
    if broken:
        raise UserError(f"{broken[0]}, nor can any other checkpoint: remove {folder} to train from the start")
    return None
