"""Write archives in the ILSVRC layout with any number of images, as input for benchmarks.

    python benchmarks/shaped.py FOLDER [--train 8000] [--val 1000] [--classes 40] [--hollow]

The images are 500 x 375 px and about 105 kB, soft shapes with grain, identical at every call. With `--hollow`
only headers and ends of images are written and the rest of the file is a hole: ImageNet's full count, 155 GB,
takes 7 GB and can be indexed, but not decoded.
"""

from __future__ import annotations

import argparse
import io
import os
import random
from pathlib import Path

import numpy as np
from PIL import Image

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.expected import md5_of_file
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.io.tar_header import member_header

WIDTH, HEIGHT, QUALITY = 500, 375, 88  # px, px, quality of libjpeg


def make_images(count: int) -> list[bytes]:
    """Return different JPEGs, soft shapes with grain, of about the size of ImageNet's."""
    bits, made = np.random.default_rng(0), []
    for _ in range(count):
        coarse = bits.integers(0, 256, (HEIGHT // 6, WIDTH // 6, 3), np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), float)
        grain = bits.normal(0, 13, (HEIGHT, WIDTH, 1))
        buffer = io.BytesIO()
        Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
        made.append(buffer.getvalue())
    return made


def synsets(classes: int) -> list[Synset]:
    return [Synset(classes - i, f"n{i:08d}", f"word {i}, other {i}") for i in range(classes)]


def truth(val: int, classes: int) -> list[int]:
    return [1 + i % classes for i in range(val)]


def make_archives(folder: Path, train: int, val: int, classes: int) -> None:
    """Write archives with these numbers of images, identical at every call."""
    folder.mkdir(parents=True)
    pool, bits = make_images(64), random.Random(1)
    sizes = [train * (n + 1) // classes - train * n // classes for n in range(classes)]
    ilsvrc_writer.write_train(
        folder / ilsvrc_writer.TRAIN,
        (
            (one.wnid, [bits.choice(pool) for _ in range(size)])
            for one, size in zip(synsets(classes), sizes, strict=True)
        ),
    )
    ilsvrc_writer.write_val(folder / ilsvrc_writer.VAL, (bits.choice(pool) for _ in range(val)))
    ilsvrc_writer.write_devkit(folder / ilsvrc_writer.DEVKIT, synsets(classes), truth(val, classes))


def make_hollow(folder: Path, train: int, val: int, classes: int) -> None:
    """Write archives with every header and every image's first and last bytes; holes between them."""
    folder.mkdir(parents=True)
    pool, bits = [data[:700] for data in make_images(4)], random.Random(1)

    def fill(file: io.BufferedRandom, at: int, name: str) -> int:
        length, head = bits.randrange(60_000, 160_000), bits.choice(pool)
        os.pwrite(file.fileno(), member_header(name, length) + head, at)
        os.pwrite(file.fileno(), b"\xff\xd9", at + 512 + length - 2)
        return at + 512 + length + -length % 512

    with (folder / ilsvrc_writer.TRAIN).open("w+b") as file:
        at = 0
        for number, one in enumerate(synsets(classes)):
            begin, at = at, at + 512
            for i in range(train * number // classes, train * (number + 1) // classes):
                at = fill(file, at, f"{one.wnid}_{i}.JPEG")
            at += 1024
            os.pwrite(file.fileno(), member_header(f"{one.wnid}.tar", at - begin - 512), begin)
        file.truncate(at + 1024)
    with (folder / ilsvrc_writer.VAL).open("w+b") as file:
        at = 0
        for i in range(1, val + 1):
            at = fill(file, at, f"ILSVRC2012_val_{i:08d}.JPEG")
        file.truncate(at + 1024)
    ilsvrc_writer.write_devkit(folder / ilsvrc_writer.DEVKIT, synsets(classes), truth(val, classes))


def link_archives(source: Path, workspace: Path, hashed: bool = True) -> None:
    """Link the archives and write their receipts, as the download stage does with a folder."""
    folder = workspace / "archives" / "x"
    folder.mkdir(parents=True)
    for file in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL, ilsvrc_writer.DEVKIT):
        os.link(source / file, folder / file)
        md5 = md5_of_file(folder / file, lambda done: None) if hashed else "0" * 32
        receipt.write_receipt(folder / file, md5, str(source), "", (folder / file).stat())


def prepare_val(source: Path, classes: int, val: int) -> str:
    """Return the usual script that sorts val: one mkdir per class, one mv per image."""
    by_id = {one.id: one.wnid for one in synsets(classes)}
    lines = [f"mkdir -p {one.wnid}" for one in synsets(classes)]
    lines += [
        f"mv ILSVRC2012_val_{i:08d}.JPEG {by_id[number]}/" for i, number in enumerate(truth(val, classes), 1)
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--train", type=int, default=8000, help="images of train (8000)")
    parser.add_argument("--val", type=int, default=1000, help="images of val (1000)")
    parser.add_argument("--classes", type=int, default=40, help="classes (40)")
    parser.add_argument("--hollow", action="store_true", help="headers and ends only")
    options = parser.parse_args()
    make = make_hollow if options.hollow else make_archives
    make(options.folder, options.train, options.val, options.classes)
    print(options.folder)


if __name__ == "__main__":
    main()
