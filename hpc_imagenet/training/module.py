"""What one step does: augment, normalise, forward, loss. Where and how often is the trainer's matter."""

from __future__ import annotations

import os

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.training.augment.batch_augment import BatchAugment
from hpc_imagenet.training.loading.batch_loader import Batch
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare
from hpc_imagenet.training.metrics import ClassificationMetrics
from hpc_imagenet.training.models.ema import ema_copy
from hpc_imagenet.training.models.optim import build_optimizer, lr_factor

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
        share: of this rank in a step.
        look_every: steps between two looks at loss and learning rate; each may make a GPU wait.
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
        look_every: int = 1,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = ema_copy(self.model) if recipe.ema is not None else None
        self.recipe, self.seed, self.steps, self.look_every = recipe, seed, steps, look_every
        self.parts = share.accumulate
        self.mixing = BatchAugment(recipe, classes, seed, share)
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.tally = ClassificationMetrics(classes)
        self.train()

    def compile_networks(self, threads: int) -> None:
        """Let torch compile the forward passes, at each one's first call; names of weights stay.

        Dropout and its like draw as they do without; rounding may differ.

        Args:
            threads: number of processes that compile; torch starts one a core of the machine, up to 32, in
                every task.
        """
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))  # read by the import of inductor
        from torch._dynamo import config as dynamo  # takes its time
        from torch._inductor import config as inductor

        inductor.fallback_random = True
        # Each size of images is compiled by itself, and what comes behind the limit would not be: the sizes
        # of training, and that of validation for either network.
        dynamo.recompile_limit = max(dynamo.recompile_limit, len(set(self.recipe.sizes)) + 4)
        for network in (self.model, self.average):
            if network is not None:
                network.compile(dynamic=False)

    def train(self, mode: bool = True) -> Classifier:
        """Switch as usual; where only the classifier trains, all else stays as in evaluation.

        Norms would go on counting otherwise, and dropout would hide what the classifier learns from.
        """
        super().train(mode)
        if self.recipe.freeze:
            self.model.eval()
        return self

    def normalised(self, images: Tensor) -> Tensor:
        """Return uint8 images as float with mean 0 and deviation 1, on ImageNet's average."""
        return (images - self.mean) / self.std

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout and its like a function of where we are, so that nothing of it needs saving."""
        place = [self.seed, self.trainer.global_step, batch_idx % self.parts, self.global_rank]
        seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        # torch.manual_seed formats a traceback for every kind of device that is not there: 0.7 ms.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one device batch."""
        images, labels = batch
        step = self.trainer.global_step
        images = self.normalised(self.mixing.pixels(images, step, batch_idx % self.parts))
        images, labels = self.mixing.normalised(images, labels, step, batch_idx % self.parts)
        heads = self.model(images)
        logits, *others = heads if isinstance(heads, tuple) else (heads,)
        loss = self._cross_entropy(logits, labels)
        for auxiliary in others:
            if auxiliary is not None:
                loss = loss + AUXILIARY * self._cross_entropy(auxiliary, labels)
        if (step + 1) % self.look_every == 0:
            self.log("train_loss", loss.detach())
            self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over what counts: not what was left out, nor its share of a mix.

        In float32: autocast leaves cross-entropy in the logits' type, and bf16 would round the log-softmax.
        """
        logits = logits.float()
        if labels.ndim == 1:
            counts = (labels != PADDING).float()
        else:
            counts = labels.sum(1)
            labels = labels / counts.clamp(min=1e-6)[:, None]
        smoothing = self.recipe.label_smoothing
        losses = F.cross_entropy(
            logits, labels, reduction="none", ignore_index=PADDING, label_smoothing=smoothing
        )
        return (losses * counts).sum() / counts.sum().clamp(min=1)

    def on_validation_epoch_start(self) -> None:
        """Count from zero, on all ranks for the same network: that with rank 0's batch norm statistics."""
        self.tally.reset()
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one device batch; padding counts nothing."""
        images, labels = batch
        network = self.model if self.average is None else self.average
        images = self.normalised(images)
        logits = network(images).float()
        if self.recipe.val_flip:
            logits = (logits + network(images.flip(-1)).float()) / 2
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=PADDING)
        self.tally.update(logits, labels, losses)

    def on_validation_epoch_end(self) -> None:
        """Add up over all ranks."""
        counted = self.tally.compute()
        self.log_dict({f"val_{name}": counted[name] for name in ("top1", "top5", "loss")})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the recipe's optimizer, its learning rate set anew at every step."""
        recipe, steps = self.recipe, self.steps
        chosen = build_optimizer(self.model, recipe)
        warmup = recipe.warmup_epochs * steps / recipe.epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(
            chosen, lambda step: lr_factor(step, steps, warmup, recipe.schedule)
        )
        return {"optimizer": chosen, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
