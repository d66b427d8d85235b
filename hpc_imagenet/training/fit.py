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

from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.errors import PeerLost, UserError
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.launch.dist_env import DistEnv, available_cpus
from hpc_imagenet.runs.store import Progress, Run
from hpc_imagenet.training import distributed
from hpc_imagenet.training.callbacks.bottleneck import BottleneckMonitor
from hpc_imagenet.training.callbacks.checkpoint import CheckpointCallback
from hpc_imagenet.training.callbacks.checkpoint_file import (
    AtomicCheckpointIO,
    Checkpoint,
    differing,
    newest_checkpoint,
)
from hpc_imagenet.training.callbacks.progress import ProgressReporter
from hpc_imagenet.training.loading.datamodule import ImageDataModule
from hpc_imagenet.training.loading.sampler import BatchShare
from hpc_imagenet.training.metrics import CsvLogger, write_class_accuracies
from hpc_imagenet.training.models import build, pretrained
from hpc_imagenet.training.models.blurpool import blur_before_halving
from hpc_imagenet.training.models.ema import EMACallback
from hpc_imagenet.training.models.optim import set_norm_momentum
from hpc_imagenet.training.module import Classifier

LOG_EVERY = 50  # steps


def fit(config: Config, store: DatasetReader, run: Run, dist_env: DistEnv) -> dict[str, Any]:
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
    place, share = distributed.device(config, dist_env), distributed.batch_share(config, dist_env)
    torch.set_num_threads(available_cpus(dist_env))
    main: Any = rank_zero_only
    main.rank = dist_env.rank  # else Lightning guesses from variables that another job may have left

    classes = len(store.manifest.classes)
    train, val = _split(store, "train", classes), _split(store, "val", classes)
    steps = len(train) // share.batch
    if not steps:
        raise UserError(f"recipe.global_batch={share.batch} is more than the {len(train)} images of train")

    start = newest_checkpoint(checkpoints)
    identity = {
        **config.training_identity(),
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
        module.compile_networks(available_cpus(dist_env))
    loaders = ImageDataModule(config, train, val, share, dist_env, place)
    told = run.folder / "bottleneck.json"
    verdict = BottleneckMonitor(
        config, told, available_cpus(dist_env), loaders.workers, loaders.train, dist_env
    )
    account = ProgressReporter(share.batch, Progress(run) if dist_env.is_rank_zero else None, verdict)
    callbacks: list[pl.Callback] = [account]
    if recipe.ema is not None:
        callbacks.append(EMACallback(recipe.ema, recipe.ema_every, steps * recipe.warmup_epochs))

    if start and dist_env.is_rank_zero:
        print(f"going on from step {start.step}", flush=True)

    with quiet(), StopSignal() as asked:
        every = 60 * config.train.checkpoint_every_minutes
        boundary = CheckpointCallback(
            checkpoints, asked, every, identity, loaders.names, dist_env.is_rank_zero
        )
        callbacks.append(boundary)
        callbacks.append(verdict)  # last: all that the others do is no waiting for data
        trainer = _trainer(config, run, dist_env, place, start, look_every, callbacks)
        path = start.path if start else None
        try:
            trainer.fit(module, datamodule=loaders, ckpt_path=path, weights_only=True)
            if "val_top1" not in trainer.callback_metrics:  # it was already finished
                trainer.loggers = []  # who know it
                trainer.validate(module, datamodule=loaders, verbose=False)
            skipped = len(loaders.skipped())
        except (RuntimeError, MemoryError) as error:
            if boundary.out_of_memory or distributed.out_of_memory(error, place):
                raise UserError(_too_much(share, trainer.global_step, place)) from None
            if missing := _no_deterministic(error):
                raise UserError(missing) from None
            if dist_env.size > 1 and (gone := distributed.peer_failure(error)):
                raise PeerLost(gone) from error
            raise
    counted = module.tally.compute()["counts"]
    if dist_env.is_rank_zero:
        write_class_accuracies(run.folder / "val_classes.csv", store.manifest.classes, counted)
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
    network = build.build_model(
        options.name,
        classes,
        stem=options.stem,
        size=recipe.size,
        val_size=recipe.val_size,
        start_size=recipe.start_size,
        options={**pretrained.constructor_options(options.name, options.weights), **options.options},
    )
    if recipe.blurpool and not blur_before_halving(network):
        raise UserError(f"recipe.blurpool=true: {options.name} has no convolution that it would change")
    set_norm_momentum(network, recipe.norm_momentum)
    fits = (
        pretrained.load_weights(network, options.name, options.weights) if options.weights and fresh else True
    )
    if not fits:
        print(f"model.weights={options.weights}: of other classes, so the classifier begins anew", flush=True)
    if recipe.freeze:
        pretrained.freeze_backbone(network)
    return network


def _too_much(share: BatchShare, step: int, place: torch.device) -> str:
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


def _split(store: DatasetReader, name: str, classes: int) -> SplitReader:
    split = store.open_split(name)
    highest = int(split.index["label"].max())
    if highest >= classes:
        raise UserError(f"{store.folder}: {name} has the label {highest}, but there are {classes} classes")
    return split


def _trainer(
    config: Config,
    run: Run,
    dist_env: DistEnv,
    place: torch.device,
    start: Checkpoint | None,
    log_every: int,
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    step = start.step if start else 0
    precision = distributed.precision(config.recipe.precision, place)
    if dist_env.is_rank_zero:
        print(distributed.describe_device(place, precision, dist_env, available_cpus(dist_env)), flush=True)
        if advice := distributed.emulated(precision, place):
            print(f"warning: {advice}", flush=True)
    arguments = distributed.trainer_arguments(dist_env, place, config.train.accumulate, precision)
    check = run.lease.check if run.lease else lambda: None
    arguments["plugins"].append(AtomicCheckpointIO(check))
    trainer = pl.Trainer(
        **arguments,
        precision=precision,
        max_epochs=config.recipe.epochs,
        accumulate_grad_batches=config.train.accumulate,
        logger=[
            CsvLogger(run.folder, step, check),
            TensorBoardLogger(run.folder, name="", version="tensorboard", purge_step=step),
        ],
        callbacks=callbacks,
        log_every_n_steps=log_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # ours know the world
        **distributed.algorithm_arguments(place, config.train.deterministic),
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
