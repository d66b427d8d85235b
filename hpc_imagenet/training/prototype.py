"""A training by hand, for a notebook: the sweep's own batches, network and steps, without its record."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch

from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.launch.dist_env import DistEnv, available_cpus
from hpc_imagenet.training import distributed
from hpc_imagenet.training.fit import backbone, quiet
from hpc_imagenet.training.loading.batch_loader import BatchLoader
from hpc_imagenet.training.loading.datamodule import ImageDataModule
from hpc_imagenet.training.loading.sampler import TrainSampler
from hpc_imagenet.training.module import Classifier

_JUDGED = 20  # batches of val


class Prototype:
    """What a training of `config` would do, in this process, on its first GPU or else on its CPUs.

    Attributes:
        config: composed, as a run is frozen.
        device: where batches and network are.
        module: the network with its loss and optimizer; `module.model` is torchvision's.

    Raises:
        UserError: the batch does not come out even, or the model cannot be built so.
    """

    def __init__(self, config: Config, store: DatasetReader) -> None:
        dist_env, classes = DistEnv(), len(store.manifest.classes)
        self.config, self.device = config, torch.device("cuda", 0) if torch.cuda.is_available() else _CPU
        torch.set_num_threads(available_cpus(dist_env))
        share, train = distributed.batch_share(config, dist_env), store.open_split("train")
        steps = max(1, len(train) // share.batch)
        network = backbone(config, classes, fresh=True)
        self.module = Classifier(
            network, classes, config.recipe, config.seed, steps * config.recipe.epochs, share
        )
        self.module.average = None  # in so short a time it would be worth nothing
        self.loaders = ImageDataModule(config, train, store.open_split("val"), share, dist_env, self.device)
        self._share = share

    def loader(self) -> BatchLoader:
        """Return the batches of the first epoch: uint8 [images, 3, size, size] and int64 [images]."""
        batches = self.loaders.train
        sampler = TrainSampler(len(batches.split), self.config.seed, self._share)
        return BatchLoader(batches, sampler, self.loaders.workers, self.device)

    def speed(self, seconds: float = 10) -> float:
        """Return how many images a second the loader makes, over about so many seconds or one epoch."""
        batches = iter(self.loader())
        next(batches)  # threads and caches are there from here on
        images, began = 0, time.monotonic()
        for pixels, _ in batches:
            images += len(pixels)
            if time.monotonic() - began > seconds:
                break
        return images / (time.monotonic() - began)

    def train(self, minutes: float = 1) -> dict[str, Any]:
        """Train for so long from the first batch on, as the recipe says; it comes to its first steps only.

        Returns:
            losses, one a device batch; images_per_second; on some batches of val top1, top5 (0 to 1), loss.
        """
        seen = _LossHistory()
        precision = distributed.precision(self.config.recipe.precision, self.device)
        accumulate = self.config.train.accumulate
        with quiet():
            trainer = pl.Trainer(
                **distributed.trainer_arguments(DistEnv(), self.device, accumulate, precision),
                precision=precision,
                max_epochs=self.config.recipe.epochs,
                max_time=timedelta(minutes=minutes),
                accumulate_grad_batches=accumulate,
                callbacks=[seen],
                limit_val_batches=_JUDGED,
                check_val_every_n_epoch=self.config.recipe.epochs,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **distributed.algorithm_arguments(self.device, self.config.train.deterministic),
            )
            trainer.fit(self.module, datamodule=self.loaders)
            (judged,) = trainer.validate(self.module, datamodule=self.loaders, verbose=False)
        losses = [float(loss) for loss in seen.losses]
        images = self._share.images * max(0, len(losses) - 1)
        return {
            "losses": losses,
            "images_per_second": images / max(seen.last - seen.first, 1e-9),
            **{name.removeprefix("val_"): value for name, value in judged.items()},
        }


class _LossHistory(pl.Callback):
    """Keeps the loss of every step, and when the first and the last of them ended."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []  # on the device, which nobody waits for
        self.first = self.last = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.losses.append(trainer.callback_metrics["train_loss"])  # every step's is logged
        self.last = time.monotonic()
        self.first = self.first or self.last


_CPU = torch.device("cpu")
