"""What one step does: normalise, forward, loss, metrics. Where and how often is the trainer's matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from hpc_imagenet.config import Recipe
from hpc_imagenet.training.data import Batch
from hpc_imagenet.training.recipe import optimizer, rate
from hpc_imagenet.training.sampler import PADDING

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, RGB, 0 to 1
AUXILIARY = 0.3  # weight of an auxiliary head's loss, Szegedy et al. 2014


class Classifier(pl.LightningModule):
    """A backbone, its loss and its metrics.

    Args:
        model: from [batch, 3, size, size] to [batch, classes].
        classes: at least 2.
        recipe: what decides the result.
        seed: of dropout and its like; every step draws from (seed, step, rank).
        steps: of the whole training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, classes: int, recipe: Recipe, seed: int, steps: int) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.recipe, self.seed, self.steps = recipe, seed, steps
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)
        exact: dict[str, Any] = {"average": "micro", "ignore_index": PADDING, "validate_args": False}
        self.top1 = MulticlassAccuracy(classes, top_k=1, **exact)
        self.top5 = MulticlassAccuracy(classes, top_k=min(5, classes), **exact)
        self.loss = MeanMetric()

    def forward(self, images: Tensor) -> Any:
        """Return what the backbone makes of uint8 images [batch, 3, size, size]."""
        return self.model((images - self.mean) / self.std)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout and its like a function of where we are, so that nothing of it needs saving."""
        place = [self.seed, self.trainer.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one device batch."""
        images, labels = batch
        heads = self(images)
        logits, *others = heads if isinstance(heads, tuple) else (heads,)
        loss = self._cross_entropy(logits, labels)
        for auxiliary in others:
            if auxiliary is not None:
                loss = loss + AUXILIARY * self._cross_entropy(auxiliary, labels)
        self.log("train_loss", loss.detach())
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.recipe.label_smoothing
        return F.cross_entropy(logits, labels, ignore_index=PADDING, label_smoothing=smoothing)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one device batch; padding counts nothing."""
        images, labels = batch
        logits = self(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=PADDING)
        self.loss.update(losses, (labels != PADDING).float())
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)
        for name, metric in (("top1", self.top1), ("top5", self.top5), ("loss", self.loss)):
            self.log(f"val_{name}", metric, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the recipe's optimizer, its learning rate set anew at every step."""
        chosen = optimizer(self.model, self.recipe)
        warmup = self.recipe.warmup_epochs * self.steps / self.recipe.epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: rate(step, self.steps, warmup))
        return {"optimizer": chosen, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
