"""A source of archives that are made of image files, and computed while they are read."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.expected import set_aside
from hpc_imagenet.data.sources.range_source import ContentChanged, NotAvailable, Origin
from hpc_imagenet.data.sources.virtual_tar import VirtualFile


class VirtualArchives(ABC):
    """Archives made of the files of a folder; a `RangeSource`.

    Args:
        root: folder of the files, for logs and errors.
        prefix: origin recorded in the receipts.
        files: split (train, val, devkit …) → file name of its archive.
    """

    def __init__(self, root: Path, prefix: str, files: dict[str, str]) -> None:
        self.prefix = prefix
        self.reached = True
        self._root = root
        self._split_of = {file: split for split, file in files.items()}

    @abstractmethod
    def make(self) -> dict[str, VirtualFile]:
        """List the files, and return the archives by split."""

    @cached_property
    def _archives(self) -> dict[str, VirtualFile]:
        return self.make()  # once, as listing a million files is slow

    def is_outdated(self, folder: Path) -> bool:
        """Whether an archive in a folder was made of files which have changed since."""
        return any(
            receipt.is_outdated(folder / file, self.prefix, self._archives[split].state)
            for file, split in self._split_of.items()
        )

    def remove_outdated(self, folder: Path) -> None:
        """Remove the archives in a folder that were made of files which have changed since.

        Beside the new ones they would have images of other splits, or not fit the labels. What one without a
        receipt was made of is unknown: it is kept as `<file>.bad`.
        """
        for file, split in self._split_of.items():
            path = folder / file
            if path.exists() and receipt.load_receipt(path) is None:
                bad = set_aside(path, path)
                print(f"{path}: what it was made of is unknown; kept as {bad}, making it again", flush=True)
            receipt.remove_outdated(folder / file, self.prefix, self._archives[split].state)

    def url(self, file: str) -> str:
        """Return the name of an archive in logs, errors and the state file."""
        return f"{self._root} as {file}"

    def size(self, file: str) -> int | None:
        """Return the size of an archive in bytes."""
        return self._archives[self._split_of[file]].length

    @contextlib.contextmanager
    def open(
        self, file: str, begin: int = 0, end: int | None = None, origin: Origin | None = None
    ) -> Iterator[_VirtualResponse]:
        """Compute bytes [begin, end) of an archive; see `RangeSource.open`."""
        if file not in self._split_of:  # such as md5sums
            raise NotAvailable(404)
        virtual = self._archives[self._split_of[file]]
        current = Origin(self.url(file), virtual.state, None, virtual.length, ranges=True)
        if origin and not origin.matches(current):
            raise ContentChanged("the files have changed")
        stop = virtual.length if end is None else min(end, virtual.length)
        yield _VirtualResponse(virtual, begin, stop, current, end is not None)


class _VirtualResponse:
    """Bytes [at, end) of a virtual archive; a `Response`."""

    content_type = ""

    def __init__(self, virtual: VirtualFile, at: int, end: int, origin: Origin, ranged: bool) -> None:
        self._virtual, self._at = virtual, at
        self.origin, self.ranged = origin, ranged
        self.end: int | None = end
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`; b"" at the end."""
        size = min(size, (self.end or 0) - self._at)
        if size <= 0:
            return b""
        data = self._rest or self._virtual.read_from(self._at)
        data, self._rest = data[:size], data[size:]
        self._at += len(data)
        return data

    def close(self) -> None:
        """Do nothing: reads of files do not stall."""
