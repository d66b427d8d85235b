"""Which network is trained and how: the part of the schema that decides what a training is worth.

The values live in conf/model/ and conf/recipe/; `limits.check` looks at what a type cannot say.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from omegaconf import MISSING


@dataclass
class Model:
    """A torchvision classification backbone.

    `stem` is standard, small (stride 1 and no max-pool in front, for images up to 64 px) or auto (small
    where recipe.size ≤ 64). `options` go to the torchvision constructor as they are. `weights` to begin with
    are a name of torchvision's, such as IMAGENET1K_V2, or a file. `compile` changes the speed, and the
    result by rounding only.
    """

    name: str = MISSING
    stem: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None  # null: drawn from the seed
    compile: bool = False  # torch.compile

    def identity(self) -> dict[str, Any]:
        """Return what decides the result."""
        named = {"name": self.name, "stem": self.stem, "options": self.options}
        return named | ({"weights": self.weights} if self.weights else {})


@dataclass
class Recipe:
    """How a backbone is trained; everything here decides the result.

    Each recipe states the first group; those of the second are left out of what does without them.
    """

    epochs: int = MISSING
    global_batch: int = MISSING  # images a step over all devices: the invariant
    optimizer: str = MISSING  # sgd or adamw
    learning_rate: float = MISSING  # the peak, at this global batch
    momentum: float = MISSING  # of sgd
    weight_decay: float = MISSING
    norm_decay: bool = MISSING  # whether it decays norms and biases as well
    norm_momentum: float | None = MISSING  # batch norm: a step's share in its statistics; null: the model's
    warmup_epochs: float = MISSING  # linear, then as `schedule` says
    label_smoothing: float = MISSING  # 0 to 1
    size: int = MISSING  # px, side of the training crop
    val_resize: int = MISSING  # px, short side before the centre crop
    val_size: int = MISSING  # px, side of the centre crop
    crop_scale: float = MISSING  # least share of the area in a random crop, 0 to 1
    flip: float = MISSING  # probability of a horizontal flip
    precision: str = MISSING  # of Lightning, such as bf16-mixed or 32-true; auto: what the device does best
    schedule: str = "cosine"  # or linear: how the learning rate falls to zero
    start_size: int | None = None  # px, side of the training crop at first; null: `size` from the start
    grow_from: float = 0.0  # the last epoch (from 0) of start_size
    grow_to: float = 0.0  # the first epoch of `size`; in between straight, rounded to what divides both
    mixup: float = 0.0  # alpha of the Beta distribution; 0: none
    cutmix: float = 0.0  # the same; with both, each batch takes one of them
    augment: str = "none"  # or trivial: TrivialAugment, wide
    erase: float = 0.0  # probability that a rectangle of an image is erased
    blurpool: bool = False  # blur before each convolution that halves
    ema: float | None = None  # decay of the averaged weights at each update; they are what is evaluated
    ema_every: int = 1  # steps between two updates
    val_flip: bool = False  # judge the mean of an image and its mirror image
    freeze: bool = False  # train the classifier only

    def identity(self) -> dict[str, Any]:
        """Return what is said, without the ingredients of the second group that are left out."""
        plain = {entry.name: entry.default for entry in fields(self) if entry.default is not MISSING}
        return {k: v for k, v in asdict(self).items() if k not in plain or v != plain[k]}

    @property
    def sizes(self) -> list[int]:
        """Px of the training crops, epoch by epoch."""
        if self.start_size is None or self.start_size == self.size:
            return [self.size] * self.epochs
        step = math.gcd(self.start_size, self.size)
        sizes = []
        for epoch in range(self.epochs):
            share = 1.0 if epoch >= self.grow_to else 0.0
            if self.grow_from < epoch < self.grow_to:
                share = (epoch - self.grow_from) / (self.grow_to - self.grow_from)
            exact = self.start_size + share * (self.size - self.start_size)
            sizes.append(math.floor(exact / step + 0.5) * step)
        return sizes


def is_weights_name(weights: str) -> bool:
    """Whether `model.weights` is a name of torchvision's, such as IMAGENET1K_V2; else it is a file."""
    return re.fullmatch(r"[A-Z][A-Z0-9_]*", weights) is not None
