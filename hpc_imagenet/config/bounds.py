"""The one check of values: settings that have the right type and still make no sense."""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Any
from urllib.parse import urlsplit

from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.config.schema import EXECUTORS, LISTEN_MODES, STAGES, Config, Process, cluster_for
from hpc_imagenet.errors import UserError, did_you_mean

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # of what becomes a folder

_CHOICES = {
    "stage.name": STAGES,
    "cluster.executor": EXECUTORS,
    "process.layout": ("index", "shards", "folders"),
    "process.check": ("header", "decode"),
    "process.on_corrupt": ("fail", "skip"),
    "process.order": ("archive", "shuffled"),
    "loader.decode": ("cpu", "gpu"),
    "loader.on_corrupt": ("fail", "skip"),
    "session.listen": LISTEN_MODES,
    "model.stem": ("auto", "standard", "small"),
    "recipe.optimizer": ("sgd", "adamw"),
    "recipe.schedule": ("cosine", "linear"),
    "recipe.augment": ("none", "trivial"),
    "recipe.precision": ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"),
}

_BETWEEN: dict[str, tuple[int, int]] = {
    "process.tasks": (1, 9999),
    "process.workers": (1, 9999),
    "process.seed": (0, 2**32 - 1),
    "process.quality": (1, 100),
    "upload.tasks": (1, 9999),
    "session.port": (1024, 65535),
    "seed": (0, 2**32 - 1),
    "recipe.label_smoothing": (0, 1),
    "recipe.crop_scale": (0, 1),
    "recipe.flip": (0, 1),
    "recipe.norm_momentum": (0, 1),
    "recipe.erase": (0, 1),
    "recipe.ema": (0, 1),
}

_AT_LEAST = {
    "recipe.epochs": 1,
    "recipe.global_batch": 1,
    "recipe.size": 8,
    "recipe.val_size": 8,
    "recipe.learning_rate": 0,
    "recipe.weight_decay": 0,
    "recipe.warmup_epochs": 0,
    "recipe.start_size": 8,
    "recipe.mixup": 0,
    "recipe.cutmix": 0,
    "recipe.ema_every": 1,
    "train.bottleneck_after_seconds": 0,
    "train.accumulate": 1,
    "loader.workers": 0,
    "download.connections": 1,
    "download.retries": 0,
    "upload.connections": 1,
    "session.time": 1,
    "session.gpus": 0,
    "cluster.parallel": 1,
    "cluster.nodes": 1,
    "cluster.gpus_per_node": 0,
    "cluster.tasks_per_node": 1,
    "cluster.cpus_per_task": 1,
    "cluster.array_parallelism": 1,
    "cluster.max_requeues": 0,
    "cluster.memory_gb": 0,  # 0 is all that a node has
    "cluster.time": 1,
    "cluster.scratch_gb": 0,
}

_ABOVE_NOTHING = (
    "download.limit",
    "download.timeout",
    "session.idle_minutes",
    "process.shard_size",
    "train.checkpoint_every_minutes",
)


def check_values(config: Config) -> None:
    """Refuse values that have the right type and still make no sense.

    Raises:
        UserError: the first setting that is wrong, and what would be right.
    """
    for setting, valid in _CHOICES.items():
        _one_of(setting, attrgetter(setting)(config), valid)
    for setting, (least, most) in _BETWEEN.items():
        value = attrgetter(setting)(config)
        if value is not None and not least <= value <= most:
            raise UserError(f"{setting}={value} is not between {least} and {most}")
    for setting, least in _AT_LEAST.items():
        _at_least(setting, attrgetter(setting)(config), least)
    for setting in _ABOVE_NOTHING:
        value = attrgetter(setting)(config)
        if value is not None and value <= 0:
            raise UserError(f"{setting}={value} must be more than 0")
    _check_recipe(config.recipe)
    _check_process(config.process)
    _no_secret("dataset.source", config.dataset.source, "a login is given by download.login")
    _no_secret("datastore.url", config.datastore.url, "boto3 and ssh find the login")
    _folder("dataset.name", config.dataset.name)
    if config.stage.name == "session":
        _folder("session.name", config.session.name)
    for split in ("train", "val", "devkit"):
        if split not in config.dataset.archives:
            raise UserError(f"dataset.archives.{split} is missing: give its file name (and md5)")
    for stage in config.cluster.stage:
        _one_of("cluster.stage", stage, STAGES)
        _check_stage(config, stage)


def _no_secret(setting: str, url: str, instead: str) -> None:
    # It is written into configs and logs; a login in it would be as well. It is not shown here either.
    parts = urlsplit(url)
    if "://" in url and ("@" in parts.netloc or parts.query or parts.fragment):
        raise UserError(f"{setting} is a URL prefix without a login, ? or #: {instead}")
    if re.match(r"[^/@:]+:[^/@]*@", url):
        raise UserError(f"{setting} has no place for a password: {instead}")


def _check_recipe(recipe: Recipe) -> None:
    _at_least("recipe.val_resize", recipe.val_resize, recipe.val_size)
    if recipe.start_size is not None and recipe.grow_to < recipe.grow_from:
        raise UserError(
            f"recipe.grow_to={recipe.grow_to:g} comes before recipe.grow_from={recipe.grow_from:g}"
        )


def _check_process(process: Process) -> None:
    if process.resize is not None and not re.fullmatch(r"(short|long):[1-9][0-9]{0,4}", process.resize):
        raise UserError(f"process.resize={process.resize} is not short:PX or long:PX, such as short:256")
    if process.layout == "index" and process.tasks > 1:
        raise UserError(
            f"process.tasks={process.tasks}: an index takes seconds and is not cut into parts; "
            "process.layout=shards and folders are"
        )
    if process.layout != "shards":
        for name in ("resize", "normalise", "tile"):
            if value := getattr(process, name):
                raise UserError(
                    f"process.{name}={value} needs process.layout=shards: the others change no image"
                )


def _check_stage(config: Config, stage: str) -> None:
    own = cluster_for(config, stage)
    if own.executor != config.cluster.executor:
        raise UserError(
            f"cluster.stage.{stage}.executor={own.executor}: all stages have one, cluster.executor"
        )
    for setting, least in _AT_LEAST.items():
        if setting.startswith("cluster."):
            name = setting.removeprefix("cluster.")
            _at_least(f"cluster.stage.{stage}.{name}", getattr(own, name), least)


def _at_least(setting: str, value: Any, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"{setting}={value} is too small: at least {least}")


def _folder(setting: str, value: str) -> None:
    if not re.fullmatch(_NAME, value):
        raise UserError(f"{setting}={value} names a folder: letters, digits and . _ - make one")


def _one_of(setting: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UserError(f"{setting}={value} is unknown{did_you_mean(value, valid)}")
