"""The images of a datastore as arrays, for notebooks and scripts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from hpc_imagenet.cluster.dist_env import available_cpus, from_environment
from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.datastore.open_dataset import open_dataset
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.datastore.versions import Version
from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.training.loading.batch_loader import BatchBuilder, BatchLoader
from hpc_imagenet.training.loading.crop import CenterCrop
from hpc_imagenet.training.loading.decode import EncodedImage, Pixels

Labels = npt.NDArray[np.int64]  # [images]


class ImageStore:
    """An opened datastore; `store["train"]` is a split.

    Args:
        version: version to open.
        scratch: folder on this machine's disk for copies of shards, which a datastore behind ssh needs.
        url: `datastore.url` for jobs, if `version` is a copy on this machine.

    Attributes:
        name: name of the datastore.
        version: number of the version.
        classes: names of the classes, in label order.
        ids: wnid or other id of each class, in label order.
        splits: number of images by split.
        settings: settings of a training on it, for `submit`.
        reader: reader of the encoded images.

    Raises:
        UserError: the datastore cannot be read from this machine.
    """

    def __init__(self, version: Version, scratch: str | None = None, url: str | None = None) -> None:
        self.name, self.version, manifest = version.name, version.number, version.manifest
        self.classes = tuple(", ".join(entry.names) for entry in manifest.classes)
        self.ids = tuple(entry.wnid for entry in manifest.classes)
        self.splits = {name: split.images for name, split in manifest.splits.items()}
        self.settings = (f"datastore.url={url or version.backend.url}", f"datastore.name={self}")
        self._stack = contextlib.ExitStack()
        opened = open_dataset(version, Cluster(scratch=scratch), stages=True)
        self.reader: DatasetReader = self._stack.enter_context(opened)

    def __str__(self) -> str:
        return f"{self.name}@v{self.version}"

    def __repr__(self) -> str:
        splits = ", ".join(f"{name}: {images:,}" for name, images in self.splits.items())
        return f"<{self}: {len(self.classes):,} classes, {splits} images>"

    def __getitem__(self, split: str) -> ImageSplit:
        if split not in self.splits:
            raise UserError(f"{self} has no split {split}{did_you_mean(split, self.splits)}")
        return ImageSplit(self, split)

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove temporary files and stop copying, where the datastore is on another machine."""
        self._stack.close()


class ImageSplit(Sequence[tuple[Pixels, int]]):
    """The images of one split: `split[i]` is (pixels, label), the pixels uint8 [height, width, 3], RGB.

    Attributes:
        store: its datastore.
        name: train, val or test.
        labels: label of each image.
    """

    def __init__(self, store: ImageStore, name: str) -> None:
        self.store, self.name = store, name
        self._reader: SplitReader = store.reader.open_split(name)
        self.labels: Labels = self._reader.index["label"].astype(np.int64)

    def __repr__(self) -> str:
        return f"<{self.name} of {self.store}: {len(self):,} images>"

    def __len__(self) -> int:
        return len(self._reader)

    @overload
    def __getitem__(self, index: int) -> tuple[Pixels, int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[Pixels, int]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        data, label = self._reader.read(self._position(index))
        try:
            image = EncodedImage(data)
            return image.pixels((0, 0, image.width, image.height)).copy(), label
        except ValueError as error:
            raise UserError(f"{self.file_name(index)} of {self.store} cannot be decoded ({error})") from None

    def file(self, index: int) -> bytes:
        """Return the encoded bytes of an image."""
        return self._reader.read(self._position(index))[0]

    def file_name(self, index: int) -> str:
        """Return the file name of an image."""
        return self._reader.name(self._position(index))

    def counts(self) -> Labels:
        """Return the number of images of each class, [classes]."""
        return np.bincount(self.labels, minlength=len(self.store.classes)).astype(np.int64)

    def batches(
        self, size: int, batch: int = 64, resize: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[tuple[Pixels, Labels]]:
        """Yield all images as batches: pixels uint8 [batch, size, size, 3], RGB, and labels [batch].

        Args:
            size: px, side of the centre crop.
            batch: images per batch; the last one may have fewer.
            resize: px, short side before the crop; None: `size`.
            shuffle_seed: seed of the order; None: the order of the datastore.

        Raises:
            UserError: an image is unreadable, or there is no batch of this size.
        """
        for name, value in (("size", size), ("batch", batch), ("resize", resize or size)):
            if value < 1:
                raise UserError(f"batches: {name}={value} is less than 1")
        if resize is not None and resize < size:
            raise UserError(f"batches: resize={resize} is less than size={size}: set at least {size}")
        order = np.arange(len(self))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        keys: Any = [
            [(0, int(i)) for i in order[first : first + batch]] for first in range(0, len(order), batch)
        ]
        crop = CenterCrop(size, resize or size)
        threads = available_cpus(from_environment()) - 1
        for pixels, labels in BatchLoader(BatchBuilder(self._reader, crop, seed=0), keys, threads):
            yield pixels.permute(0, 2, 3, 1).numpy(), labels.numpy()

    def _position(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} is not among the {len(self)} images of {self.name}")
        return index % len(self)
