"""How fast images become batches, a core, beside the usual ways; and how far from Pillow's the pictures are.

    python benchmarks/loader.py [--images 1024] [--folder DIR] [--peers PYTHON] [--repeats 3]

The images are made here from the photos that come with scikit-learn (and scikit-image, where it is there):
crops with the grain of a sensor, JPEGs of 500 x 375 px and about 105 kB, as ImageNet's are. They lie in the
page cache. All ways do the same: RandomResizedCrop to 224 px of at least 0.08 of the area, mirrored half the
time, batches of 64. They run in processes of their own, bound with all that they do to as many CPUs as they
have workers, and take turns, so that a busy moment meets all of them. `--peers` is an interpreter that has
litdata, webdataset and DALI, if this one has not.

Off: grey levels from the same crops by Pillow, mean over all pixels, and the worst. CPU ms: of all processes,
for one image. First: seconds from opening the data to the first batch, without imports.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BATCH, SIZE, SCALE = 64, 224, 0.08
WIDTH, HEIGHT = 500, 375  # px
QUALITY = 96  # of libjpeg; together with the grain it makes the size of ImageNet's files
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
CHECKED = 48  # images that are held against Pillow
PACKAGES = ("hpc-imagenet", "numpy", "pillow", "simplejpeg", "torch", "torchvision")
PEERS = ("litdata", "webdataset", "nvidia-dali-cuda120", "ffcv")
VARIANTS = ("archive", "tiled", "short256", "short256-tiled")

Draw = Callable[[bytes, tuple[int, int, int, int]], Any]  # a crop of an image, [SIZE, SIZE, 3]


# ------------------------------------------------------------------------ a process of its own: one way, once


@dataclass
class Way:
    """Batches without end, and what a crop looks like that way."""

    batches: Iterator[Any]
    draw: Draw | None = None  # None: nothing is drawn, or by Pillow itself


def pillow(data: bytes, box: tuple[int, int, int, int]) -> Any:
    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGB").crop(box)
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def by_torchvision(data: bytes, box: tuple[int, int, int, int]) -> Any:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional

    picture = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    left, upper, right, lower = box
    size = [SIZE, SIZE]
    drawn = functional.resized_crop(picture, upper, left, lower - upper, right - left, size, antialias=True)
    return drawn.permute(1, 2, 0).numpy()


def by_us(data: bytes, box: tuple[int, int, int, int]) -> Any:
    import torch

    from hpc_imagenet.training.decode import Encoded
    from hpc_imagenet.training.transforms import Crop, render

    out = torch.empty(1, SIZE, SIZE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    pixels = torch.from_numpy(Encoded(data).pixels(box)).permute(2, 0, 1)[None]
    render(pixels, Crop(box, SIZE, SIZE), out)
    return out[0].permute(1, 2, 0).numpy()


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def image_folder(folder: Path, workers: int, floats: bool) -> Way:
    import torch
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    last = (
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        if floats
        else [transforms.PILToTensor()]
    )
    crop = transforms.RandomResizedCrop(SIZE, (SCALE, 1))
    change = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *last])
    images = datasets.ImageFolder(str(folder / "folders"), change)
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True
    )
    return Way(endless(loader))


def ours(folder: Path, workers: int, variant: str, processes: bool = False) -> Way:
    import torch

    from hpc_imagenet.datastore.store import Store
    from hpc_imagenet.training.data import Batches, Loader
    from hpc_imagenet.training.sampler import Share, TrainSampler
    from hpc_imagenet.training.transforms import TrainView

    torch.set_num_threads(1)
    split = Store(folder / variant).split("train")
    batches = Batches(split, TrainView(SIZE, SCALE, 0.5), 0)
    sampler = TrainSampler(len(split), 0, Share(BATCH))
    if not processes:
        return Way(endless(Loader(batches, sampler, workers)), by_us)
    from torch.utils.data import DataLoader

    whole: Any = Whole(split)
    loader: Any = DataLoader(
        whole, sampler=sampler, batch_size=None, num_workers=workers, persistent_workers=True
    )
    return Way(endless(loader), by_us)


class Whole:
    """Our batches for PyTorch's worker processes, written into shared memory at once."""

    def __init__(self, split: Any) -> None:
        self.split = split

    def __getitem__(self, keys: Any) -> Any:
        import torch

        from hpc_imagenet.training.data import Batches
        from hpc_imagenet.training.transforms import TrainView

        batches = Batches(self.split, TrainView(SIZE, SCALE, 0.5), 0)
        _, labels = batches.empty(0)
        shape = (len(keys), SIZE, SIZE, 3)
        storage = torch.UntypedStorage._new_shared(len(keys) * SIZE * SIZE * 3)
        pixels = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape).permute(0, 3, 1, 2)  # type: ignore[call-overload]
        labels = torch.zeros(len(keys), dtype=torch.int64)
        batches.fill((pixels, labels), keys, range(len(keys)))
        return pixels, labels


