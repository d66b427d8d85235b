"""Reading images by their address, from any worker, process or thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpc_imagenet.datastore import hardlink_check
from hpc_imagenet.datastore.index import Index, open_index
from hpc_imagenet.datastore.manifest import Manifest, load_manifest
from hpc_imagenet.datastore.reader.shard_reader import FolderShards, ShardReader
from hpc_imagenet.errors import UserError

TAR_BLOCK = 512


class DatasetReader:
    """A dataset, opened for reading.

    Args:
        folder: has the manifest and the indexes.
        shards: who reads the shards; None: they are files, where the manifest says. Then a store is cheap
            to open, to pickle and to fork.

    Raises:
        UserError: the folder is no dataset, or a shard is missing, has another size than recorded
            or was written to.
    """

    def __init__(self, folder: Path, shards: ShardReader | None = None) -> None:
        self.folder = folder
        try:
            self.manifest: Manifest = load_manifest(folder)
        except FileNotFoundError:
            raise UserError(f"{folder}: no dataset here (no manifest.json)") from None
        self.shards: ShardReader = shards or folder_shards(folder, self.manifest)

    def open_split(self, name: str) -> SplitReader:
        """Open one split, `train` or `val`."""
        if name not in self.manifest.splits:
            raise UserError(f"{self.folder}: no split {name}; there are {', '.join(self.manifest.splits)}")
        return SplitReader(self, open_index(self.folder / self.manifest.splits[name].index.path))

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`.

        Raises:
            UserError: the shard ends before.
        """
        return self.shards.read(shard, offset, length)


def folder_shards(folder: Path, manifest: Manifest) -> FolderShards:
    """Open the shards of a manifest as files of its folder.

    Raises:
        UserError: one is missing, has another size than recorded or was written to.
    """
    opened = FolderShards(folder, manifest.shards)
    hardlink_check.check_links(folder, manifest)
    return opened


class SplitReader:
    """The images of one split in index order.

    Attributes:
        index: shape [images], dtype `index.ENTRY`.
    """

    def __init__(self, store: DatasetReader, index: Index) -> None:
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

    def reread(self, i: int, data: bytes) -> bytes:
        """Return image `i` once more, from where its copy on this node came; `data` cannot be decoded."""
        offset, length, _, shard = self.index[i].item()
        return self.store.shards.reread(shard, offset, length, data)

    def name(self, i: int) -> str:
        """Return the file name of image `i`, from its tar header (at most 100 bytes are kept there)."""
        offset, _, _, shard = self.index[i].item()
        header = self.store.read(shard, offset - TAR_BLOCK, TAR_BLOCK)
        return header[:100].rstrip(b"\0").decode(errors="replace").rsplit("/", 1)[-1]
