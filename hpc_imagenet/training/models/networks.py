"""Build the network of a config: torchvision's NAME, timm's timm/NAME, or a user's my.package:factory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from hpc_imagenet.config.names.backbones import implied_options, is_own, is_weights_name, timm_name
from hpc_imagenet.config.recipe import Model
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.checkpoints import check_network
from hpc_imagenet.training.callbacks.checkpoint_file import Checkpoint, read_checkpoint
from hpc_imagenet.training.models import build, pretrained
from hpc_imagenet.training.models.blurpool import blur_before_halving
from hpc_imagenet.training.models.frozen_source import build_own
from hpc_imagenet.training.models.optim import set_norm_momentum


def build_network(
    config: Config, classes: int, fresh: bool, class_ids: Sequence[str] | None = None
) -> nn.Module:
    """Return the network of a training, with initial weights from the seed or from `model.weights`.

    Args:
        config: model, recipe and seed.
        classes: number of outputs of the last layer.
        fresh: whether to load `model.weights`; a checkpoint, if there is one, replaces them anyway.
        class_ids: ids of the classes in label order. The classifier in a checkpoint for others, or for these
            in another order, is not loaded. None: only the number of classes is compared.

    Returns:
        A module from [batch, 3, side, side] to [batch, classes].

    Raises:
        UserError: an unknown option, weights that do not fit, or a size that the network does not take; with
            `recipe.keep_optimizer` also weights for other classes.
    """
    torch.manual_seed(config.seed)
    model, recipe = config.model, config.recipe
    weights = model.weights if fresh else None
    network, same_classes = _build(config, classes, weights)
    classifier: list[str] = []  # the names of its weights, if they are known to be for other classes
    if recipe.blurpool and not blur_before_halving(network):
        raise UserError(f"recipe.blurpool=true: {model.name} has no convolution that it would change")
    set_norm_momentum(network, recipe.norm_momentum)
    if weights and same_classes is None:
        source = None if is_weights_name(model.name, weights) else _read_source(Path(weights))
        if source is None and model.weights_run:
            raise UserError(
                f"model.weights={model.weights_run}: {weights} is damaged or missing: submit with another RUN"
            )
        if source and source.config:
            stem = _has_small_stem(model)
            check_network(f"model.weights={weights}", source.config, model, recipe, stem)
        if not _has_classes(source, class_ids):
            number = len(source.classes) if source and source.classes else classes
            classifier = _classifier_weights(network, config, number if number != classes else classes + 1)
        same_classes = pretrained.load_weights(
            network,
            model.name,
            weights,
            averaged=not recipe.keep_optimizer,
            classifier=classifier,
        )
    if same_classes is False and recipe.keep_optimizer:  # whose state is for the classifier as well
        raise UserError(
            f"recipe.keep_optimizer=true: the weights in {weights} are for other classes: "
            "set recipe.keep_optimizer=false"
        )
    if same_classes is False:
        print(
            f"model.weights={weights}: the weights are for other classes, so the classifier"
            " is initialized at random",
            flush=True,
        )
    if recipe.freeze:
        pretrained.freeze_backbone(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in classifier)  # those are random
    return network


def _read_source(path: Path) -> Checkpoint | None:
    """Return the checkpoint of a training, without its weights; None: another file of weights.

    A file that cannot be read now is no other file: the network would be compared on some ranks alone.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return read_checkpoint(path)
    except FileNotFoundError:
        return None  # refused when its weights are read
    except OSError:
        raise
    except Exception:  # also of a damaged file, which is refused when its weights are read
        return None


def _has_small_stem(model: Model) -> bool:
    if timm_name(model.name):
        from hpc_imagenet.training.models import timm_networks  # slow import, of an extra

        return not timm_networks.published(model).fixed_input_size
    return not is_own(model.name)


def _has_classes(source: Checkpoint | None, class_ids: Sequence[str] | None) -> bool:
    """Whether a checkpoint is for these classes in this order; True where one of both is not known."""
    if source is None or source.classes is None or class_ids is None:
        return True
    return [wnid for wnid, _ in source.classes] == list(class_ids)


def _classifier_weights(network: nn.Module, config: Config, other: int) -> list[str]:
    """Return the names of the weights whose shapes depend on the number of classes, auxiliary heads included.

    Args:
        network: the network.
        config: its settings.
        other: another number of classes, with which it is built to compare.

    Raises:
        UserError: none do, or their names do.
    """
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        more, _ = _build(config, other, None)
    others = {name: value.shape for name, value in more.state_dict().items()}
    found = [name for name, shape in shapes.items() if others.get(name) != shape]
    if not found or shapes.keys() != others.keys():
        raise UserError(
            f"model.weights={config.model.weights}: the weights are for other classes, and which of them are "
            f"the classifier of {config.model.name} is unknown: with {other} classes "
            f"{'no shape differs' if shapes == others else 'other weights exist'}: "
            "leave the weights out"
        )
    return found


def _build(config: Config, classes: int, weights: str | None) -> tuple[nn.Module, bool | None]:
    """Return the network; and, if that has loaded `weights`, whether they are for this number of classes."""
    model, recipe = config.model, config.recipe
    if is_own(model.name):
        return build_own(model, recipe, classes), None
    if timm_name(model.name):
        from hpc_imagenet.training.models import timm_networks  # slow import, of an extra

        network = timm_networks.build_timm(model, recipe, classes, fresh=weights is not None)
        if weights and is_weights_name(model.name, weights):
            return network, timm_networks.published(model).num_classes == classes
        return network, None
    options = {**implied_options(model.name, model.weights), **model.options}
    network = build.build_model(
        model.name,
        classes,
        stem=model.stem,
        size=recipe.size,
        val_size=recipe.val_size,
        start_size=recipe.start_size,
        options=options,
    )
    return network, None
