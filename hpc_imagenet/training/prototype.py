"""Short training in a notebook: batches, network and steps of a real run, without a run folder."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus
from hpc_imagenet.config.schema import Config
from hpc_imagenet.training import distributed
from hpc_imagenet.training.fit import quiet_lightning
from hpc_imagenet.training.loading.batch_loader import BatchLoader
from hpc_imagenet.training.loading.datamodule import ImageDataModule
from hpc_imagenet.training.loading.decode import Pixels
from hpc_imagenet.training.loading.image_store import ImageStore, Labels
from hpc_imagenet.training.loading.sampler import batch_share, steps_per_epoch
from hpc_imagenet.training.models.networks import build_network
from hpc_imagenet.training.models.preprocessing import preprocessing
from hpc_imagenet.training.module import Classifier

_VAL_BATCHES = 20
_SHEET_WIDTH = 640  # px
_CPU = torch.device("cpu")


class Prototype:
    """Training of `config` in this process, on its first GPU or else on its CPUs.

    Attributes:
        config: composed config.
        store: its datastore, whose copies are made as long as it exists.
        device: device of the batches and the network.
        module: network with its loss and optimizer; `module.model` is the network alone.
        loaders: train and val batches.

    Raises:
        UserError: the global batch is not divisible by `train.accumulate` or larger than train, or the model
            cannot be built.
    """

    def __init__(self, config: Config, store: ImageStore) -> None:
        dist_env, class_ids = DistEnv(), list(store.ids)
        classes = len(class_ids)
        self.config, self.store = config, store
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else _CPU
        torch.set_num_threads(available_cpus(dist_env))
        share, train = batch_share(config, dist_env), store.reader.open_split("train")
        steps = steps_per_epoch(len(train), share.batch)
        network = build_network(config, classes, fresh=True, class_ids=class_ids)
        images = preprocessing(config)
        self.module = Classifier(
            network,
            classes,
            config.recipe,
            config.seed,
            steps * config.recipe.epochs,
            share,
            mean=images.mean,
            std=images.std,
        )
        self.module.ema_model = None  # EMA needs longer than a prototype trains
        self.loaders = ImageDataModule(
            config, train, store.reader.open_split("val"), share, dist_env, self.device
        )
        self._share = share

    def loader(self) -> BatchLoader:
        """Return the batches of the first epoch: uint8 [images, 3, size, size] and int64 [images]."""
        batches = self.loaders.train
        return BatchLoader(batches, self.loaders.train_sampler(), self.loaders.workers, self.device)

    def batch(self) -> tuple[Pixels, Labels]:
        """Return the first batch: pixels uint8 [images, size, size, 3], RGB, and labels [images]."""
        pixels, labels = next(iter(self.loader()))
        return pixels.permute(0, 2, 3, 1).cpu().numpy(), labels.cpu().numpy()

    def sheet(self, images: int = 32, columns: int = 8) -> Image.Image:
        """Return the first `images` of the first batch side by side, for display."""
        pixels = self.batch()[0][:images]
        count, side = len(pixels), pixels.shape[1] + 1  # px, with a white line between images
        sheet = np.full((-(-count // columns) * side, min(columns, count) * side, 3), 255, np.uint8)
        for i, image in enumerate(pixels):
            top, left = i // columns * side, i % columns * side
            sheet[top : top + side - 1, left : left + side - 1] = image
        scale = max(1, _SHEET_WIDTH // sheet.shape[1])
        return Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1))

    def speed(self, seconds: float = 10) -> float:
        """Return the images/s of the loader alone, measured for about `seconds` or one epoch."""
        batches = iter(self.loader())
        next(batches)  # starts the threads and fills the caches
        images, began = 0, time.monotonic()
        for pixels, _ in batches:
            images += len(pixels)
            if time.monotonic() - began > seconds:
                break
        return images / (time.monotonic() - began)

    def train(self, minutes: float = 1) -> dict[str, Any]:
        """Train for `minutes` from the first batch; only the start of the schedule is reached.

        Returns:
            losses, one per device batch; images_per_second; top1, top5 (0 to 1) and loss on 20 val batches.
        """
        history, settings = _LossHistory(), self.config.train
        precision = distributed.precision(self.config.recipe.precision, self.device)
        with quiet_lightning():
            trainer = pl.Trainer(
                **distributed.trainer_arguments(
                    DistEnv(), self.device, precision, settings.deterministic, settings.accumulate
                ),
                max_epochs=self.config.recipe.epochs,
                max_time=timedelta(minutes=minutes),
                callbacks=[history],
                limit_val_batches=_VAL_BATCHES,
                check_val_every_n_epoch=self.config.recipe.epochs,
                logger=False,
            )
            trainer.fit(self.module, datamodule=self.loaders)
            (metrics,) = trainer.validate(self.module, datamodule=self.loaders, verbose=False)
        losses = [float(loss) for loss in history.losses]
        images = self._share.images * max(0, len(losses) - 1)
        return {
            "losses": losses,
            "images_per_second": images / max(history.last - history.first, 1e-9),
            **{name.removeprefix("val_"): value for name, value in metrics.items()},
        }


class _LossHistory(pl.Callback):
    """Records the loss of every device batch, and when the first and the last of them ended (s)."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []  # on the device, to avoid a synchronization
        self.first = self.last = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.losses.append(trainer.callback_metrics["train_loss"])  # logged at every step
        self.last = time.monotonic()
        self.first = self.first or self.last
