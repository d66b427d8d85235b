"""Labelled images in any layout as a source of archives.

The images are packed into archives of ILSVRC's format, so that all later stages are the same: a tar of one
tar per class, a flat tar for each of val and test, and labels.json instead of the development kit. A split
that the folder does not have becomes an empty tar.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.data.download.origin import origin_of
from hpc_imagenet.data.ilsvrc.labels_file import MAX_ID_BYTES, LabelsFile, class_id
from hpc_imagenet.data.images import orientation
from hpc_imagenet.data.layouts.image_finder import ImageFile, LabelledImages
from hpc_imagenet.data.sources.virtual_archives import VirtualArchives
from hpc_imagenet.data.sources.virtual_tar import InMemoryFile, VirtualFile, VirtualTar, VirtualTarOfTars
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk
from hpc_imagenet.io.atomic_files import atomic_write, read_json, write_json
from hpc_imagenet.io.printable import escape_name

FOUND = "images.json"  # beside the archives: what was found in the source folder
UPRIGHT_FOLDER = ".upright"  # beside the archives, until they are complete
_FLAT = ("val", "test")
_LOSSLESS, _ENCODED = ".lossless", ".encoded"
_MAX_NAME = 255  # bytes of a file name


class LabelledImagesSource(VirtualArchives):
    """Archives made of labelled images, computed on request; a `RangeSource`.

    Args:
        found: the images.
        dataset: the dataset; `orient` decides whether EXIF orientations are applied.
        folder: folder of the archives; a subfolder of it keeps the images that were turned upright.
        threads: number of images turned in parallel.
    """

    def __init__(self, found: LabelledImages, dataset: Dataset, folder: Path, threads: int) -> None:
        files = {split: archive.file for split, archive in dataset.archives.items()}
        super().__init__(found.root, origin_of(dataset), files)
        self._found = found
        self._orient = dataset.orient
        self._upright = folder / UPRIGHT_FOLDER
        self._threads = threads

    def make(self) -> dict[str, VirtualFile]:
        """Turn images upright, and return the archives by split."""
        found = self._found
        ids = [_checked_id(name, found.root) for name in found.classes]
        turned = self._turn_upright() if self._orient else {}
        by_class: list[list[ImageFile]] = [[] for _ in ids]
        for file in found.splits["train"]:
            by_class[file.label].append(file)
        archives: dict[str, VirtualFile] = {
            "train": VirtualTarOfTars(
                {id_: self._tar(files, turned)[0] for id_, files in zip(ids, by_class, strict=True)}
            )
        }
        labels = {}
        for split in _FLAT:
            archives[split], labels[split] = self._tar(found.splits.get(split, []), turned)
        kit = LabelsFile(
            classes=found.classes,
            **labels,
            layout=found.layout,
            skipped=found.skipped,
            oriented=len(turned),
            reencoded=tuple(path for path, copy in turned.items() if copy.path.suffix == _ENCODED),
        )
        archives["devkit"] = InMemoryFile(kit.encode())
        return archives

    def _tar(
        self, files: Sequence[ImageFile], turned: dict[str, _Upright]
    ) -> tuple[VirtualTar, tuple[int, ...]]:
        """Return the tar of some images, in the order of their names in it, and their labels."""
        named = sorted(zip(member_names([file.path for file in files]), files, strict=True), key=_name_bytes)
        contents = [turned.get(file.path) or _Upright(Path(file.path), file.size) for _, file in named]
        tar = VirtualTar(
            self._found.root,
            [name for name, _ in named],
            [str(content.path) for content in contents],
            [content.size for content in contents],
            [file.time for _, file in named],
        )
        return tar, tuple(file.label for _, file in named)

    def _turn_upright(self) -> dict[str, _Upright]:
        """Return path → upright copy of the images whose EXIF orientation is not upright.

        The copies are kept in a folder, so that a download that was killed makes none of them twice.
        """
        root = self._found.root
        images = [file for split in self._found.splits.values() for file in split]
        with ThreadPoolExecutor(self._threads) as pool:
            values = pool.map(lambda file: orientation.read_orientation(root / file.path), images)
            rotated = [
                (file, value)
                for file, value in zip(images, values, strict=True)
                if value != orientation.UPRIGHT
            ]
            if not rotated:
                return {}
            print(f"turning {len(rotated)} images upright, by their EXIF orientation", flush=True)
            if not orientation.has_jpegtran():
                print("no jpegtran on the PATH: JPEGs among these are encoded again, with loss", flush=True)
            self._upright.mkdir(parents=True, exist_ok=True)
            kept = [copy.stat().st_size for copy in self._upright.iterdir()]  # of a killed attempt
            size = sum(file.size for file, _ in rotated) - sum(kept)
            files = len(rotated) - len(kept)
            disk.require_free_space(self._upright, size, "the images that are turned upright", files)
            copies = pool.map(lambda item: self._copy_upright(*item), rotated)
            return {file.path: copy for (file, _), copy in zip(rotated, copies, strict=True)}

    def _copy_upright(self, file: ImageFile, value: int) -> _Upright:
        key = f"{file.path}\0{file.size}\0{file.time}\0{value}".encode("utf-8", "surrogateescape")
        path = self._upright / hashlib.sha256(key).hexdigest()[:32]
        for suffix in (_LOSSLESS, _ENCODED):
            if (copy := path.with_suffix(suffix)).exists():
                return _Upright(copy.resolve(), copy.stat().st_size)
        data, lossless = orientation.make_upright(self._read(file), value)
        copy = path.with_suffix(_LOSSLESS if lossless else _ENCODED)
        with atomic_write(copy) as target:
            target.write(data)
        return _Upright(copy.resolve(), len(data))

    def _read(self, file: ImageFile) -> bytes:
        path = self._found.root / file.path
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; make it readable or remove it") from None


class _Upright(NamedTuple):
    """Where the bytes of an image are: in its own file, or in an upright copy of it."""

    path: Path
    size: int  # bytes


def record_images(found: LabelledImages, folder: Path) -> None:
    """Record the images that archives are made of, in the folder of the archives."""
    write_json(folder / FOUND, _describe(found))


def check_unchanged(found: LabelledImages, folder: Path) -> None:
    """Compare the images of a folder with those that the archives were made of.

    Args:
        found: the images as they are now.
        folder: folder of the archives.

    Raises:
        UserError: images were added, removed, changed or labelled in another way.
    """
    try:
        before = read_json(folder / FOUND) or {}
    except ValueError:  # damaged
        return
    after = _describe(found)
    if before.get("state", after["state"]) == after["state"]:
        return
    then, now = (
        ", ".join(f"{number} {split}" for split, number in each["images"].items() if number)
        for each in (before, after)
    )
    if before.get("untimed") == after["untimed"]:
        raise UserError(
            f"the times of files in {found.root} have changed since {folder} was made of it: remove "
            f"{folder}, so that the contents are compared; stages after the download, such as +stage=train, "
            "do not need this"
        )
    change = "other files, sizes or labels" if then == now else f"then {then}; now {now}"
    raise UserError(
        f"{found.root} has changed since {folder} was made of it ({change}): remove {folder} and set "
        "dataset.revision=NAME, a new name, to take the images as they are now; stages after the download, "
        "such as +stage=train, still use those of then"
    )


def _describe(found: LabelledImages) -> dict[str, Any]:
    """Return a hash of the images' paths, sizes, labels and mtimes, one without these, and their numbers."""
    untimed = hashlib.sha256("\0".join(found.classes).encode("utf-8", "surrogateescape"))
    times = hashlib.sha256()
    for split, files in sorted(found.splits.items()):
        for file in files:
            line = f"{split}\0{file.path}\0{file.size}\0{file.label}\n"
            untimed.update(line.encode("utf-8", "surrogateescape"))
            times.update(f"{file.time}\n".encode())
    images = {split: len(files) for split, files in found.splits.items()}
    state = f"{untimed.hexdigest()} {times.hexdigest()}"
    return {"state": state, "untimed": untimed.hexdigest(), "images": images}


