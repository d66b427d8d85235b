"""Check the values of a config: the bounds of each setting, and rules between settings."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.names.backbones import has_crop_fraction
from hpc_imagenet.config.names.optimizers import check_optimizer
from hpc_imagenet.config.recipe import Model, Recipe
from hpc_imagenet.config.schema import STAGES, Config, Process, cluster_for
from hpc_imagenet.config.setting import check_bounds, settings_of
from hpc_imagenet.errors import UserError, did_you_mean

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"  # a folder name: names of runs add to it


def check_values(config: Config) -> None:
    """Check every setting of a config against its choices and bounds.

    Raises:
        UserError: names the first invalid setting and its valid values.
    """
    if config.recipe.precision == "bf16-true":  # also of runs that an earlier checkout has trained
        raise UserError(
            "recipe.precision=bf16-true is refused, as it rounds validation losses and weight averages: "
            "train with recipe.precision=bf16-mixed instead"
        )
    for name, entry, value in settings_of(config):
        check_bounds(name, entry, value)
    _check_recipe(config.recipe, config.model)
    _check_process(config.process)
    _check_dataset(config.dataset)
    _check_no_credentials("dataset.source", config.dataset.source, "set download.login instead")
    _check_no_credentials(
        "datastore.url", config.datastore.url, "boto3 and ssh read credentials from their own files"
    )
    _check_folder_name("dataset.name", config.dataset.name)
    if config.sweep is not None:
        _check_folder_name("sweep", config.sweep)
    if config.stage.name == "session":
        _check_folder_name("session.name", config.session.name)
    for split in ("train", "val", "devkit"):
        if split not in config.dataset.archives:
            raise UserError(f"dataset.archives.{split} is missing: set its file name (and md5)")
    in_allocation = config.cluster.executor == "foreground" and "SLURM_JOB_ID" in os.environ
    if config.cluster.container and config.cluster.executor != "slurm" and not in_allocation:
        raise UserError(
            f"cluster.container={config.cluster.container} is for Slurm jobs: on this machine start the "
            "command itself in the container"
        )
    for stage in config.cluster.stage:
        if stage not in STAGES:
            raise UserError(f"cluster.stage={stage} is unknown{did_you_mean(stage, STAGES)}")
        _check_stage(config, stage)


def _check_no_credentials(setting: str, url: str, alternative: str) -> None:
    # The URL is written to configs and logs, so it must not hold credentials; nor do the errors repeat it.
    try:
        parts = urlsplit(url)
    except ValueError:
        raise UserError(
            f"{setting} is not a valid URL: brackets are for an IPv6 address, as in http://[::1]/"
        ) from None
    if "://" in url and ("@" in parts.netloc or parts.query or parts.fragment):
        raise UserError(f"{setting} must be a URL prefix without credentials, ? or #: {alternative}")
    if re.match(r"[^/@:]+:[^/@]*@", url):
        raise UserError(f"{setting} must not contain a password: {alternative}")


def _check_recipe(recipe: Recipe, model: Model) -> None:
    check_optimizer(recipe)
    if recipe.val_resize < recipe.val_size and not has_crop_fraction(model.name, model.preprocessing):
        raise UserError(f"recipe.val_resize={recipe.val_resize} is too small: at least {recipe.val_size}")
    if recipe.start_size is not None and recipe.grow_to < recipe.grow_from:
        raise UserError(f"recipe.grow_to={recipe.grow_to:g} is before recipe.grow_from={recipe.grow_from:g}")


def _check_dataset(dataset: Dataset) -> None:
    for split in dataset.splits:
        if split not in ("train", "val", "test"):
            raise UserError(f"dataset.splits.{split} is unknown; one of: train, val, test")
    if dataset.format == "ilsvrc":
        given: dict[str, str | float | None] = {
            f"splits.{split}": path for split, path in dataset.splits.items()
        }
        given |= {"labels": dataset.labels, "val_fraction": dataset.val_fraction}
        _refuse_given(given)


def check_ignored(dataset: Dataset) -> None:
    """Refuse settings of labelled images that other data ignores.

    For new commands only: the config of a run that exists may have one.

    Raises:
        UserError: names the first such setting.
    """
    if dataset.format == "ilsvrc":
        empty_classes = None if dataset.empty_classes == "fail" else dataset.empty_classes
        split_seed, orient = dataset.split_seed or None, dataset.orient or None
        _refuse_given({"split_seed": split_seed, "orient": orient, "empty_classes": empty_classes})


def _refuse_given(settings: dict[str, str | float | None]) -> None:
    for name, value in settings.items():
        if value is not None:
            raise UserError(
                f"dataset.{name} is for labelled images: set dataset=images as well, or leave it out"
            )


def _check_process(process: Process) -> None:
    if process.resize is not None and not re.fullmatch(r"(short|long):[1-9][0-9]{0,4}", process.resize):
        raise UserError(f"process.resize={process.resize} is not short:PX or long:PX, such as short:256")
    if process.layout == "index" and process.tasks > 1:
        raise UserError(
            f"process.tasks={process.tasks}: building an index takes seconds and is not split; set "
            "process.tasks=1, or process.layout=shards or folders"
        )
    if process.layout != "shards":
        for name in ("resize", "normalise", "tile"):
            if value := getattr(process, name):
                raise UserError(
                    f"process.{name}={value} needs process.layout=shards: other layouts do not change images"
                )


def _check_stage(config: Config, stage: str) -> None:
    cluster = cluster_for(config, stage)
    if cluster.executor != config.cluster.executor:
        raise UserError(
            f"cluster.stage.{stage}.executor={cluster.executor}: all stages share one executor, "
            "set cluster.executor instead"
        )
    for name, entry, value in settings_of(cluster, f"cluster.stage.{stage}."):
        check_bounds(name, entry, value)


def _check_folder_name(setting: str, value: str) -> None:
    if not re.fullmatch(_NAME, value):
        raise UserError(f"{setting}={value} is not a folder name: use at most 100 letters, digits, . _ and -")