def ours_reading(folder: Path, workers: int) -> Way:
    from concurrent.futures import ThreadPoolExecutor

    from hpc_imagenet.datastore.store import Store

    split = Store(folder / "archive").split("train")
    order = np.random.default_rng(0).permutation(len(split)).tolist()
    threads = ThreadPoolExecutor(workers)

    def read() -> Iterator[Any]:
        while True:
            for at in range(0, len(order) - BATCH + 1, BATCH):
                yield list(threads.map(split.read, order[at : at + BATCH]))

    return Way(read())


def litdata(folder: Path, workers: int, decode: bool) -> Way:
    import torch
    from litdata import StreamingDataLoader, StreamingDataset
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    change = v2.Compose([v2.RandomResizedCrop(SIZE, (SCALE, 1), antialias=True), v2.RandomHorizontalFlip()])

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return (change(sample["image"]), sample["label"]) if decode else sample

    name = "litdata" if decode else "litdata-bytes"
    data = Images(str(folder / name), shuffle=True, drop_last=True)
    collate = None if decode else list
    loader = StreamingDataLoader(
        data,
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=True,
        drop_last=True,
        collate_fn=collate,
    )
    return Way(endless(loader), by_torchvision if decode else None)


def webdataset(folder: Path, workers: int, decode: bool) -> Way:
    import torch
    import webdataset as wds
    from torchvision import transforms

    torch.set_num_threads(1)
    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, (SCALE, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    shards = [str(path) for path in sorted((folder / "webdataset").iterdir())]
    data: Any = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(500)
    if decode:
        data = data.decode("pil").to_tuple("jpg", "cls").map_tuple(change, lambda label: label).batched(BATCH)
    else:
        data = data.to_tuple("jpg", "cls").batched(BATCH, collation_fn=list)
    loader = wds.WebLoader(data.repeat(), batch_size=None, num_workers=workers)
    return Way(iter(loader))


def dali(folder: Path, workers: int) -> Way:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None, seed=0)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        data, label = fn.readers.file(file_root=str(folder / "folders"), random_shuffle=True)
        pictures = fn.decoders.image_random_crop(data, random_area=[SCALE, 1], output_type=types.RGB)
        pictures = fn.resize(pictures, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(pictures, horizontal=fn.random.coin_flip()), label

    built = pipeline()
    built.build()

    def run() -> Iterator[Any]:
        while True:
            yield built.run()

    return Way(run())


def ffcv(folder: Path, workers: int) -> Way:
    import ffcv as found  # it has to be built with OpenCV's headers; where it was, say so and write this way

    raise SystemExit(f"ffcv {found.__version__} is installed, and this way is not written")


WAYS: dict[str, tuple[str, Callable[[Path, int], Way]]] = {
    "folder-float": ("ImageFolder + PIL, float", lambda f, w: image_folder(f, w, True)),
    "folder-bytes": ("ImageFolder + PIL, uint8", lambda f, w: image_folder(f, w, False)),
    "webdataset": ("webdataset + PIL, uint8", lambda f, w: webdataset(f, w, True)),
    "litdata": ("litdata + its decoder, uint8", lambda f, w: litdata(f, w, True)),
    "dali": ("DALI on CPU, uint8", dali),
    "ffcv": ("FFCV", ffcv),
    "ours": ("ours", lambda f, w: ours(f, w, "archive")),
    "ours-processes": ("ours, worker processes", lambda f, w: ours(f, w, "archive", processes=True)),
    "ours-tiled": ("ours, tiled shards", lambda f, w: ours(f, w, "tiled")),
    "ours-short256": ("ours, short side 256", lambda f, w: ours(f, w, "short256")),
    "ours-short256-tiled": ("ours, short side 256, tiled", lambda f, w: ours(f, w, "short256-tiled")),
    "read-ours": ("reading only: ours", ours_reading),
    "read-litdata": ("reading only: litdata", lambda f, w: litdata(f, w, False)),
    "read-webdataset": ("reading only: webdataset", lambda f, w: webdataset(f, w, False)),
}
WITH_US = ("ours", "read-ours")


def child(name: str, folder: Path, workers: int, images: int) -> None:
    """Measure one way once, and print what came out as JSON."""
    import psutil
    import torch  # noqa: F401 - imports are not measured

    if name in ("litdata", "webdataset"):
        importlib.import_module(name)
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[:workers])
    begin = time.perf_counter()
    way = WAYS[name][1](folder, workers)
    next(way.batches)
    first = time.perf_counter() - begin
    for _ in range(2):  # what was made while the first one was waited for
        next(way.batches)
    spent, begin, done = cpu(), time.perf_counter(), 0
    while done < images:
        next(way.batches)
        done += BATCH
    wall = time.perf_counter() - begin
    told = {"rate": done / wall, "cpu": (cpu() - spent) / done * 1e3, "first": first}
    if way.draw:
        told |= fidelity(way.draw, folder)
    print(json.dumps(told), flush=True)
    for one in psutil.Process().children(recursive=True):  # workers of loaders without end
        one.kill()
    os._exit(0)


