"""What happens to a picture between its file and the batch; all of it on the CPU, in 8 bits.

The random ones take their randomness as an argument, so a picture looks the same whoever decodes it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image

Box = tuple[int, int, int, int]  # px: left, upper, right, lower

ASPECT = (3 / 4, 4 / 3)  # of a random crop, Szegedy et al. 2015
TRIES = 10


@dataclass(frozen=True)
class TrainView:
    """A random crop of at least `scale` of the area, resized to `size` px; mirrored with chance `flip`."""

    size: int
    scale: float
    flip: float

    def __call__(self, picture: Image.Image, rng: random.Random) -> Image.Image:
        """Return a picture of `size` px a side."""
        box = random_box(picture.width, picture.height, self.scale, rng)
        view = picture.crop(box).resize((self.size, self.size), Image.Resampling.BILINEAR)
        mirrored = rng.random() < self.flip
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else view


@dataclass(frozen=True)
class ValView:
    """The middle `size` px of a picture whose short side was resized to `resize` px."""

    size: int
    resize: int

    def __call__(self, picture: Image.Image, rng: random.Random) -> Image.Image:
        """Return a picture of `size` px a side."""
        width, height = picture.size
        # The long side is cut to whole px and the crop rounded as in torchvision, whose weights' published
        # accuracies we want to meet. PIL's bilinear filter is antialiased.
        if width <= height:
            width, height = self.resize, int(self.resize * height / width)
        else:
            width, height = int(self.resize * width / height), self.resize
        left, upper = round((width - self.size) / 2), round((height - self.size) / 2)
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return picture.crop((left, upper, left + self.size, upper + self.size))


def random_box(width: int, height: int, scale: float, rng: random.Random) -> Box:
    """Draw a crop of `scale` to 1 of the area and 3:4 to 4:3 in shape, all of it inside the picture.

    The same distribution as torchvision's RandomResizedCrop, with its way out after ten tries that do not
    fit: the largest crop in the middle whose shape is allowed.
    """
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(TRIES):
        area = width * height * rng.uniform(scale, 1)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, upper, left + w, upper + h
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h
