"""Read images by index, from any worker, process or thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpc_imagenet.datastore import hardlink_check
from hpc_imagenet.datastore.index import Index, open_index
from hpc_imagenet.datastore.manifest import Manifest, load_manifest
from hpc_imagenet.datastore.reader.shard_reader import FolderShards, ShardReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.tar_header import BLOCK, name_before


class DatasetReader:
    """A dataset opened for reading.

    Args:
        folder: folder with the manifest and the indexes.
        shards: reader of the shards; None: `FolderShards` at the paths in the manifest. A reader of a folder
            is cheap to open, to pickle and to fork.

    Raises:
        UserError: the folder is not a dataset, or a shard is missing, has another size than recorded or was
            modified after the upload.
    """

    def __init__(self, folder: Path, shards: ShardReader | None = None) -> None:
        self.folder = folder
        try:
            self.manifest: Manifest = load_manifest(folder)
        except FileNotFoundError:
            raise UserError(
                f"{folder} is not a dataset (no manifest.json); create it with +stage=process"
            ) from None
        self.shards: ShardReader = shards or folder_shards(folder, self.manifest)

    def open_split(self, name: str) -> SplitReader:
        """Open one split: `train`, `val` or `test`.

        Raises:
            UserError: the dataset has no such split, or its index cannot be read.
        """
        if name not in self.manifest.splits:
            raise UserError(
                f"{self.folder}: no split {name}; it has the splits {', '.join(self.manifest.splits)}"
            )
        return SplitReader(self, open_index(self.folder / self.manifest.splits[name].index.path))


def folder_shards(folder: Path, manifest: Manifest) -> FolderShards:
    """Open the shards of a manifest as files at its paths relative to `folder`.

    Raises:
        UserError: a shard is missing, has another size than recorded or was modified after the upload.
    """
    shards = FolderShards(folder, manifest.shards)
    hardlink_check.check_links(folder, manifest)
    return shards


class SplitReader:
    """The images of one split in index order.

    Attributes:
        store: the dataset that the split belongs to.
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
        """Return the encoded bytes and the label of image `i`."""
        offset, length, label, shard = self.index[i].item()
        return self.store.shards.read(shard, offset, length), label

    def reread(self, i: int, data: bytes) -> bytes:
        """Read image `i` again, from the original source, after `data` failed to decode."""
        offset, length, _, shard = self.index[i].item()
        return self.store.shards.reread(shard, offset, length, data)

    def name(self, i: int) -> str:
        """Return the file name of image `i` from its tar header."""
        offset, _, _, shard = self.index[i].item()
        begin = max(0, offset - 3 * BLOCK)
        blocks = self.store.shards.read(shard, begin, offset - begin)
        return name_before(blocks).decode(errors="replace").rsplit("/", 1)[-1]
