"""Lightning module of a training: augmentation, normalization, forward pass, loss, validation, optimizer."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.training.augment.batch_augment import BatchAugment
from hpc_imagenet.training.confusion import ConfusionCounts
from hpc_imagenet.training.loading.batch_loader import Batch
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare
from hpc_imagenet.training.metrics import ClassificationMetrics
from hpc_imagenet.training.models.ema import ema_copy
from hpc_imagenet.training.models.optim import build_optimizer, load_optimizer_state, lr_factor
from hpc_imagenet.training.models.preprocessing import MEAN, STD

AUXILIARY_WEIGHT = 0.3  # of the loss of an auxiliary head, Szegedy et al. 2014


class Classifier(pl.LightningModule):
    """A backbone with its loss, metrics and optimizer.

    Args:
        model: network from [batch, 3, size, size] to [batch, classes].
        classes: number of classes, at least 2.
        recipe: hyper-parameters.
        seed: seed of dropout and other random layers; each step seeds from (seed, step, device batch, rank).
        steps: number of steps of the whole training.
        share: this rank's share of a global batch.
        log_every: steps between two logs of loss and learning rate; each may synchronize with the GPU.
        mean: of red, green and blue, 0 to 1, by which images are normalized.
        std: standard deviation of red, green and blue, 0 to 1.

    Attributes:
        ema_model: copy of the network with EMA weights, which validation then uses; None without EMA.
        val_metrics: metrics of the current or last validation.
        confusion: its pairs of label and predicted class.
        optimizer_state: checkpoint whose optimizer's state this training begins with; None: an empty state.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        recipe: Recipe,
        seed: int,
        steps: int,
        share: BatchShare,
        log_every: int = 1,
        mean: tuple[float, float, float] = MEAN,
        std: tuple[float, float, float] = STD,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema_model = ema_copy(self.model) if recipe.ema is not None else None
        self.recipe, self.seed, self.steps, self.log_every = recipe, seed, steps, log_every
        self.accumulate = share.accumulate
        self.optimizer_state: Path | None = None
        self.batch_augment = BatchAugment(recipe, classes, seed, share)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)
        self.val_metrics = ClassificationMetrics(classes)
        self.confusion = ConfusionCounts(classes)
        self.train()

    def compile_networks(self, threads: int) -> None:
        """Compile the forward passes with torch.compile, each at its first call; weight names do not change.

        Random layers draw the same numbers as without compilation; rounding may differ.

        Args:
            threads: number of compiler processes; by default torch starts one per core of the machine, up to
                32, in every task.
        """
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))  # read when inductor is imported
        from torch._dynamo import config as dynamo  # slow import
        from torch._inductor import config as inductor

        inductor.fallback_random = True
        # Each image size is compiled separately, up to this limit: the training sizes, and the validation
        # size for the network and its EMA copy.
        dynamo.recompile_limit = max(dynamo.recompile_limit, len(set(self.recipe.sizes)) + 4)
        for network in (self.model, self.ema_model):
            if network is not None:
                network.compile(dynamic=False)

    def train(self, mode: bool = True) -> Classifier:
        """Set the training mode; with recipe.freeze the backbone stays in evaluation mode.

        Otherwise the frozen norms would update their statistics, and dropout would drop the frozen features.
        """
        super().train(mode)
        if self.recipe.freeze:
            self.model.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images as float, normalized by mean and standard deviation."""
        return (images - self.mean) / self.std

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed random layers from the position in the training, so that a checkpoint needs no RNG state."""
        position = [self.seed, self.trainer.global_step, batch_idx % self.accumulate, self.global_rank]
        seed = int(np.random.SeedSequence(position).generate_state(1)[0])
        # torch.manual_seed formats a traceback for every absent kind of device: 0.7 ms.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one device batch."""
        images, labels = batch
        step = self.trainer.global_step
        images = self.normalize(self.batch_augment.augment_pixels(images, step, batch_idx % self.accumulate))
        images, labels = self.batch_augment.augment_normalized(
            images, labels, step, batch_idx % self.accumulate
        )
        outputs = self.model(images)
        logits, *auxiliaries = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self._cross_entropy(logits, labels)
        for auxiliary in auxiliaries:
            if auxiliary is not None:
                loss = loss + AUXILIARY_WEIGHT * self._cross_entropy(auxiliary, labels)
        if (step + 1) % self.log_every == 0:
            self.log("train_loss", loss.detach())
            self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over valid images: skipped ones, also within a mix, have no weight.

        It is computed in float32: autocast keeps cross-entropy in the dtype of the logits, and bf16 would
        round the log-softmax.
        """
        logits = logits.float()
        if labels.ndim == 1:
            weights = (labels != PADDING).float()
        else:
            weights = labels.sum(1)
            labels = labels / weights.clamp(min=1e-6)[:, None]
        smoothing = self.recipe.label_smoothing
        losses = F.cross_entropy(
            logits, labels, reduction="none", ignore_index=PADDING, label_smoothing=smoothing
        )
        return (losses * weights).sum() / weights.sum().clamp(min=1)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics, and copy the batch norm statistics of rank 0 to all ranks."""
        self.val_metrics.reset()
        self.confusion.reset()
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one device batch to the metrics; padding is ignored."""
        images, labels = batch
        network = self.model if self.ema_model is None else self.ema_model
        images = self.normalize(images)
        logits = network(images).float()
        if self.recipe.val_flip:
            logits = (logits + network(images.flip(-1)).float()) / 2
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=PADDING)
        # Sorted once: of equal logits, which bf16 often gives, other functions take another class.
        best = logits.topk(min(5, logits.shape[1])).indices
        self.val_metrics.update(best, labels, losses)
        self.confusion.update(best[:, 0], labels)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all ranks."""
        metrics = self.val_metrics.compute()
        self.log_dict({f"val_{name}": metrics[name] for name in ("top1", "top5", "loss")})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer of the recipe and its learning rate schedule, which changes at every step."""
        recipe, steps = self.recipe, self.steps
        optimizer = build_optimizer(self.model, recipe)
        if self.optimizer_state is not None:
            load_optimizer_state(optimizer, self.optimizer_state)
        warmup = recipe.warmup_epochs * steps / recipe.epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, steps, warmup, recipe.schedule)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
