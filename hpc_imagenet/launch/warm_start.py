"""Warm starts: `model.weights=RUN` begins a training with the weights of a run, finished or running.

The checkpoint is found at submission, and the run's id and the checkpoint's content become part of the
signature. The new run's folder gets a hard link to it, so that it begins with these weights even if the
source trains on or is deleted.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_imagenet.config.input.search_space import change_models, sample_values, trial_config
from hpc_imagenet.config.names.backbones import (
    BACKBONES,
    IMPLIED_OPTIONS,
    is_weights_name,
    timm_name,
)
from hpc_imagenet.config.recipe import Model, Recipe
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.checkpoints import (
    CHECKPOINTS,
    INITIAL,
    check_equal,
    check_network,
    find_checkpoint,
    fingerprint,
    image_settings,
    link_or_copy,
    with_implied,
)
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import FORMAT, Run, RunStore
from hpc_imagenet.stages.search_stage import SEARCH
from hpc_imagenet.stages.train_stage import TRAIN

_STAGES = (TRAIN.name, SEARCH.name)  # which begin with weights
_OPTIMIZER = ("optimizer", "norm_decay", "freeze")  # what decides the optimizer's state and its groups


def find_weights(config: Config, store: RunStore) -> Config:
    """Return the config with the checkpoint of the run that `model.weights` names.

    A checkpoint's file in the folder of a run stays as it is, and the network is that of the run as well.
    Other weights are unchanged. All trials of a search begin with the same weights.

    Raises:
        UserError: no such run, or it has no checkpoint or another network, or, with recipe.keep_optimizer,
            another optimizer.
    """
    name = config.model.weights
    if (
        config.stage.name not in (*_STAGES, "pipeline")
        or not name
        or is_weights_name(config.model.name, name)
    ):
        return config
    if Path(name).is_file():
        frozen = _config_beside(
            Path(name)
        )  # without one it is compared when it is loaded, if it is a checkpoint
        return _begin_with(config, name, frozen) if frozen else config
    if Run(Path(name)).info:
        run = Run(Path(name).resolve())
    elif "/" in name:
        return config  # refused as a missing file
    else:
        try:
            run = store.find(name)
        except UserError as error:
            raise UserError(f"model.weights={name}: no such file, and {error}") from None
    run.check_format()
    if run.info.get("stage") != TRAIN.name:
        raise UserError(f"model.weights={name}: {run.id} is no training, so it has no weights")
    checkpoint = find_checkpoint(run)
    found = {"weights": str(checkpoint), "weights_run": run.id, "weights_hash": fingerprint(checkpoint)}
    return _begin_with(config, run.id, run.frozen(), **found)


def _config_beside(file: Path) -> dict[str, Any] | None:
    """Return the config of the training whose folder holds a checkpoint's file; None if it cannot be read."""
    folder = file.resolve().parent
    run = Run(folder.parent)
    if folder.name != CHECKPOINTS:
        return None
    with contextlib.suppress(UserError, OSError):  # a copy of the folder may lack it, or its owner hide it
        if [run.info.get(key) for key in ("stage", "format")] == [TRAIN.name, FORMAT]:
            frozen = run.frozen()
            if all(isinstance(frozen.get(group), dict) for group in ("model", "recipe")):
                return frozen
    return None


def _begin_with(config: Config, source: str, frozen: dict[str, Any], **found: Any) -> Config:
    """Return the config for weights of a run or file `source`: the model as there, with settings `found`."""

    def with_weights(model: Model, recipe: Recipe) -> Model:
        model = _like(model, with_implied(frozen["model"]))
        _check_same(model, recipe, source, frozen)
        return replace(model, **found)

    config = change_models(config, with_weights)
    if config.search.worker == 1:  # the workers differ in their numbers alone
        for values in sample_values(config.search.space):
            trial = trial_config(config, values)
            _check_same(trial.model, trial.recipe, source, frozen)
    return config


def keep_weights(job: Job, run: Run) -> None:
    """Link the checkpoint of a warm start into the new run's folder.

    Raises:
        UserError: the source has replaced or removed it since it was found.
    """
    model, kept = job.config.model, run.folder / INITIAL
    if job.stage not in _STAGES or not model.weights_run or not model.weights:
        return
    if kept.exists() and fingerprint(kept) == model.weights_hash:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f".{INITIAL}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        link_or_copy(Path(model.weights), temporary)
        if fingerprint(temporary) != model.weights_hash:
            raise FileNotFoundError
        temporary.replace(kept)
    except FileNotFoundError:
        temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # an earlier attempt has written to it
            run.folder.rmdir()
        raise UserError(
            f"model.weights={model.weights_run}: it has just written another checkpoint: submit again"
        ) from None


def _like(model: Model, source: dict[str, Any]) -> Model:
    """Return the model with the tag, the normalisation and the filter of the run, where it names none.

    Else images would have those of the network's default, which the weights may not expect.
    """
    name, options = source["name"], source["options"]
    kept = {key: options[key] for key in IMPLIED_OPTIONS.get(model.name, {}) if key in options}
    same = timm_name(name) and model.name == name.partition(".")[0]
    return replace(
        model,
        name=name if same else model.name,
        options={**kept, **model.options},
        preprocessing={**image_settings(source), **model.preprocessing},
    )


def _check_same(model: Model, settings: Recipe, source: str, frozen: dict[str, Any]) -> None:
    """Raise unless the source has this network, and its optimizer if that is kept."""
    setting, recipe = f"model.weights={source}", frozen["recipe"]
    # Only timm knows which of its networks have a small stem: theirs is compared when they are built.
    check_network(setting, frozen, model, settings, has_small_stem=model.name in BACKBONES)
    if settings.keep_optimizer:
        why = ", with recipe.keep_optimizer=true"
        for key in _OPTIMIZER:
            check_equal(setting, f"recipe.{key}", recipe.get(key), getattr(settings, key), why)
