"""Load a trained network from a run or a checkpoint file, ready to classify images. Needs no Lightning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hpc_imagenet.config.schema import Config, from_dict
from hpc_imagenet.datastore.manifest import ClassNames
from hpc_imagenet.datastore.versions import open_version
from hpc_imagenet.errors import UserError, first_line
from hpc_imagenet.runs.checkpoints import check_source, find_checkpoint
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training.callbacks.checkpoint_file import Checkpoint, read_checkpoint, read_with_weights
from hpc_imagenet.training.models import pretrained
from hpc_imagenet.training.models.networks import build_network
from hpc_imagenet.training.models.preprocessing import Preprocessing, preprocessing

Read = TypeVar("Read")


@dataclass(frozen=True)
class TrainedModel:
    """A trained network with everything that is needed to use it.

    Attributes:
        network: from normalized images [batch, 3, side, side] to logits [batch, classes], on the CPU and in
            evaluation mode; it has the weights that validation judged: the EMA weights, if there are any.
        classes: id and names of each class, in label order.
        config: resolved config of the training.
        preprocessing: how pixels become its input.
        path: the checkpoint; its training may have replaced it since.
        fingerprint: hash of the checkpoint that was read.
        identity: recipe, model, data and seed of its training, and the state of the code.
        step: number of completed steps.
        metrics: top1 and top5 (0 to 1), loss and epoch of the validation at this step; empty if the
            checkpoint was saved within an epoch.
    """

    network: nn.Module
    classes: tuple[ClassNames, ...]
    config: Config
    preprocessing: Preprocessing
    path: Path
    fingerprint: str
    identity: dict[str, Any]
    step: int
    metrics: dict[str, float]


def load_trained(
    source: Path | Run, checkpoint: str | None = None, config: Config | None = None
) -> TrainedModel:
    """Load the network of a run or of a checkpoint file.

    Args:
        source: a run, its folder, or a file.
        checkpoint: of a run: best, last, previous or epoch-N; None: best if there is one, else last.
        config: config to use in place of that of the training, such as with another recipe.val_size.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or its network cannot be built here.
    """
    path = find_checkpoint(source, checkpoint)
    found, weights, read_fingerprint = _read(path, read_with_weights)
    config, classes = config or training_config(found), _classes(found)
    check_source(path, config.model.name)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
        network = build_network(config, len(classes), fresh=False)
    state, mismatched = pretrained.match_names(network, weights)
    if mismatched:
        difference = pretrained.shape_difference(mismatched[0], state, network.state_dict())
        raise UserError(
            f"{path}: not weights of {config.model.name} for {len(classes)} classes ({difference})"
        )
    network.load_state_dict(state)
    return TrainedModel(
        network.eval(),
        classes,
        config,
        preprocessing(config),
        path,
        read_fingerprint,
        found.identity,
        found.step,
        found.metrics,
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without its weights.

    Raises:
        UserError: it is damaged, or no checkpoint of a training.
    """
    return _read(path, read_checkpoint)


def _read(path: Path, read: Callable[[Path], Read]) -> Read:
    try:
        return read(path)
    except Exception as error:  # unpickling a damaged file may raise anything
        raise UserError(
            f"{path} is not a checkpoint of a training, or damaged ({first_line(error)[:80]})"
        ) from None


def training_config(checkpoint: Checkpoint) -> Config:
    """Return the config of the training that wrote a checkpoint.

    Raises:
        UserError: neither the checkpoint nor the folder of its run has it.
    """
    if checkpoint.config is not None:
        return from_dict(checkpoint.config)
    run = Run(checkpoint.path.absolute().parents[1])  # written by an old version
    try:
        return run.config()
    except (OSError, UserError):
        raise UserError(
            f"{checkpoint.path} has no config and is not in the folder of its run: move it back to "
            "RUN/checkpoints/"
        ) from None


def _classes(checkpoint: Checkpoint) -> tuple[ClassNames, ...]:
    if checkpoint.classes is not None:
        return tuple(ClassNames(wnid, tuple(names)) for wnid, names in checkpoint.classes)
    return open_version(training_config(checkpoint).datastore).manifest.classes
