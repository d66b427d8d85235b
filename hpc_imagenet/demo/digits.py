"""Digits dataset: scikit-learn's handwritten digits as archives in the ILSVRC2012 layout.

    python -m hpc_imagenet.demo.digits FOLDER

1,797 real 8x8 images of 10 classes, enlarged to 32x32 and written as JPEGs: archives of 2 MB that run through
the whole pipeline like the real ones. Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten
Digits", UCI Machine Learning Repository, 1998, the test set, as provided by `sklearn.datasets.load_digits`.

The split is fixed and stratified: of the n images of a digit, in source order, the 36 with the indices
floor(k·n/36), k = 0 … 35, are val (360 in total); the other 1,437 images are train.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image

from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_folder

SIDE = 32  # px
QUALITY = 95
VAL_PER_CLASS = 36
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_digits(folder: Path) -> None:
    """Write the archives into a new folder; on an error no folder is left behind.

    Args:
        folder: output folder; must not exist or must be empty.

    Raises:
        UserError: scikit-learn is not installed, or the folder is not empty or not writable.
    """
    images, labels = _digits()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as temporary:
            _write(temporary, images, labels)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None


def wnid(digit: int) -> str:
    """Return the fictitious WordNet id of a digit; in alphabetical order the label equals the digit."""
    return f"n{90000000 + digit}"


def devkit_id(digit: int) -> int:
    """Return the devkit id of a digit, 1 to 10; as in the real kit, ids are not in label order."""
    return (3 * digit + 7) % 10 + 1


def is_val(labels: list[int]) -> list[bool]:
    """Return for each image whether it is in val."""
    indices: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        indices.setdefault(label, []).append(i)
    chosen = {
        group[k * len(group) // VAL_PER_CLASS] for group in indices.values() for k in range(VAL_PER_CLASS)
    }
    return [i in chosen for i in range(len(labels))]


def _digits() -> tuple[list[bytes], list[int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the dataset digits needs scikit-learn, which is not installed: run "
            "pip install -c constraints.txt -e '.[demo]' in the checkout"
        ) from None
    source: Any = load_digits()
    return [_jpeg(image) for image in source.images], [int(label) for label in source.target]


def _jpeg(image: Any) -> bytes:
    """Encode an image of shape [8, 8], values 0 to 16, as an RGB JPEG, like nearly all ImageNet images."""
    grey = Image.fromarray((image * (255 / 16)).round().astype("uint8"))
    buffer = io.BytesIO()
    colour = grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
    colour.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _write(folder: Path, images: list[bytes], labels: list[int]) -> None:
    val = is_val(labels)
    train: dict[int, list[bytes]] = {digit: [] for digit in range(len(WORDS))}
    for image, label, held_out in zip(images, labels, val, strict=True):
        if not held_out:
            train[label].append(image)
    ilsvrc_writer.write_train(
        folder / ilsvrc_writer.TRAIN, ((wnid(digit), jpegs) for digit, jpegs in train.items())
    )
    ilsvrc_writer.write_val(
        folder / ilsvrc_writer.VAL, (image for image, held_out in zip(images, val, strict=True) if held_out)
    )
    truth = [devkit_id(label) for label, held_out in zip(labels, val, strict=True) if held_out]
    ilsvrc_writer.write_devkit(folder / ilsvrc_writer.DEVKIT, _synsets(train), truth)
    ilsvrc_writer.write_md5sums(folder)


def _synsets(train: dict[int, list[bytes]]) -> list[ilsvrc_writer.Synset]:
    leaves = [
        ilsvrc_writer.Synset(devkit_id(digit), wnid(digit), f"{WORDS[digit]}, {digit}", (), len(images))
        for digit, images in train.items()
    ]
    leaves.sort(key=lambda leaf: leaf.id)
    even = tuple(devkit_id(digit) for digit in range(0, 10, 2))
    odd = tuple(devkit_id(digit) for digit in range(1, 10, 2))
    # As in the real table, the inner nodes of the tree come last.
    return [
        *leaves,
        ilsvrc_writer.Synset(11, "n90000010", "even digit", even),
        ilsvrc_writer.Synset(12, "n90000011", "odd digit", odd),
        ilsvrc_writer.Synset(13, "n90000012", "digit, figure", (11, 12)),
    ]


def main() -> None:
    """Write the archives into a folder."""
    parser = argparse.ArgumentParser(
        description="Write the digits dataset as archives in the ILSVRC2012 layout."
    )
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        write_digits(options.folder)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(options.folder)


if __name__ == "__main__":
    main()