def remove_upright_copies(folder: Path) -> None:
    """Remove the images that were turned upright, from the folder of the complete archives."""
    shutil.rmtree(folder / UPRIGHT_FOLDER, ignore_errors=True)


def member_names(paths: Sequence[str]) -> list[str]:
    """Return a file name for each path, unique also without its extension, as shards require.

    It is the path's own file name. Where two are equal it includes the folders, and the extension where two
    files differ in nothing else; where that is not enough or too long, it is a hash of the path.
    """
    names = [escape_name(posixpath.basename(path)) for path in paths]
    for rename in (_flattened, _with_extension, _hashed):
        stems = Counter(posixpath.splitext(name)[0] for name in names)
        names = [
            name
            if stems[posixpath.splitext(name)[0]] == 1 and len(os.fsencode(name)) <= _MAX_NAME
            else rename(path)
            for name, path in zip(names, paths, strict=True)
        ]
    return names


def _flattened(path: str) -> str:
    return escape_name(re.sub("/+", "_", path))


def _with_extension(path: str) -> str:
    stem, ending = posixpath.splitext(_flattened(path))
    return f"{stem}_{ending[1:]}{ending}"


def _hashed(path: str) -> str:
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
    return digest[:32] + escape_name(posixpath.splitext(path)[1])


def _name_bytes(named: tuple[str, ImageFile]) -> bytes:
    return os.fsencode(named[0])  # the order in which the scan assigns labels


def _checked_id(name: str, root: Path) -> str:
    wnid = class_id(name)
    if not wnid or len(wnid.encode()) > MAX_ID_BYTES:
        problem = f"has more than {MAX_ID_BYTES} bytes; shorten it" if wnid else "is empty; give it a name"
        raise UserError(f"{root}: the class name {escape_name(name)[:40]!r} {problem}")
    return wnid
