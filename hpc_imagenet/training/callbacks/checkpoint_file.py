"""The checkpoints of a run: `last.ckpt`, whole at any moment, and the one before it.

checkpoints/last.ckpt      weights, optimizer, schedule, and where in which epoch
checkpoints/previous.ckpt  in case a disk has spoilt the last one
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
    """One that can be read."""

    path: Path
    step: int  # steps done
    identity: dict[
        str, Any
    ]  # of what it is a training: recipe, model, data, seed; and code, which may differ


def differing(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """Return what two identities do not have in common, each as `recipe.epochs is 90 there and 30 here`.

    The state of the code is told, not compared: a run outlives a fix.
    """
    found = []
    for name in sorted({*there, *here} - ({"code"} if not prefix else set())):
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differing(one, other, f"{prefix}{name}.")
        elif one != other:
            words = ["not set" if value is None else str(value) for value in (one, other)]
            found.append(f"{prefix}{name} is {words[0]} there and {words[1]} here")
    return found


class AtomicCheckpointIO(TorchCheckpointIO):
    """How Lightning writes a checkpoint: the old one steps back when the new one is on disk.

    Args:
        before: called when all is written and nothing but the new name is left; raises where this job may
            not write any more.
    """

    def __init__(self, before: Callable[[], object] | None = None) -> None:
        super().__init__()
        self._before = before

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, self._before) as file:
            torch.save(checkpoint, file)
            if path.exists():
                aside = path.with_name(f".{PREVIOUS}.tmp")
                aside.unlink(missing_ok=True)
                os.link(path, aside)
                aside.replace(path.with_name(PREVIOUS))


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest readable checkpoint in `folder`; None where there is none at all.

    Raises:
        UserError: there are some, and none can be read.
    """
    broken = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            # Mapped, not read: enough to see that the archive has its end and where the training was.
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return Checkpoint(path, int(content["global_step"]), dict(content["identity"]))
        except Exception as error:  # a damaged file may make unpickling raise anything
            broken.append(f"{path} cannot be read ({(str(error).splitlines() or [''])[0][:80]})")
            print(f"warning: {broken[-1]}: trying the one before", file=sys.stderr, flush=True)
    if broken:
        raise UserError(f"{broken[0]} and none before it: remove {folder} to train from the start")
    return None
