"""Schema of the model and the training recipe: the settings that decide a training's result.

Values: conf/model/ and conf/recipe/.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from hpc_imagenet.config.setting import MISSING, setting

VAL_SETTINGS = ("val_size", "val_resize", "val_flip")  # of the recipe: they change what is evaluated
SMALL = 64  # px: largest size of training images for which stem=auto is small


@dataclass
class Model:
    """A classification network: of torchvision, of timm, or a user's own. See docs/models.md.

    `stem` is standard, small (stride 1 and no max-pool, for images up to 64 px) or auto (small if
    recipe.size ≤ 64). `options` are passed to the constructor unchanged. `weights` are the initial weights: a
    name, such as IMAGENET1K_V2 of torchvision or a1_in1k of timm, a file, or a run. `compile` changes the
    speed, and the result by rounding only.
    """

    name: str = setting(MISSING, "torchvision's NAME, timm/NAME, or my.package:factory")
    stem: str = setting(
        MISSING,
        "standard, small (stride 1, no max-pool) or auto: small if recipe.size ≤ 64",
        choices=("auto", "standard", "small"),
    )
    options: dict[str, Any] = setting(factory=dict, meaning="arguments of the network's constructor")
    weights: str | None = setting(
        None, "initial weights: a name of torchvision or timm, a file, or a run; null: random, from the seed"
    )
    weights_run: str | None = setting(None, "id of the run whose weights they are; set at submission")
    weights_hash: str | None = setting(None, "hash of its checkpoint; set at submission")
    compile: bool = setting(False, "whether to use torch.compile")
    preprocessing: dict[str, Any] = setting(
        factory=dict,
        meaning="any of mean, std, interpolation, crop_pct and crop_mode, in place of the model's own",
    )
    source: dict[str, str] = setting(
        factory=dict, meaning="text of the files of a network of your own; set at submission"
    )
    source_hash: str | None = setting(None, "hash of those files; set at submission")

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the result, for the signature."""
        optional = {
            "weights": self.weights_run or self.weights,
            "weights_hash": self.weights_hash,
            "preprocessing": self.preprocessing,
            "source": self.source_hash,
        }
        named = {"name": self.name, "stem": self.stem, "options": self.options}
        return named | {name: value for name, value in optional.items() if value}


@dataclass
class Recipe:
    """How a backbone is trained; every field decides the result.

    A recipe file must set the fields without a default; the others are optional.
    """

    epochs: int = setting(MISSING, "epochs over the training images", minimum=1)
    global_batch: int = setting(MISSING, "images per step over all devices", minimum=1)
    optimizer: str = setting(
        MISSING, "optimizer of all trained weights: sgd, adamw or another of torch.optim, or timm/NAME"
    )
    learning_rate: float = setting(MISSING, "peak learning rate, at this global batch", minimum=0)
    momentum: float = setting(MISSING, "momentum of sgd, and of those of timm that take one")
    weight_decay: float = setting(MISSING, "weight decay of the optimizer", minimum=0)
    norm_decay: bool = setting(MISSING, "whether norms and biases are decayed too")
    norm_momentum: float | None = setting(
        MISSING,
        "batch norm: weight of a step in the running statistics; null: the model's",
        minimum=0,
        maximum=1,
    )
    warmup_epochs: float = setting(MISSING, "epochs of linear warm-up before `schedule`", minimum=0)
    label_smoothing: float = setting(MISSING, "share of the label given to all classes", minimum=0, maximum=1)
    size: int = setting(MISSING, "px, side of the training crop", minimum=8)
    val_resize: int = setting(MISSING, "px, short side before the centre crop")
    val_size: int = setting(MISSING, "px, side of the centre crop", minimum=8)
    crop_scale: float = setting(MISSING, "minimum share of the area in a random crop", minimum=0, maximum=1)
    flip: float = setting(MISSING, "probability of a horizontal flip", minimum=0, maximum=1)
    precision: str = setting(
        MISSING,
        "Lightning's name, such as bf16-mixed or 32-true; auto: best for the device",
        # Not bf16-true: sums of the loss and slow weight averages would be lost in rounding.
        choices=("auto", "32-true", "bf16-mixed", "16-mixed", "64-true"),
    )
    schedule: str = setting("cosine", "decay of the learning rate to zero", choices=("cosine", "linear"))
    start_size: int | None = setting(
        None, "px, initial side of the training crop; null: `size` from the start", minimum=8
    )
    grow_from: float = setting(0.0, "last epoch (from 0) of start_size")
    grow_to: float = setting(
        0.0,
        "first epoch of `size`; in between the side grows linearly, in multiples of the greatest common "
        "divisor of start_size and size",
    )
    mixup: float = setting(0.0, "alpha of the Beta distribution; 0: off", minimum=0)
    cutmix: float = setting(0.0, "alpha; with mixup as well, each batch uses one of the two", minimum=0)
    augment: str = setting("none", "trivial: TrivialAugmentWide", choices=("none", "trivial"))
    erase: float = setting(0.0, "probability of erasing a rectangle of an image", minimum=0, maximum=1)
    blurpool: bool = setting(False, "blur the input of each strided convolution")
    ema: float | None = setting(
        None,
        "decay of the weight average per update; the averaged weights are evaluated",
        minimum=0,
        maximum=1,
    )
    ema_every: int = setting(1, "steps between two updates of the average", minimum=1)
    val_flip: bool = setting(False, "evaluate the mean of the logits of an image and its mirror image")
    freeze: bool = setting(False, "train the classifier only")
    keep_optimizer: bool = setting(
        False, "begin with the optimizer's state of the run in model.weights, such as its momentum"
    )
    optimizer_options: dict[str, Any] = setting(factory=dict, meaning="more arguments of the optimizer")
    shuffle_window: int | None = setting(
        None,
        "images within which the order is random, so that shards are read sequentially; null: all",
        minimum=1,
    )

    def identity(self) -> dict[str, Any]:
        """Return the settings for the signature, without optional ones that have their default value."""
        defaults = {entry.name: entry.default for entry in fields(self) if entry.default is not MISSING}
        defaults["optimizer_options"] = {}
        return {k: v for k, v in asdict(self).items() if k not in defaults or v != defaults[k]}

    @property
    def sizes(self) -> list[int]:
        """Side of the training crop in px, for each epoch."""
        if self.start_size is None or self.start_size == self.size:
            return [self.size] * self.epochs
        step = math.gcd(self.start_size, self.size)
        sizes = []
        for epoch in range(self.epochs):
            fraction = 1.0 if epoch >= self.grow_to else 0.0
            if self.grow_from < epoch < self.grow_to:
                fraction = (epoch - self.grow_from) / (self.grow_to - self.grow_from)
            exact = self.start_size + fraction * (self.size - self.start_size)
            sizes.append(math.floor(exact / step + 0.5) * step)
        return sizes


def is_small(stem: str, size: int) -> bool:
    """Whether `model.stem` is small for images of `size` px."""
    return stem == "small" or (stem == "auto" and size <= SMALL)
