"""Reading images by their address: one `pread` an image, from any worker, process or thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hpc_imagenet.datastore import links
from hpc_imagenet.datastore.index import Index, open_index
from hpc_imagenet.datastore.manifest import Manifest, load_manifest
from hpc_imagenet.errors import UserError

TAR_BLOCK = 512


class Store:
    """A folder with a manifest, opened for reading. Cheap to open, to pickle and to fork.

    Raises:
        UserError: the folder is no dataset, or a shard is missing, has another size than recorded
            or was written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: Manifest = load_manifest(folder)
        except FileNotFoundError:
            raise UserError(f"{folder}: no dataset here (no manifest.json)") from None
        self.shards = [folder / shard.path for shard in self.manifest.shards]
        for path, shard in zip(self.shards, self.manifest.shards, strict=True):
            found = path.stat().st_size if path.exists() else None
            if found != shard.bytes:
                was = "is missing" if found is None else f"has {found} bytes instead of {shard.bytes}"
                raise UserError(f"{path} {was}: make the dataset again")
        links.check(folder, self.manifest)
        self._descriptors: dict[int, int] = {}

    def __getstate__(self) -> dict[str, object]:
        """Leave the open files behind: another process opens its own."""
        return {**self.__dict__, "_descriptors": {}}

    def split(self, name: str) -> Split:
        """Open one split, `train` or `val`."""
        if name not in self.manifest.splits:
            raise UserError(f"{self.folder}: no split {name}; there are {', '.join(self.manifest.splits)}")
        return Split(self, open_index(self.folder / self.manifest.splits[name].index.path))

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`.

        Raises:
            UserError: the shard ends before.
        """
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            descriptor = self._descriptors.setdefault(shard, os.open(self.shards[shard], os.O_RDONLY))
        data = os.pread(descriptor, length, offset)
        if len(data) != length:
            raise UserError(f"{self.shards[shard]}: ends inside the image at byte {offset}")
        return data


class Split:
    """The images of one split in index order.

    Attributes:
        index: shape [images], dtype `index.ENTRY`.
    """

    def __init__(self, store: Store, index: Index) -> None:
        self.store = store
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        return (self.read(i) for i in range(len(self)))

    def read(self, i: int) -> tuple[bytes, int]:
        """Return image `i` as encoded bytes, and its label."""
        offset, length, label, shard = self.index[i].item()
        return self.store.read(shard, offset, length), label

    def name(self, i: int) -> str:
        """Return the file name of image `i`, from its tar header (at most 100 bytes are kept there)."""
        offset, _, _, shard = self.index[i].item()
        header = self.store.read(shard, offset - TAR_BLOCK, TAR_BLOCK)
        return header[:100].rstrip(b"\0").decode(errors="replace").rsplit("/", 1)[-1]
