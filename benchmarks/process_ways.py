"""Programs for process.py: ours, those of packages, and shell scripts.

Each Python program runs in its own process and prints two numbers: seconds of wall clock, without the
imports, and seconds of CPU. Its arguments are those that `process.Bench` passes.
"""

from __future__ import annotations

OURS = """
import sys, time
from pathlib import Path
from hpc_imagenet.config.compose import compose
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.work import process
from hpc_imagenet.cluster.dist_env import DistEnv
import scipy.io, PIL.Image, PIL.JpegImagePlugin

def main():
    workspace, part, parts, *settings = sys.argv[1:]
    words = ["dataset=ilsvrc", "dataset.name=x", "dataset.source=x", f"workspace={workspace}", *settings]
    (config,) = compose(words)
    config.stage.name, config.stage.parts = "process", int(parts)
    config.stage.part = int(part) if part else None
    run = Run(Path(workspace) / "runs" / f"bench{part}")
    run.folder.mkdir(parents=True, exist_ok=True)
    begin, cpu = time.perf_counter(), time.process_time()
    process.run(config, run, DistEnv())
    print(time.perf_counter() - begin, time.process_time() - cpu)

if __name__ == "__main__":
    main()
"""
TORCHVISION = """
import os, sys, time
from torchvision.datasets import imagenet
imagenet._verify_archive = lambda *_: None
folder = sys.argv[1]
begin, cpu = time.perf_counter(), time.process_time()
imagenet.parse_devkit_archive(folder)
imagenet.parse_train_archive(folder)
imagenet.parse_val_archive(folder)
print(time.perf_counter() - begin, time.process_time() - cpu)
"""
WEBDATASET = """
import sys, time
import numpy as np
import webdataset
index, shards, out = np.load(sys.argv[1]), sys.argv[2:4], sys.argv[4]
files = [open(path, "rb") for path in shards]
begin, cpu = time.perf_counter(), time.process_time()
with webdataset.ShardWriter(f"{out}/%05d.tar", maxcount=10**9, maxsize=2**30, verbose=0) as writer:
    for number, (offset, length, label, shard) in enumerate(index.tolist()):
        files[shard].seek(offset)
        writer.write({"__key__": f"{number:08d}", "jpg": files[shard].read(length), "cls": label})
print(time.perf_counter() - begin, time.process_time() - cpu)
"""
LITDATA = """
import resource, sys, time
import numpy as np
from litdata import optimize

def image(row):
    offset, length, label, shard = row
    with open(sys.argv[2 + shard], "rb") as file:
        file.seek(offset)
        return {"image": file.read(length), "label": label}

if __name__ == "__main__":
    rows = np.load(sys.argv[1]).tolist()
    begin = time.perf_counter()
    optimize(image, rows, sys.argv[4], chunk_bytes="64MB", num_workers=1)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(time.perf_counter() - begin, spent.ru_utime + spent.ru_stime)
"""
SINGLE = """
import io, resource, sys, time
import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from hpc_imagenet.data.images import image_header
from hpc_imagenet.data.images.shard_transform import ShardTransform
torch.set_num_threads(1)
rows, way = np.load(sys.argv[1])[: int(sys.argv[4])].tolist(), sys.argv[5]
file = open(sys.argv[2], "rb")
images = []
for offset, length, *_ in rows:
    file.seek(offset)
    images.append(file.read(length))
looks = [image_header.inspect(data) for data in images]
small, tile = ShardTransform("short", 256, 90), ShardTransform(tile=True)

def pillow(data, look):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    buffer = io.BytesIO()
    size = round(image.width * scale), round(image.height * scale)
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

def torchvision(data, look):
    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    small = resize(image, 256, InterpolationMode.BICUBIC, antialias=True)
    return encode_jpeg(small, 90).numpy().tobytes()

act = {"ours": small, "pillow": pillow, "torchvision": torchvision, "tile": tile}.get(way)
act = act or (lambda data, look: image_header.decode_error(data))
begin = time.perf_counter()
spent = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
for data, look in zip(images, looks):
    act(data, look)
wall, cpu = time.perf_counter() - begin, 0
for of, before in zip((resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN), spent):
    now = resource.getrusage(of)
    cpu += now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime
print(wall, cpu)
"""
# As the common scripts do: extract all inner tars, then each into its folder; sort val by a list of mv.
BASH = """
set -e
mkdir -p {out}/train {out}/val
tar -xf {source}/{train} -C {out}/train
cd {out}/train
find . -name '*.tar' | while read -r name; do
    mkdir -p "${{name%.tar}}"
    tar -xf "$name" -C "${{name%.tar}}"
    rm -f "$name"
done
cd {out}/val
tar -xf {source}/{val}
bash {prepare}
"""
GNU_TAR = """
set -e
mkdir -p {out}/train {out}/val
cd {out}/train
export TO='mkdir -p "${{TAR_FILENAME%.tar}}" && tar -xf - -C "${{TAR_FILENAME%.tar}}"'
tar -xf {source}/{train} --to-command="$TO"
cd {out}/val
tar -xf {source}/{val}
bash {prepare}
"""
