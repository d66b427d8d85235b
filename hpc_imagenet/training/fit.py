"""One training: build, take up where the last attempt stopped, train to the end, tell what came out."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from hpc_imagenet.config import Config
from hpc_imagenet.datastore.store import Split, Store
from hpc_imagenet.errors import Lost, UserError
from hpc_imagenet.runs import Progress, Run
from hpc_imagenet.training import environment, model, weights
from hpc_imagenet.training.account import Account
from hpc_imagenet.training.average import Average
from hpc_imagenet.training.blurpool import blur_before_halving
from hpc_imagenet.training.boundary import Boundary
from hpc_imagenet.training.checkpoint import Checkpoint, Writer, differing, newest
from hpc_imagenet.training.loaders import Loaders
from hpc_imagenet.training.metrics import Table, write_classes
from hpc_imagenet.training.module import Classifier
from hpc_imagenet.training.preemption import Asked
from hpc_imagenet.training.recipe import set_norm_momentum
from hpc_imagenet.training.sampler import Share
from hpc_imagenet.training.verdict import Verdict
from hpc_imagenet.world import World, cpus

LOG_EVERY = 50  # steps


def fit(config: Config, store: Store, run: Run, world: World) -> dict[str, Any]:
    """Train what `config` describes on `store`, or go on with it; called by every task of the job.

    Returns:
        top1 and top5 (0 to 1) and loss (mean cross-entropy) on val; images_per_second of training, over all
        ranks; images skipped because they could not be read; epochs; seconds this attempt took; parameters
        of the network.

    Raises:
        UserError: bad input, in one line.
        Interrupted: a signal asked to stop; a checkpoint is saved.
        Lost: another task of the job is gone.
        Superseded: another copy of the job has taken the run over.
    """
    began = time.monotonic()
    recipe, checkpoints = config.recipe, run.folder / "checkpoints"
    place, share = environment.device(config, world), environment.share(config, world)
    torch.set_num_threads(cpus(world))
    main: Any = rank_zero_only
    main.rank = world.rank  # else Lightning guesses from variables that another job may have left

    classes = len(store.manifest.classes)
    train, val = _split(store, "train", classes), _split(store, "val", classes)
    steps = len(train) // share.batch
    if not steps:
        raise UserError(f"recipe.global_batch={share.batch} is more than the {len(train)} images of train")

    start = newest(checkpoints)
    identity = {
        **config.training(),
        "data": store.manifest.content,
        "code": (run.attempt.submitted.get("code") or {}) if run.attempt else {},
    }
    if start and (other := differing(start.identity, identity)):
        more = f" (and {len(other) - 1} more)" if other[1:] else ""
        raise UserError(
            f"{start.path} is of another training: {other[0]}{more}: put it aside, or ask for what it is of"
        )

    network = backbone(config, classes, fresh=start is None)
    look_every = min(LOG_EVERY, steps)
    module = Classifier(network, classes, recipe, config.seed, steps * recipe.epochs, share, look_every)
    if config.model.compile:
        module.compile_networks(cpus(world))
    loaders = Loaders(config, train, val, share, world, place)
    told = run.folder / "verdict.json"
    verdict = Verdict(config, told, cpus(world), loaders.workers, loaders.train, world)
    account = Account(share.batch, Progress(run) if world.main else None, verdict)
    callbacks: list[pl.Callback] = [account]
    if recipe.ema is not None:
        callbacks.append(Average(recipe.ema, recipe.ema_every, steps * recipe.warmup_epochs))

    if start and world.main:
        print(f"going on from step {start.step}", flush=True)

    with quiet(), Asked() as asked:
        every = 60 * config.train.checkpoint_every_minutes
        boundary = Boundary(checkpoints, asked, every, identity, loaders.names, world.main)
        callbacks.append(boundary)
        callbacks.append(verdict)  # last: all that the others do is no waiting for data
        trainer = _trainer(config, run, world, place, start, look_every, callbacks)
        path = start.path if start else None
        try:
            trainer.fit(module, datamodule=loaders, ckpt_path=path, weights_only=True)
            if "val_top1" not in trainer.callback_metrics:  # it was finished before
                trainer.loggers = []  # who know it
                trainer.validate(module, datamodule=loaders, verbose=False)
            skipped = len(loaders.skipped())
        except (RuntimeError, MemoryError) as error:
            if boundary.out_of_memory or environment.out_of_memory(error, place):
                raise UserError(_too_much(share, trainer.global_step, place)) from None
            if missing := _no_deterministic(error):
                raise UserError(missing) from None
            if world.size > 1 and (gone := environment.lost(error)):
                raise Lost(gone) from error
            raise
    counted = module.tally.compute()["counts"]
    if world.main:
        write_classes(run.folder / "val_classes.csv", store.manifest.classes, counted)
    if dist.is_initialized():
        dist.destroy_process_group()
    metrics = trainer.callback_metrics
    return {
        "top1": float(metrics["val_top1"]),
        "top5": float(metrics["val_top5"]),
        "loss": float(metrics["val_loss"]),
        "images_per_second": account.images_per_second,
        "skipped": skipped,
        "epochs": recipe.epochs,
        "seconds": time.monotonic() - began,
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def backbone(config: Config, classes: int, fresh: bool) -> nn.Module:
    """Return the backbone as the recipe wants it; `fresh` if no checkpoint follows that has its weights."""
    torch.manual_seed(config.seed)
    options, recipe = config.model, config.recipe
    network = model.build(
        options.name,
        classes,
        stem=options.stem,
        size=recipe.size,
        val_size=recipe.val_size,
        start_size=recipe.start_size,
        options={**weights.options(options.name, options.weights), **options.options},
    )
    if recipe.blurpool and not blur_before_halving(network):
        raise UserError(f"recipe.blurpool=true: {options.name} has no convolution that it would change")
    set_norm_momentum(network, recipe.norm_momentum)
    fits = weights.load(network, options.name, options.weights) if options.weights and fresh else True
    if not fits:
        print(f"model.weights={options.weights}: of other classes, so the classifier begins anew", flush=True)
    if recipe.freeze:
        weights.freeze(network)
    return network


def _too_much(share: Share, step: int, place: torch.device) -> str:
    """Say that the memory of the device is too small, and what would need about half of it."""
    each = share.batch // share.size
    smaller = [parts for parts in range(2 * share.accumulate, each + 1) if each % parts == 0]
    mend = f"train.accumulate={smaller[0]} takes {each // smaller[0]}" if smaller else "take a smaller model"
    device = torch.cuda.get_device_name(place) if place.type == "cuda" else "this machine"
    return (
        f"out of memory at step {step + 1}: {share.images} images at a time are too many for {device}: {mend}"
        + (" at a time, of the same global batch" if smaller else "")
    )


def _no_deterministic(error: BaseException) -> str:
    """Return in one line that torch has no deterministic algorithm for a layer; empty for other errors."""
    operation, words, _ = str(error).partition(" does not have a deterministic implementation")
    if not words:
        return ""
    return (
        f"train.deterministic=true: torch has no deterministic {operation} on this device: "
        "set train.deterministic=false or take another model"
    )


def _split(store: Store, name: str, classes: int) -> Split:
    split = store.split(name)
    highest = int(split.index["label"].max())
    if highest >= classes:
        raise UserError(f"{store.folder}: {name} has the label {highest}, but there are {classes} classes")
    return split


def _trainer(
    config: Config,
    run: Run,
    world: World,
    place: torch.device,
    start: Checkpoint | None,
    log_every: int,
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    step = start.step if start else 0
    precision = environment.precision(config.recipe.precision, place)
    if world.main:
        print(environment.describe(place, precision, world, cpus(world)), flush=True)
        if advice := environment.emulated(precision, place):
            print(f"warning: {advice}", flush=True)
    arguments = environment.placement(world, place, config.train.accumulate, precision)
    check = run.fence.check if run.fence else lambda: None
    arguments["plugins"].append(Writer(check))
    trainer = pl.Trainer(
        **arguments,
        precision=precision,
        max_epochs=config.recipe.epochs,
        accumulate_grad_batches=config.train.accumulate,
        logger=[
            Table(run.folder, step, check),
            TensorBoardLogger(run.folder, name="", version="tensorboard", purge_step=step),
        ],
        callbacks=callbacks,
        log_every_n_steps=log_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # ours know the world
        **environment.algorithms(place, config.train.deterministic),
        enable_checkpointing=False,  # Boundary saves
        enable_progress_bar=False,  # Account tells
        enable_model_summary=False,
    )
    # Signals have one owner, `Asked`. Lightning's would run collectives inside a handler, and broadcast a
    # flag at every step.
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None
    return trainer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's banners and its advice, which does not apply here, out of the log."""
    loggers = [
        logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for advice in (
                ".*does not have many workers.*",  # as many as there are CPUs
                ".*dataloader is not resumable.*",  # the sampler is
                ".*`srun` command is available.*",  # the world is known
                ".*LeafSpec.*is deprecated.*",  # torch to Lightning
                ".*in eval mode at the start of training.*",  # by recipe.freeze
                ".*recommended to use .*sync_dist=True.*",  # the tally has added up all ranks
            ):
                warnings.filterwarnings("ignore", message=advice)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
