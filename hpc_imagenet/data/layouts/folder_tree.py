"""The tree of a dataset's folders: names of images and of other files, without reading any of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from posixpath import splitext

from hpc_imagenet.errors import UserError

# Endings of still images that Pillow decodes.
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif", ".ico", ".pcx", ".ras"),
)
# Images that Pillow does not decode: they are skipped with a warning.
_FOREIGN_PHOTOS = (".heic", ".heif", ".dng", ".cr2", ".nef", ".arw", ".orf", ".raf", ".dcm", ".jxl")
_FOREIGN_ENDINGS = (*_FOREIGN_PHOTOS, ".svg")
_SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
_SYSTEM_FOLDERS = (
    "__macosx",
    "__pycache__",
    "@eadir",
    "$recycle.bin",
    "lost+found",
    "system volume information",
)
# A folder of masks or previews is left out if a folder of images is beside it.
IMAGE_FOLDERS = frozenset(
    ("images", "image", "img", "imgs", "jpg", "jpeg", "png", "photos", "rgb", "jpegimages")
)
_MASK_FOLDERS = frozenset(
    (
        *("mask", "masks", "lung_masks", "segmentation", "segmentations", "segmentationclass"),
        *("segmentationobject", "annotation", "annotations", "trimaps", "groundtruth", "ground_truth"),
        *("labels", "thumbnails", "thumbs"),
    )
)
_MASK_FILE = re.compile(r"(.+)_mask(_\d+)?$", re.IGNORECASE)


@dataclass
class Folder:
    """One folder.

    Attributes:
        path: relative to the dataset's folder, with `/`; empty for that folder itself.
        folders: its folders, sorted by name.
        images: names of its images, sorted.
        others: names of its other files, without those that an operating system writes.
    """

    path: str
    folders: list[Folder] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its name."""
        return self.path.rpartition("/")[2]

    @cached_property
    def total(self) -> int:
        """Number of images in it and below."""
        return len(self.images) + sum(folder.total for folder in self.folders)

    @property
    def is_empty(self) -> bool:
        """Whether there is no file in it or below."""
        return not self.images and not self.others and all(folder.is_empty for folder in self.folders)

    @property
    def filled(self) -> list[Folder]:
        """Its folders that contain images."""
        return [folder for folder in self.folders if folder.total]

    def paths(self) -> Iterator[str]:
        """Yield the paths of all images in it and below."""
        prefix = f"{self.path}/" if self.path else ""
        yield from (prefix + name for name in self.images)
        for folder in self.folders:
            yield from folder.paths()

    def walk(self) -> Iterator[Folder]:
        """Yield it and all folders below."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def without(self, removed: list[Folder]) -> Folder:
        """Return a copy without some of the folders below it."""
        kept = [folder.without(removed) for folder in self.folders if folder not in removed]
        return Folder(self.path, kept, self.images, self.others) if removed else self


def scan_folder(root: Path, threads: int, skipped: Counter[str]) -> Folder:
    """List a folder and all below it.

    Args:
        root: the folder.
        threads: number of folders listed at a time.
        skipped: is given the number of files that are left out, by reason.

    Raises:
        UserError: the folder cannot be read, contains no image, or has a link to a missing image.
    """
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"dataset.source={root}: {problem}; set a folder with images")
    tree = Folder("")
    level = [tree]
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        while level:
            for counts in pool.map(lambda folder: _list(root, folder), level):
                skipped.update(counts)
            level = [inner for folder in level for inner in folder.folders]
    _drop_masks(tree, skipped)
    if not tree.total:
        seen = Counter(splitext(name)[1].lower() for folder in tree.walk() for name in folder.others)
        found = ", ".join(f"{n} {ending or 'files without ending'}" for ending, n in seen.most_common(4))
        if not found:
            raise UserError(f"{root} contains no files; set dataset.source to the folder with the images")
        hint = "set dataset=ilsvrc for parquet" if ".parquet" in seen else "unpack archives first"
        raise UserError(f"{root} contains no images, but {found}; {hint}")
    return tree


def _list(root: Path, folder: Folder) -> Counter[str]:
    skipped: Counter[str] = Counter()
    try:
        with os.scandir(root / folder.path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{root / folder.path}: {error.strerror}; make it readable or remove it") from None
    for entry in entries:
        name, lower = entry.name, entry.name.lower()
        if _is(entry.is_dir):
            if name.startswith(".") or lower in _SYSTEM_FOLDERS or _is_loop(root, entry):
                skipped["folder of the system"] += 1
            else:
                folder.folders.append(Folder(f"{folder.path}/{name}".lstrip("/")))
        elif name.startswith(".") or lower in _SYSTEM_FILES:
            skipped["file of the system"] += 1
        elif lower.endswith(IMAGE_ENDINGS):
            if not _is(entry.is_file):
                raise UserError(
                    f"{entry.path} is a link to a missing file; restore the file or remove the link"
                )
            folder.images.append(name)
        else:
            folder.others.append(name)
            skipped[f"not an image ({splitext(lower)[1] or 'no ending'})"] += 1
    return skipped


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself, or into a folder that may not be read
        return False


def _is_loop(root: Path, entry: os.DirEntry[str]) -> bool:
    """Whether a link leads to a folder that contains it, also by way of other links."""
    if not entry.is_symlink():
        return False
    target = Path(entry.path).resolve()
    outer = Path(entry.path).parent
    while target not in (real := outer.resolve(), *real.parents):
        if outer == root:
            return False
        outer = outer.parent
    return True


def _drop_masks(folder: Folder, skipped: Counter[str]) -> None:
    if any(inner.name.lower() in IMAGE_FOLDERS and inner.total for inner in folder.folders):
        for inner in folder.folders:
            if inner.name.lower() in _MASK_FOLDERS and inner.total:
                skipped["mask or preview"] += inner.total
                for each in inner.walk():
                    each.images = []
                    each.__dict__.pop("total", None)
    if any("_mask" in name.lower() for name in folder.images):
        stems = {splitext(name)[0] for name in folder.images}
        masks = {
            name
            for name in folder.images
            if (match := _MASK_FILE.fullmatch(splitext(name)[0])) and match[1] in stems
        }
        skipped["mask or preview"] += len(masks)
        folder.images = [name for name in folder.images if name not in masks]
    folder.__dict__.pop("total", None)
    for inner in folder.folders:
        _drop_masks(inner, skipped)


def foreign_images(skipped: Counter[str]) -> dict[str, int]:
    """Return ending → number of skipped files that are images which Pillow cannot decode."""
    return {end: n for end in _FOREIGN_ENDINGS if (n := skipped[f"not an image ({end})"])}


def foreign_photos(folder: Folder) -> list[str]:
    """Return the endings of photos in a folder, and below it, that Pillow cannot decode."""
    found = {splitext(name)[1].lower() for each in folder.walk() for name in each.others}
    return [ending for ending in _FOREIGN_PHOTOS if ending in found]
