"""Training of one run: build the network, resume from the last checkpoint, train, and return the metrics."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_only

from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus
from hpc_imagenet.config.names.backbones import is_own
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.errors import PeerLost, UserError
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.runs.store import Progress, Run
from hpc_imagenet.training import distributed
from hpc_imagenet.training.callbacks.bottleneck import BottleneckMonitor
from hpc_imagenet.training.callbacks.checkpoint import AtomicCheckpointIO, CheckpointCallback
from hpc_imagenet.training.callbacks.checkpoint_file import (
    Checkpoint,
    KeptCheckpoints,
    identity_differences,
    newest_checkpoint,
    remove_leftovers,
)
from hpc_imagenet.training.callbacks.epoch_times import PassLimit, epoch_times
from hpc_imagenet.training.callbacks.learning_check import LearningCheck
from hpc_imagenet.training.callbacks.progress import ProgressReporter
from hpc_imagenet.training.callbacks.trial_pruning import TrialPruning
from hpc_imagenet.training.confusion import write_confused_classes
from hpc_imagenet.training.loading.datamodule import ImageDataModule
from hpc_imagenet.training.loading.sampler import BatchShare, batch_share, steps_per_epoch
from hpc_imagenet.training.metrics import CsvLogger, write_class_accuracies
from hpc_imagenet.training.models.ema import EMACallback
from hpc_imagenet.training.models.networks import build_network
from hpc_imagenet.training.models.preprocessing import preprocessing
from hpc_imagenet.training.module import Classifier
from hpc_imagenet.training.trackers import training_loggers

LOG_EVERY = 50  # steps


def fit(
    config: Config, store: DatasetReader, run: Run, dist_env: DistEnv, limit: PassLimit | None = None
) -> dict[str, Any]:
    """Train the config's backbone on `store`, from the last checkpoint if one exists; every task calls this.

    Args:
        config: config of the run.
        store: its dataset.
        run: the run, whose folder is written.
        dist_env: rank and size of this task.
        limit: how much of each epoch is trained, to time it; None: all.

    Returns:
        top1 and top5 (0 to 1) and loss (mean cross-entropy) on val; images_per_second of training over all
        ranks; skipped (number of unreadable images); epochs that were trained; best_top1 and best_epoch of
        best.ckpt; seconds of all starts, without work that was lost (None if unknown); parameters (number);
        learned (whether top1 is above chance), with advice if not.

    Raises:
        UserError: bad input.
        Preempted: a stop signal arrived; a checkpoint is saved.
        PeerLost: another task of the job has ended.
        Superseded: a later start of this job holds the run's lease.
    """
    began = time.monotonic()
    recipe, checkpoints = config.recipe, run.folder / "checkpoints"
    device, share = distributed.device(config, dist_env), batch_share(config, dist_env)
    torch.set_num_threads(available_cpus(dist_env))
    rank_zero: Any = rank_zero_only
    rank_zero.rank = dist_env.rank  # Lightning would read it from variables that an outer job may have set

    classes = len(store.manifest.classes)
    train, val = _split(store, "train", classes), _split(store, "val", classes)
    steps = steps_per_epoch(len(train), share.batch)

    checkpoint = newest_checkpoint(checkpoints)
    identity = {
        **config.training_identity(),
        "data": store.manifest.content,
        "code": (run.attempt.submitted.get("code") or {}) if run.attempt else {},
    }
    if checkpoint and (differences := identity_differences(checkpoint.identity, identity)):
        more = f" (and {len(differences) - 1} more)" if differences[1:] else ""
        raise UserError(
            f"{checkpoint.path} belongs to another training: {differences[0]}{more}:"
            " move its folder away to train from the start, or restore the settings"
        )

    class_ids = [each.wnid for each in store.manifest.classes]
    network = build_network(config, classes, fresh=checkpoint is None, class_ids=class_ids)
    log_every = min(LOG_EVERY, steps)
    images = preprocessing(config)
    if dist_env.is_rank_zero:
        print(f"images: {images}", flush=True)
    module = Classifier(
        network,
        classes,
        recipe,
        config.seed,
        steps * recipe.epochs,
        share,
        log_every,
        images.mean,
        images.std,
    )
    if recipe.keep_optimizer and checkpoint is None and config.model.weights:
        module.optimizer_state = Path(config.model.weights)
    if config.model.compile:
        module.compile_networks(available_cpus(dist_env))
    datamodule = ImageDataModule(config, train, val, share, dist_env, device)
    bottleneck = BottleneckMonitor(
        config,
        run.folder / "bottleneck.json",
        available_cpus(dist_env),
        datamodule.workers,
        datamodule.train,
        dist_env,
    )
    learning = LearningCheck(recipe)
    progress = Progress(run) if dist_env.is_rank_zero else None
    reporter = ProgressReporter(began, share.batch, progress, bottleneck, learning)
    callbacks: list[pl.Callback] = [learning, reporter]
    if recipe.ema is not None:
        callbacks.append(EMACallback(recipe.ema, recipe.ema_every, steps * recipe.warmup_epochs))

    check_lease = run.lease.check if run.lease else lambda: None
    kept = KeptCheckpoints(checkpoints, identity, config.train.keep_checkpoints or 0, check_lease)
    if dist_env.is_rank_zero:
        check_lease()
        remove_leftovers(checkpoints)
    if checkpoint and dist_env.is_rank_zero:
        print(f"resuming from step {checkpoint.step}", flush=True)
        kept.keep(checkpoint.path, checkpoint.metrics)  # the process may have been killed just before that

    with quiet_lightning(), StopSignal() as stop_signal:
        interval = 60 * config.train.checkpoint_every_minutes
        content = {
            "identity": identity,
            "config": asdict(config),
            "classes": [(each.wnid, list(each.names)) for each in store.manifest.classes],
        }
        saver = CheckpointCallback(
            checkpoints, stop_signal, interval, content, kept, datamodule.images, dist_env.is_rank_zero
        )
        pruning = TrialPruning(run.judge) if run.judge else None
        # A report before the checkpoint: after a kill in between, the epoch is trained and reported again.
        callbacks += [pruning, saver] if pruning else [saver]
        callbacks.append(bottleneck)  # last, so that time spent in other callbacks is not measured as waiting
        times = epoch_times(config, store.manifest, run, dist_env, device, limit)
        callbacks.append(times)
        trainer = _trainer(config, run, dist_env, device, checkpoint, log_every, callbacks)
        path = checkpoint.path if checkpoint else None
        try:
            distributed.join_ranks(run, dist_env, device)
            trainer.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True)
            if "val_top1" not in trainer.callback_metrics:  # an earlier attempt finished the training
                trainer.loggers = []  # and logged its last validation
                trainer.validate(module, datamodule=datamodule, verbose=False)
            datamodule.close()
            skipped = len(datamodule.skipped())
        except (RuntimeError, MemoryError) as error:
            if saver.out_of_memory or distributed.out_of_memory(error, device):
                joining = distributed.joining_memory_error(dist_env, device)
                message = joining or _out_of_memory_message(share, trainer.global_step, device)
                raise UserError(message) from None
            if message := _nondeterministic_message(error):
                raise UserError(message) from None
            if message := distributed.nccl_setup_error(error):
                raise UserError(message) from None
            if dist_env.size > 1 and (message := distributed.peer_failure(error)):
                raise PeerLost(message) from error
            raise
    counts, confusion = module.val_metrics.compute()["counts"], module.confusion.total()
    if dist_env.is_rank_zero:
        write_class_accuracies(run.folder / "val_classes.csv", store.manifest.classes, counts)
        if confusion is not None:
            write_confused_classes(run.folder / "val_confusion.csv", confusion)
    times.finish()
    if dist.is_initialized():
        dist.destroy_process_group()
    metrics = trainer.callback_metrics
    return {
        "top1": float(metrics["val_top1"]),
        "top5": float(metrics["val_top5"]),
        "loss": float(metrics["val_loss"]),
        "images_per_second": reporter.images_per_second,
        "skipped": skipped,
        "epochs": pruning.stopped if pruning and pruning.stopped else recipe.epochs,
        "best_top1": kept.best.get("top1"),
        "best_epoch": kept.best.get("epoch"),
        "seconds": reporter.seconds,
        "parameters": sum(p.numel() for p in network.parameters()),
        **learning.result(metrics, counts),
    }


def _out_of_memory_message(share: BatchShare, step: int, device: torch.device) -> str:
    """Return the error line with the `train.accumulate` that needs about half of the memory."""
    rank_batch = share.batch // share.size
    larger = [parts for parts in range(2 * share.accumulate, rank_batch + 1) if rank_batch % parts == 0]
    fix = (
        f"train.accumulate={larger[0]} takes {rank_batch // larger[0]} at a time, of the same global batch"
        if larger
        else "take a smaller model"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
    return f"out of memory at step {step + 1}: {share.images} images at a time are too many for {name}: {fix}"


def _nondeterministic_message(error: BaseException) -> str:
    """Return an error line if torch has no deterministic algorithm for a layer; empty for other errors."""
    operation, separator, _ = str(error).partition(" does not have a deterministic implementation")
    if not separator:
        return ""
    return (
        f"train.deterministic=true: torch has no deterministic {operation} on this device: "
        "set train.deterministic=false or take another model"
    )


def _split(store: DatasetReader, name: str, classes: int) -> SplitReader:
    """Open a split and check its labels."""
    split = store.open_split(name)
    highest = int(split.index["label"].max())
    if highest >= classes:
        raise UserError(
            f"{store.folder}: split {name} has the label {highest}, but there are {classes} classes"
        )
    return split


def _trainer(
    config: Config,
    run: Run,
    dist_env: DistEnv,
    device: torch.device,
    checkpoint: Checkpoint | None,
    log_every: int,
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    step = checkpoint.step if checkpoint else 0
    precision = distributed.precision(config.recipe.precision, device)
    if dist_env.is_rank_zero:
        print(distributed.describe_device(device, precision, dist_env, available_cpus(dist_env)), flush=True)
        if advice := distributed.bf16_emulation_warning(precision, device):
            print(f"warning: {advice}", flush=True)
    arguments = distributed.trainer_arguments(
        dist_env,
        device,
        precision,
        config.train.deterministic,
        config.train.accumulate,
        own=is_own(config.model.name),
    )
    check_lease = run.lease.check if run.lease else lambda: None
    arguments["plugins"].append(AtomicCheckpointIO(check_lease))
    trainer = pl.Trainer(
        **arguments,
        max_epochs=config.recipe.epochs,
        logger=[
            CsvLogger(run.folder, step, check_lease),
            *training_loggers(config, run, step, check_lease),
        ],
        callbacks=callbacks,
        log_every_n_steps=log_every,
    )
    # Only `StopSignal` handles signals. Lightning would run collectives inside a handler and broadcast a flag
    # at every step.
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None
    return trainer


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Suppress Lightning's banners and those of its warnings that do not apply here."""
    loggers = [
        logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",  # our loader uses threads, not worker processes
                ".*dataloader is not resumable.*",  # our sampler resumes
                ".*`srun` command is available.*",  # ranks come from DistEnv
                ".*LeafSpec.*is deprecated.*",  # a torch deprecation inside Lightning
                ".*in eval mode at the start of training.*",  # intended with recipe.freeze
                ".*recommended to use .*sync_dist=True.*",  # ClassificationMetrics already sums over ranks
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
