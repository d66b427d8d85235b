"""Images for loader.py, made of free photos and written in the format of each loader.

They are crops with the grain of a sensor, JPEGs of 500 x 375 px and about 105 kB, like ImageNet's.
"""

from __future__ import annotations

import io
import random
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from limited import LIMIT, TIMED_OUT, run_limited

WIDTH, HEIGHT = 500, 375  # px
QUALITY = 96  # of libjpeg; with the grain this gives the size of ImageNet's files
PHOTOS = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "motorcycle_left",
    "motorcycle_right",
    "rocket",
)
POOL = 128  # different images


def photos() -> list[Any]:
    """Free photos: those of scikit-learn, and of scikit-image where it is installed."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    found = [Image.fromarray(image) for image in load_sample_images().images]
    try:
        import skimage
    except ImportError:
        return found
    data = Path(skimage.__file__).parent / "data"
    paths = sorted(path for path in data.iterdir() if path.stem in PHOTOS)
    return found + [Image.open(path).convert("RGB") for path in paths]


def make_images(count: int) -> list[bytes]:
    """Return different JPEGs of WIDTH x HEIGHT px, similar to ImageNet's in content and size."""
    from PIL import Image

    bits, sources, made = np.random.default_rng(0), photos(), []
    for number in range(count):
        source = sources[number % len(sources)]
        wide = int(min(source.width, source.height * WIDTH / HEIGHT) * bits.uniform(0.6, 1))
        high = wide * HEIGHT // WIDTH
        left, upper = bits.integers(source.width - wide + 1), bits.integers(source.height - high + 1)
        part = source.crop((left, upper, left + wide, upper + high))
        part = part.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        grain = bits.normal(0, 4, (HEIGHT, WIDTH, 1))
        buffer = io.BytesIO()
        whole = (np.asarray(part, float) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(whole).save(buffer, "JPEG", quality=QUALITY)
        made.append(buffer.getvalue())
    return made


def write_store(folder: Path, images: list[tuple[bytes, int]]) -> None:
    """Write a datastore of one tar."""
    from hpc_imagenet.datastore.index import ENTRY, write_index
    from hpc_imagenet.datastore.manifest import ClassNames, File, Manifest, Split
    from hpc_imagenet.io.tar_header import member_header

    folder.mkdir()
    entries = np.zeros(len(images), ENTRY)
    with (folder / "train.tar").open("wb") as tar:
        for number, (data, label) in enumerate(images):
            tar.write(member_header(f"{number}.JPEG", len(data)))
            entries[number] = (tar.tell(), len(data), label, 0)
            tar.write(data + bytes(-len(data) % 512))
        tar.write(bytes(1024))
    write_index(folder / "train.npy", entries)
    files = [File(name, (folder / name).stat().st_size, "md5:") for name in ("train.tar", "train.npy")]
    classes = tuple(ClassNames(f"n{i:08d}", (str(i),)) for i in range(10))
    Manifest("bench", "0", "", classes, (files[0],), {"train": Split(files[1], len(images))}).save(folder)


KINDS = ("archive", "tiled", "short256", "short256-tiled")


def as_processed(pool: list[bytes], kind: str) -> tuple[list[bytes], str]:
    """Return images as the process stage writes them, and a note if they differ from that.

    Args:
        pool: original JPEGs.
        kind: one of KINDS.
    """
    from hpc_imagenet.data.images import image_header
    from hpc_imagenet.data.images.shard_transform import ShardTransform

    side, tile = ("short" if kind.startswith("short256") else None), "tiled" in kind
    lossless = tile and shutil.which("jpegtran") is not None
    transform = ShardTransform(side, 256, 90, tile=lossless)
    images = [transform(data, image_header.inspect(data))[0] for data in pool]
    if tile and not lossless:
        return [_with_restart_markers(data) for data in images], " (re-encoded: jpegtran is missing)"
    return images, ""


def _with_restart_markers(data: bytes) -> bytes:
    """Re-encode a JPEG with a restart marker after each block; it decodes as fast as a tiled one."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "JPEG", quality=QUALITY, restart_marker_blocks=1)
    return buffer.getvalue()


def make(folder: Path, images: int) -> str:
    """Write all formats that need no peer; return their mean image sizes as text."""
    pool, bits, sizes = make_images(min(POOL, images)), random.Random(0), []
    order = [bits.randrange(len(pool)) for _ in range(images)]
    for name in KINDS:
        made, note = as_processed(pool, name)
        write_store(folder / name, [(made[one], number % 10) for number, one in enumerate(order)])
        sizes.append(f"{name} {statistics.mean(map(len, made)) / 1e3:.0f} kB{note}")
    for number, one in enumerate(order):
        path = folder / "folders" / f"n{number % 10:08d}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pool[one])
    return ", ".join(sizes)


LITDATA = """
import io, sys
from pathlib import Path
from PIL import Image
from litdata import optimize

def sample(path):
    data = Path(path).read_bytes()
    image = Image.open(io.BytesIO(data)) if sys.argv[3] == "image" else data
    if sys.argv[3] == "image":
        image.filename = path  # as if opened by name: then litdata keeps the bytes of the file
    return {"image": image, "label": int(Path(path).parent.name[1:])}

if __name__ == "__main__":
    paths = sorted(str(path) for path in Path(sys.argv[1]).rglob("*.JPEG"))
    optimize(sample, paths, sys.argv[2], chunk_bytes="64MB", num_workers=1)
"""
WEBDATASET = """
import sys
from pathlib import Path
import webdataset
with webdataset.ShardWriter(f"{sys.argv[2]}/%05d.tar", maxcount=100, verbose=0) as writer:
    for number, path in enumerate(sorted(Path(sys.argv[1]).rglob("*.JPEG"))):
        writer.write({"__key__": f"{number:08d}", "jpg": path.read_bytes(), "cls": int(path.parent.name[1:])})
"""
FFCV = """
import sys
from pathlib import Path
from PIL import Image
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter

class Images:
    def __init__(self, folder):
        self.paths = sorted(Path(folder).rglob("*.JPEG"))
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, i):
        return Image.open(self.paths[i]).convert("RGB"), int(self.paths[i].parent.name[1:])

if __name__ == "__main__":
    quality, resolution = map(int, sys.argv[3].split(","))
    image = RGBImageField(write_mode="jpg", max_resolution=resolution, jpeg_quality=quality)
    writer = DatasetWriter(f"{sys.argv[2]}/train.beton", {"image": image, "label": IntField()}, num_workers=2)
    writer.from_indexed_dataset(Images(sys.argv[1]))
"""


def convert(folder: Path, peers: str) -> None:
    """Let the peers write their own formats; failures appear in the table of results."""
    for name, code, kind in (
        ("litdata", LITDATA, "image"),
        ("litdata-bytes", LITDATA, "bytes"),
        ("webdataset", WEBDATASET, ""),
        ("ffcv", FFCV, f"90,{WIDTH}"),  # its default quality, which its authors use
        ("ffcv-same", FFCV, f"{QUALITY},{WIDTH}"),
        ("ffcv-short256", FFCV, f"90,{256 * WIDTH // HEIGHT}"),  # it limits the long side
    ):
        (folder / name).mkdir()
        script = folder / f"write-{name}.py"
        script.write_text(code)
        command = [peers, str(script), str(folder / "folders"), str(folder / name), kind]
        try:
            done = run_limited(command, LIMIT)
        except subprocess.TimeoutExpired:
            print(f"{name}: {TIMED_OUT}")
            continue
        if done.returncode:
            print(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