def cpu() -> float:
    """Seconds of this process and of its living children."""
    import psutil

    whole = psutil.Process()
    return sum(
        sum(one.cpu_times()[:2]) for one in (whole, *whole.children(recursive=True)) if one.is_running()
    )


def fidelity(draw: Draw, folder: Path) -> dict[str, float]:
    """Hold crops of the archive's images against Pillow's."""
    import torch
    from PIL import Image
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    means, worst = [], 0
    for path in sorted((folder / "folders").rglob("*.JPEG"))[:CHECKED]:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            upper, left, high, wide = RandomResizedCrop.get_params(picture, [SCALE, 1.0], [3 / 4, 4 / 3])
        box = (left, upper, left + wide, upper + high)
        off = np.abs(np.asarray(draw(data, box)).astype(int) - pillow(data, box).astype(int))
        means.append(float(off.mean()))
        worst = max(worst, int(off.max()))
    return {"off": statistics.mean(means), "worst": worst}


# ------------------------------------------------------------------------------------------------ the data


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


def pictures(count: int) -> list[bytes]:
    """Return different JPEGs of WIDTH x HEIGHT px that look and weigh like ImageNet's."""
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
    from hpc_imagenet.datastore.manifest import Category, File, Manifest, Split
    from hpc_imagenet.datastore.pack import header

    folder.mkdir()
    entries = np.zeros(len(images), ENTRY)
    with (folder / "train.tar").open("wb") as tar:
        for number, (data, label) in enumerate(images):
            tar.write(header(f"{number}.JPEG", len(data)))
            entries[number] = (tar.tell(), len(data), label, 0)
            tar.write(data + bytes(-len(data) % 512))
        tar.write(bytes(1024))
    write_index(folder / "train.npy", entries)
    files = [File(name, (folder / name).stat().st_size, "") for name in ("train.tar", "train.npy")]
    classes = tuple(Category(f"n{i:08d}", (str(i),)) for i in range(10))
    Manifest("bench", "0", "", classes, (files[0],), {"train": Split(files[1], len(images))}).save(folder)


def make(folder: Path, images: int) -> str:
    """Write all the forms of the data that need no peer; return what they weigh."""
    from hpc_imagenet.archives import picture
    from hpc_imagenet.archives.treat import Treatment

    pool, bits, said = pictures(min(POOL, images)), random.Random(0), []
    order = [bits.randrange(len(pool)) for _ in range(images)]
    treatments = {
        "archive": Treatment(),
        "tiled": Treatment(tile=True),
        "short256": Treatment("short", 256, 90),
        "short256-tiled": Treatment("short", 256, 90, tile=True),
    }
    for name, treatment in treatments.items():
        treated = [treatment(data, picture.examine(data))[0] for data in pool]
        write_store(folder / name, [(treated[one], number % 10) for number, one in enumerate(order)])
        said.append(f"{name} {statistics.mean(map(len, treated)) / 1e3:.0f} kB")
    for number, one in enumerate(order):
        path = folder / "folders" / f"n{number % 10:08d}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pool[one])
    return ", ".join(said)


