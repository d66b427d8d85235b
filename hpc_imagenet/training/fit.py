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

from hpc_imagenet.config import Config
from hpc_imagenet.datastore.store import Split, Store
from hpc_imagenet.errors import Lost, UserError
from hpc_imagenet.runs import Progress, Run
from hpc_imagenet.training import data, environment, model
from hpc_imagenet.training.account import Account
from hpc_imagenet.training.boundary import Boundary
from hpc_imagenet.training.checkpoint import Checkpoint, Writer, newest
from hpc_imagenet.training.metrics import Table
from hpc_imagenet.training.module import Classifier
from hpc_imagenet.training.preemption import Asked
from hpc_imagenet.training.recipe import set_norm_momentum
from hpc_imagenet.training.sampler import Share, TrainSampler, ValSampler
from hpc_imagenet.training.transforms import TrainView, ValView
from hpc_imagenet.world import World, own_cpus

LOG_EVERY = 50  # steps


class Data(pl.LightningDataModule):
    """The loaders of one rank. The training one begins at the trainer's step, which a checkpoint has set."""

    def __init__(
        self, config: Config, train: Split, val: Split, share: Share, world: World, place: torch.device
    ) -> None:
        super().__init__()
        recipe = config.recipe
        self.seed, self.share, self.world, self.place = config.seed, share, world, place
        asked = config.loader.workers
        self.workers = data.cpus(world) - 1 if asked is None else asked
        options = config.seed, config.loader.on_corrupt == "skip", config.loader.decode == "gpu"
        self.train = data.Batches(train, TrainView(recipe.size, recipe.crop_scale, recipe.flip), *options)
        self.val = data.Batches(val, ValView(recipe.val_size, recipe.val_resize), *options)

    def train_dataloader(self) -> Any:
        """Return the batches from here on."""
        sampler = TrainSampler(len(self.train.split), self.seed, self.share)
        assert self.trainer is not None
        sampler.epoch, sampler.start = divmod(self.trainer.global_step, sampler.steps)
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> Any:
        """Return every image of the val split once over all ranks."""
        share = self.share
        sampler = ValSampler(len(self.val.split), share.images, share.rank, share.size)
        return self._loader(self.val, sampler)

    def _loader(self, batches: data.Batches, sampler: Any) -> data.Loader:
        bound = own_cpus(self.world)
        return data.Loader(batches, sampler, self.workers, self.place, bound)

    def skipped(self) -> int:
        """Return how many images of both splits this attempt could not read, over all ranks."""
        names = self.train.skipped | self.val.skipped
        if dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, names)
            names = set().union(*gathered)
        return len(names)


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
    torch.set_num_threads(data.cpus(world))
    main: Any = rank_zero_only
    main.rank = world.rank  # else Lightning guesses from variables that another job may have left

    classes = len(store.manifest.classes)
    train, val = _split(store, "train", classes), _split(store, "val", classes)
    steps = len(train) // share.batch
    if not steps:
        raise UserError(f"recipe.global_batch={share.batch} is more than the {len(train)} images of train")

    torch.manual_seed(config.seed)
    options = config.model
    network = model.build(
        options.name,
        classes,
        stem=options.stem,
        size=recipe.size,
        val_size=recipe.val_size,
        options=options.options,
    )
    set_norm_momentum(network, recipe.norm_momentum)
    module = Classifier(network, classes, recipe, config.seed, steps * recipe.epochs)
    loaders = Data(config, train, val, share, world, place)
    account = Account(share.batch, Progress(run) if world.main else None)
    start = newest(checkpoints)
    if start and start.accumulate != share.accumulate:
        raise UserError(
            f"train.accumulate={share.accumulate}, but {start.path} was written with {start.accumulate}: "
            "finish the run with that"
        )

    if start and world.main:
        print(f"going on from step {start.step}", flush=True)

    with _quiet(), Asked() as asked:
        boundary = Boundary(checkpoints, asked, 60 * config.train.checkpoint_every_minutes)
        trainer = _trainer(config, run, world, place, start, min(LOG_EVERY, steps), [account, boundary])
        path = start.path if start else None
        try:
            trainer.fit(module, datamodule=loaders, ckpt_path=path, weights_only=True)
            if "val_top1" not in trainer.callback_metrics:  # it was finished before
                trainer.loggers = []  # who know it
                trainer.validate(module, datamodule=loaders, verbose=False)
        except RuntimeError as error:
            if world.size > 1 and (gone := environment.lost(error)):
                raise Lost(gone) from error
            raise
    skipped = loaders.skipped()
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
    arguments = environment.placement(world, place)
    check = run.fence.check if run.fence else lambda: None
    arguments["plugins"].append(Writer(check))
    precision: Any = config.recipe.precision
    if precision == "auto":
        precision = "bf16-mixed" if place.type == "cuda" else "32-true"
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
        benchmark=place.type == "cuda",
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
def _quiet() -> Iterator[None]:
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
            ):
                warnings.filterwarnings("ignore", message=advice)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
