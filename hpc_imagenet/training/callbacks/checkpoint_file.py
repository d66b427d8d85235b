"""Checkpoint files of a run, written atomically.

checkpoints/last.ckpt      weights (with EMA weights, if any), optimizer, schedule, and position in the epoch
checkpoints/previous.ckpt  the checkpoint before it, in case the last one is damaged
checkpoints/best.ckpt      that after the epoch with the highest val top-1
checkpoints/epoch-12.ckpt  that after 12 epochs; of the newest `train.keep_checkpoints` epochs

All but the last are hard links to files that were the last checkpoint once, so keeping them writes nothing;
they are copies where the file system has no hard links.
Every file also has the config and the classes of its training and, after an epoch, its val metrics.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpc_imagenet.errors import UserError, first_line
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.runs.checkpoints import BEST, LAST, PREVIOUS, epoch_checkpoints, fingerprint, link_or_copy


@dataclass(frozen=True)
class Checkpoint:
    """A readable checkpoint.

    Attributes:
        path: path of the file.
        step: number of completed steps.
        identity: recipe, model, data and seed of its training, and the state of the code.
        metrics: top1 and top5 (0 to 1), loss and the number of completed epochs (`epoch`), if it was saved
            after the validation of an epoch; else empty.
        config: the resolved config of the training; None in checkpoints of old versions.
        classes: id and names of each class, in label order; None in checkpoints of old versions.
    """

    path: Path
    step: int
    identity: dict[str, Any]
    metrics: dict[str, float]
    config: dict[str, Any] | None
    classes: list[tuple[str, list[str]]] | None


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


def write_checkpoint(
    content: dict[str, Any], path: Path, check_lease: Callable[[], object] | None = None
) -> None:
    """Write `content` to `path` atomically, and keep the old file as `previous.ckpt`.

    Args:
        content: the checkpoint.
        path: path of the file.
        check_lease: called when the file is written, just before it is renamed; raises `Superseded` if this
            job has lost the run's lease.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, check_lease) as file:
        torch.save(content, file)
        if path.exists():
            _link(path, path.with_name(PREVIOUS))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of checkpoints that killed attempts have left; only the lease holder may."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without its weights.

    Raises:
        Exception: the file is damaged, or no checkpoint of a training; of any type, from unpickling it.
    """
    # Memory-mapped: this checks that the archive is complete, without reading the weights.
    return _checkpoint(path, torch.load(path, map_location="cpu", mmap=True, weights_only=True))


def read_with_weights(path: Path) -> tuple[Checkpoint, dict[str, torch.Tensor], str]:
    """Read a checkpoint, the weights that validation judged, and the fingerprint of both.

    The file is opened once, because its training may replace it at any moment.

    Raises:
        Exception: as `read_checkpoint`.
    """
    with path.open("rb") as file:
        content = torch.load(file, map_location="cpu", weights_only=True)
        found = fingerprint(path, file)
    state = content["state_dict"]
    prefix = "ema_model." if any(name.startswith("ema_model.") for name in state) else "model."
    weights = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    return _checkpoint(path, content), weights, found


def _checkpoint(path: Path, content: dict[str, Any]) -> Checkpoint:
    return Checkpoint(
        path,
        int(content["global_step"]),
        dict(content["identity"]),
        dict(content.get("metrics", {})),
        content.get("config"),
        content.get("classes"),
    )


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest readable checkpoint in `folder`; None if there are no checkpoints.

    That is the last one, else the previous one, else, of those of epochs and the best, that of most steps.

    Raises:
        UserError: there are checkpoints, but none is readable.
    """
    broken = []
    # Those of epochs may be of long ago: they stay when train.keep_checkpoints is set to null.
    for paths in ([folder / LAST], [folder / PREVIOUS], [*epoch_checkpoints(folder), folder / BEST]):
        found = []
        for path in filter(Path.exists, paths):
            try:
                found.append(read_checkpoint(path))
            except Exception as error:
                broken.append(_unreadable(path, error))
                print(f"warning: {broken[-1]}: trying another checkpoint", file=sys.stderr, flush=True)
        if found:
            return max(found, key=lambda each: each.step)
    if broken:
        raise UserError(f"{broken[0]}, nor can any other checkpoint: remove {folder} to train from the start")
    return None


class KeptCheckpoints:
    """The checkpoints that are kept beside the last one: the best, and those of the newest epochs.

    What is the best so far is read from best.ckpt itself, so that it remains true after a kill at any moment.

    Args:
        folder: folder of the checkpoints.
        identity: identity of this training: a best.ckpt of another one is replaced.
        epochs: number of epochs whose checkpoints are kept; 0: none, and existing ones are not removed.
        check_lease: called before files are linked; raises `Superseded` if this job has lost the run's lease.

    Attributes:
        best: metrics of best.ckpt; empty if there is none yet.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        epochs: int,
        check_lease: Callable[[], object] = lambda: None,
    ) -> None:
        self._folder, self._epochs, self._check_lease = folder, epochs, check_lease
        self.best: dict[str, float] = {}
        path = folder / BEST
        if path.exists():
            try:
                found = read_checkpoint(path)
            except Exception as error:
                print(
                    f"warning: {_unreadable(path, error)}: it will be replaced", file=sys.stderr, flush=True
                )
            else:
                self.best = {} if identity_differences(found.identity, identity) else found.metrics

    def keep(self, path: Path, metrics: dict[str, float]) -> None:
        """Keep the checkpoint `path` as the best or as that of its epoch; may be repeated.

        Args:
            path: path of the file.
            metrics: its metrics; see `Checkpoint`. Empty: it was saved within an epoch and is not kept.
        """
        if not metrics:
            return
        self._check_lease()
        if metrics["top1"] > self.best.get("top1", -1.0):
            _link(path, self._folder / BEST)
            self.best = metrics
        if self._epochs:
            _link(path, self._folder / f"epoch-{metrics['epoch']}.ckpt")
            for old in epoch_checkpoints(self._folder)[: -self._epochs]:
                old.unlink(missing_ok=True)


def _link(path: Path, link: Path) -> None:
    """Make `link` another name of the file `path`, or a copy, atomically."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    link_or_copy(path, temporary)
    temporary.replace(link)
    temporary.unlink(missing_ok=True)  # rename(2) does nothing if both are names of one file


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} cannot be read ({first_line(error)[:80]})"