LITDATA = """
import io, sys
from pathlib import Path
from PIL import Image
from litdata import optimize

def sample(path):
    data = Path(path).read_bytes()
    image = Image.open(io.BytesIO(data)) if sys.argv[3] == "image" else data
    if sys.argv[3] == "image":
        image.filename = path  # as if it had been opened by its name: then the file's bytes are kept
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


def convert(folder: Path, peers: str) -> None:
    """Let the peers write their own forms; what fails is said where it is to be read."""
    for name, code, kind in (
        ("litdata", LITDATA, "image"),
        ("litdata-bytes", LITDATA, "bytes"),
        ("webdataset", WEBDATASET, ""),
    ):
        (folder / name).mkdir()
        script = folder / f"write-{name}.py"
        script.write_text(code)
        command = [peers, str(script), str(folder / "folders"), str(folder / name), kind]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


# ------------------------------------------------------------------------------------------------ the table


@dataclass
class Row:
    """One way, measured several times with one worker and with two."""

    name: str
    told: dict[int, list[dict[str, float]]] = field(default_factory=lambda: {1: [], 2: []})
    why: str = ""

    def median(self, what: str, workers: int = 1) -> float:
        """Of all measurements."""
        return statistics.median(one[what] for one in self.told[workers])


def measure(rows: list[Row], folder: Path, images: int, repeats: int, peers: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    cpus = len(os.sched_getaffinity(0))
    for _ in range(repeats):
        for row in rows:
            for workers in (1, 2) if cpus > 1 else (1,):
                if row.why:
                    continue
                interpreter = sys.executable if row.name.startswith(WITH_US) else peers
                enough = 16 * images if row.name.startswith("read") else images
                command = [interpreter, __file__, "--way", row.name, "--folder", str(folder)]
                command += ["--workers", str(workers), "--images", str(enough)]
                done = subprocess.run(command, capture_output=True, text=True, env=env)
                if done.returncode:
                    row.why = (done.stderr.strip().splitlines() or ["failed"])[-1]
                else:
                    row.told[workers].append(json.loads(done.stdout.strip().splitlines()[-1]))


def show(rows: list[Row]) -> None:
    by_name = {row.name: row for row in rows}
    width = max(len(WAYS[row.name][0]) for row in rows)
    print(
        f"{'':{width}}  1 worker: images/s    min    max  CPU ms  first s"
        "  2 workers  2 / 1  x ImageFolder  x litdata    off  worst"
    )
    for row in rows:
        title = WAYS[row.name][0]
        if not row.told[1]:
            print(f"{title:{width}}  {row.why}")
            continue
        rates = [one["rate"] for one in row.told[1]]
        line = f"{title:{width}}  {row.median('rate'):18,.0f}{min(rates):7,.0f}{max(rates):7,.0f}"
        line += f"{row.median('cpu'):8.2f}{row.median('first'):9.2f}"
        if row.told[2]:
            two = row.median("rate", 2)
            line += f"{two:11,.0f}{two / row.median('rate'):7.2f}"
        else:
            line += f"{row.why[:16]:>18}"
        reads = row.name.startswith("read")
        for base in ("read-none", "read-litdata") if reads else ("folder-float", "litdata"):
            told = base in by_name and by_name[base].told[1]
            ratio = f"{row.median('rate') / by_name[base].median('rate'):.2f}" if told else ""
            line += f"{ratio:>{15 if base in ('folder-float', 'read-none') else 11}}"
        if "off" in row.told[1][0]:
            line += f"{row.median('off'):7.2f}{max(one['worst'] for one in row.told[1]):7.0f}"
        elif "PIL" in title:
            line += f"{0:7.2f}{0:7.0f}"
        print(line.rstrip())


def machine() -> Iterator[str]:
    import psutil
    from PIL import features

    memory, cores = psutil.virtual_memory().total / 2**30, len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    yield f"{platform.machine()}, {cores} CPU cores, {memory:.0f} GiB, load {load:.1f} at the start"
    versions = [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    yield f"Python {platform.python_version()}, {', '.join(versions)}"
    yield f"libjpeg-turbo of Pillow {features.version('libjpeg_turbo')}"


def versions_of_peers(interpreter: str) -> str:
    code = "import importlib.metadata as m, sys\nfor p in sys.argv[1:]:\n try: print(p, m.version(p))\n"
    code += " except m.PackageNotFoundError: print(p, 'is not installed')"
    done = subprocess.run([interpreter, "-c", code, *PEERS], capture_output=True, text=True)
    return ", ".join(done.stdout.split("\n")).strip(", ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--images", type=int, default=1024, help="images of the data, and of a measurement (1024)"
    )
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--peers", default=sys.executable, help="an interpreter with the peers")
    parser.add_argument("--repeats", type=int, default=3, help="times each way is measured (3)")
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS), help="some of the ways")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        child(options.way, options.folder, options.workers, options.images)
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-loader-", dir=options.folder) as name:
        folder = Path(name).resolve()
        print(*machine(), versions_of_peers(options.peers), sep="\n")
        weights = make(folder, options.images)
        convert(folder, options.peers)
        print(f"{options.images:,} images, {len(photos())} photos; {weights}; {options.repeats} times each\n")
        rows = [Row(name) for name in options.only]
        measure(rows, folder, options.images, options.repeats, options.peers)
        show(rows)


if __name__ == "__main__":
    main()
