"""The one check of values: settings that have the right type and still make no sense."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from hpc_imagenet.config import EXECUTORS, LISTEN, STAGES, Config, Process, cluster_for
from hpc_imagenet.errors import UserError, near
from hpc_imagenet.experiment import Recipe

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # of what becomes a folder


def check(config: Config) -> None:
    """Refuse values that have the right type and still make no sense.

    Raises:
        UserError: the first setting that is wrong, and what would be right.
    """
    _one_of("stage", config.stage.name, STAGES)
    _one_of("cluster.executor", config.cluster.executor, EXECUTORS)
    _one_of("process.layout", config.process.layout, ("index", "shards", "folders"))
    _one_of("process.check", config.process.check, ("header", "decode"))
    _one_of("process.on_corrupt", config.process.on_corrupt, ("fail", "skip"))
    _one_of("process.order", config.process.order, ("archive", "shuffled"))
    _check_process(config.process)
    _one_of("loader.decode", config.loader.decode, ("cpu", "gpu"))
    _one_of("loader.on_corrupt", config.loader.on_corrupt, ("fail", "skip"))
    _between("upload.tasks", config.upload.tasks, 1, 9999)
    _one_of("session.listen", config.session.listen, LISTEN)
    _one_of("model.stem", config.model.stem, ("auto", "standard", "small"))
    _check_recipe(config.recipe)
    recipe, cluster = config.recipe, config.cluster
    for name, value, least in (
        ("recipe.epochs", recipe.epochs, 1),
        ("recipe.global_batch", recipe.global_batch, 1),
        ("recipe.size", recipe.size, 8),
        ("recipe.val_size", recipe.val_size, 8),
        ("recipe.val_resize", recipe.val_resize, recipe.val_size),
        ("recipe.learning_rate", recipe.learning_rate, 0),
        ("recipe.weight_decay", recipe.weight_decay, 0),
        ("recipe.warmup_epochs", recipe.warmup_epochs, 0),
        ("recipe.start_size", recipe.start_size, 8),
        ("recipe.mixup", recipe.mixup, 0),
        ("recipe.cutmix", recipe.cutmix, 0),
        ("recipe.ema_every", recipe.ema_every, 1),
        ("train.verdict_after_seconds", config.train.verdict_after_seconds, 0),
        ("loader.workers", config.loader.workers, 0),
        ("train.accumulate", config.train.accumulate, 1),
        ("download.connections", config.download.connections, 1),
        ("download.retries", config.download.retries, 0),
        ("upload.connections", config.upload.connections, 1),
        ("session.time", config.session.time, 1),
        ("session.gpus", config.session.gpus, 0),
        ("cluster.parallel", cluster.parallel, 1),
        ("cluster.nodes", cluster.nodes, 1),
        ("cluster.gpus_per_node", cluster.gpus_per_node, 0),
        ("cluster.tasks_per_node", cluster.tasks_per_node, 1),
        ("cluster.time", cluster.time, 1),
        ("cluster.scratch_gb", cluster.scratch_gb, 0),
        ("seed", config.seed, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name}={value} is too small: at least {least}")
    if config.seed >= 2**32:
        raise UserError(f"seed={config.seed} is too large: below {2**32}")
    for name, share in (
        ("recipe.label_smoothing", recipe.label_smoothing),
        ("recipe.crop_scale", recipe.crop_scale),
        ("recipe.flip", recipe.flip),
        ("recipe.norm_momentum", recipe.norm_momentum),
        ("recipe.erase", recipe.erase),
        ("recipe.ema", recipe.ema),
    ):
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"{name}={share} is not between 0 and 1")
    for name, above in (
        ("download.limit", config.download.limit),
        ("download.timeout", config.download.timeout),
        ("session.idle_minutes", config.session.idle_minutes),
    ):
        if above is not None and above <= 0:
            raise UserError(f"{name}={above} must be more than 0")
    _no_secret("dataset.source", config.dataset.source, "a login is given by download.login")
    _no_secret("datastore.url", config.datastore.url, "boto3 and ssh find the login")
    if config.train.checkpoint_every_minutes <= 0:
        raise UserError("train.checkpoint_every_minutes must be more than 0")
    if not re.fullmatch(_NAME, config.dataset.name):
        raise UserError(
            f"dataset.name={config.dataset.name} names a folder: letters, digits and . _ - make one"
        )
    if config.stage.name == "session" and not re.fullmatch(_NAME, config.session.name):
        raise UserError(
            f"session.name={config.session.name} names a folder: letters, digits and . _ - make one"
        )
    _between("session.port", config.session.port, 1024, 65535)
    for split in ("train", "val", "devkit"):
        if split not in config.dataset.archives:
            raise UserError(f"dataset.archives.{split} is missing: give its file name (and md5)")
    for stage in cluster.stage:
        _one_of("cluster.stage", stage, STAGES)
        cluster_for(config, stage)


def _no_secret(setting: str, url: str, instead: str) -> None:
    # It is written into configs and logs; a login in it would be as well. It is not shown here either.
    parts = urlsplit(url)
    if "://" in url and ("@" in parts.netloc or parts.query or parts.fragment):
        raise UserError(f"{setting} is a URL prefix without a login, ? or #: {instead}")
    if re.match(r"[^/@:]+:[^/@]*@", url):
        raise UserError(f"{setting} has no place for a password: {instead}")


def _check_recipe(recipe: Recipe) -> None:
    _one_of("recipe.optimizer", recipe.optimizer, ("sgd", "adamw"))
    _one_of("recipe.schedule", recipe.schedule, ("cosine", "linear"))
    _one_of("recipe.augment", recipe.augment, ("none", "trivial"))
    if recipe.start_size is not None and recipe.grow_to < recipe.grow_from:
        raise UserError(
            f"recipe.grow_to={recipe.grow_to:g} comes before recipe.grow_from={recipe.grow_from:g}"
        )


def _check_process(process: Process) -> None:
    for name, value, least, most in (
        ("tasks", process.tasks, 1, 9999),
        ("workers", process.workers, 1, 9999),
        ("seed", process.seed, 0, 2**32 - 1),
        ("quality", process.quality, 1, 100),
    ):
        _between(f"process.{name}", value, least, most)
    if process.shard_size <= 0:
        raise UserError(f"process.shard_size={process.shard_size} must be more than 0 GiB")
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


def _between(setting: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise UserError(f"{setting}={value} is not between {least} and {most}")


def _one_of(setting: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UserError(f"{setting}={value} is unknown{near(value, valid)}")
