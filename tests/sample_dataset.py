"""Write a small processed dataset, as the process stage writes it, as input of later stages."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from hpc_imagenet.datastore.file_hash import format_digest, new_digest
from hpc_imagenet.datastore.index import ENTRY, write_index
from hpc_imagenet.datastore.manifest import ClassNames, File, Manifest, Split, load_manifest


def file_of(path: Path, relative: str, algorithm: str = "md5") -> File:
    data = path.read_bytes()
    digest = new_digest(algorithm)
    digest.update(data)
    return File(relative, len(data), format_digest(digest))


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> list[tuple[int, int]]:
    """Write an uncompressed tar; return (offset, length) of the data of every member."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    with tarfile.open(path) as archive:
        return [(member.offset_data, member.size) for member in archive]


def make_dataset(
    workspace: Path,
    name: str = "digits",
    content: str = "c0ffee",
    *,
    images: int = 12,
    image_bytes: int = 3_000,
) -> Manifest:
    """Write `workspace/datasets/<name>/` with archives in `workspace/archives/<name>/`.

    `content` is also the seed of the images' bytes. The archives are train-0.tar, train-1.tar and val-0.tar.
    """
    bits = random.Random(content)
    archives, folder = workspace / "archives" / name, workspace / "datasets" / name
    archives.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[File] = []
    splits: dict[str, Split] = {}
    for split, parts in (("train", 2), ("val", 1)):
        entries = []
        for part in range(parts):
            path = archives / f"{split}-{part}.tar"
            members = [(f"{split}_{part}_{i}.JPEG", bits.randbytes(image_bytes + i)) for i in range(images)]
            path.unlink(missing_ok=True)  # a datastore may link to it: replace the file, do not overwrite it
            addresses = write_tar(path, members)
            entries += [(offset, size, i % 3, len(shards)) for i, (offset, size) in enumerate(addresses)]
            shards.append(file_of(path, f"../../archives/{name}/{path.name}"))
        write_index(folder / f"{split}.npy", np.array(entries, ENTRY))
        splits[split] = Split(file_of(folder / f"{split}.npy", f"{split}.npy", "blake3"), len(entries))
    (folder / "meta.bin").write_bytes(bits.randbytes(99))
    manifest = Manifest(
        name=name,
        content=content,
        created="2020-01-01T00:00:00.000+00:00",
        classes=tuple(ClassNames(f"n{i:08d}", (f"class {i}", "synonym")) for i in range(3)),
        shards=tuple(shards),
        splits=splits,
        files=(file_of(folder / "meta.bin", "meta.bin", "blake3"),),
        provenance={"process": {"package": "0"}},
    )
    manifest.save(folder)
    return manifest


def link_version(dataset: Path, version: Path) -> None:
    """Make a version of a datastore from a dataset: its files are links, also to archives outside it."""
    version.mkdir(parents=True)
    manifest = load_manifest(dataset)

    def link(file: File) -> File:
        path = (dataset / file.path).resolve()
        (version / path.name).symlink_to(path)
        return replace(file, path=path.name)

    replace(
        manifest,
        shards=tuple(map(link, manifest.shards)),
        splits={name: replace(split, index=link(split.index)) for name, split in manifest.splits.items()},
        files=tuple(map(link, manifest.files)),
    ).save(version)


def write_coloured(version: Path, images: int, noise: int = 0) -> None:
    """Write a version of a datastore with images of 32 px in two colours.

    Args:
        version: its folder.
        images: number of images of each split, half of them of each class.
        noise: grey levels of noise, so that the classes have to be learned.
    """
    version.mkdir(parents=True)
    bits = np.random.default_rng(0)
    shards, splits = [], {}
    for shard, name in enumerate(("train", "val")):
        members = []
        for i in range(images):
            pixels = bits.integers(0, noise + 1, (32, 32, 3), np.uint8)
            pixels[..., i % 2] += 150
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            members.append((f"{name}_{i}.JPEG", buffer.getvalue()))
        locations = write_tar(version / f"{name}.tar", members)
        entries = [(offset, size, i % 2, shard) for i, (offset, size) in enumerate(locations)]
        write_index(version / f"{name}.npy", np.array(entries, ENTRY))
        shards.append(file_of(version / f"{name}.tar", f"{name}.tar"))
        splits[name] = Split(file_of(version / f"{name}.npy", f"{name}.npy"), images)
    classes = (ClassNames("n00000001", ("red",)), ClassNames("n00000002", ("green",)))
    Manifest(version.parent.name, "0", "", classes, tuple(shards), splits).save(version)
