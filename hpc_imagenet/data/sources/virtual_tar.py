"""Tars that are not written yet: from names and sizes alone it is known which byte lies where.

So the archives of loose files are fetched like those of a server: in ranges side by side, taken up after a
kill, hashed on the way. The same files always make the same bytes: no owner, no time, files in the given
order.
Format: POSIX.1-1988 ustar, long names as GNU tar writes them.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hpc_imagenet.data.sources.range_source import TransientError
from hpc_imagenet.data.tar.tar_reader import BLOCK
from hpc_imagenet.errors import UserError

END = bytes(2 * BLOCK)
Offsets = npt.NDArray[np.int64]


class VirtualFile(Protocol):
    """A file of `length` bytes; `state` names which bytes."""

    length: int
    state: str

    def read_from(self, at: int) -> bytes:
        """Return some bytes from byte `at` on, at least one of them."""


class InMemoryFile:
    """A file that is in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.length = len(data)
        self.state = hashlib.sha256(data).hexdigest()

    def read_from(self, at: int) -> bytes:
        """Return the bytes from `at` on."""
        return self._data[at:]


class VirtualTar:
    """A tar of files.

    Args:
        root: the folder of all `paths`.
        names: of the members.
        paths: of the files, relative to `root`.
        sizes: bytes of the files.
        times: when they were changed, in ns.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        paths: Sequence[str],
        sizes: Sequence[int],
        times: Sequence[int],
    ) -> None:
        self._root, self._names, self._paths = root, names, paths
        self._sizes = np.array(sizes, np.int64)
        self._begins, self.length = member_offsets(names, self._sizes)
        told = hashlib.sha256()
        for name, path, size, time in zip(names, paths, sizes, times, strict=True):
            told.update(f"{name}\0{path}\0{size}\0{time}\n".encode("utf-8", "surrogateescape"))
        self.state = told.hexdigest()

    def read_from(self, at: int) -> bytes:
        """Return the rest of the member in which byte `at` lies."""
        i = int(np.searchsorted(self._begins, at, "right")) - 1
        begin = int(self._begins[i]) if i >= 0 else 0
        if at >= self.length - len(END):
            return END[at - (self.length - len(END)) :]
        size = int(self._sizes[i])
        return tar_member(self._names[i], self._read(self._paths[i], size))[at - begin :]

    def _read(self, relative: str, size: int) -> bytes:
        path = self._root / relative
        try:
            data = path.read_bytes()
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"{path}: {error.strerror}, while archives were made of it") from None
        except OSError as error:  # a file system over a network has its moments
            raise TransientError(f"{path}: {error.strerror}") from None
        if len(data) != size:
            raise UserError(
                f"{path}: had {size} bytes and has {len(data)}: it changes; ask again when it rests"
            )
        return data


class VirtualTarOfTars:
    """A tar of one tar a class, named `<wnid>.tar`."""

    def __init__(self, classes: dict[str, VirtualTar]) -> None:
        self._heads = [long_name_header(f"{wnid}.tar", tar.length) for wnid, tar in classes.items()]
        self._tars = list(classes.values())
        lengths = [len(head) + tar.length for head, tar in zip(self._heads, self._tars, strict=True)]
        self._begins = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self.length = int(self._begins[-1]) + len(END)
        states = (f"{wnid} {tar.state}\n" for wnid, tar in classes.items())
        self.state = hashlib.sha256("".join(states).encode()).hexdigest()

    def read_from(self, at: int) -> bytes:
        """Return some bytes of the class in which byte `at` lies."""
        i = int(np.searchsorted(self._begins, at, "right")) - 1
        within = at - int(self._begins[i])
        if i == len(self._tars):
            return END[within:]
        head = self._heads[i]
        return head[within:] if within < len(head) else self._tars[i].read_from(within - len(head))


def long_name_header(name: str, size: int) -> bytes:
    """Return the header of a member: one block, three where the name is longer than 100 bytes."""
    info = tarfile.TarInfo(name)  # no owner and no time but zero
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def tar_member(name: str, data: bytes) -> bytes:
    """Return a whole member: header, bytes, and zeros up to a whole block."""
    return long_name_header(name, len(data)) + data + bytes(-len(data) % BLOCK)


def member_offsets(names: Sequence[str], sizes: Offsets) -> tuple[Offsets, int]:
    """Return where the members of a tar begin, of shape [members], and the length of the tar."""
    heads = np.full(len(names), BLOCK, np.int64)
    for i, name in enumerate(names):
        if len(name) > 25 and len(name.encode("utf-8", "surrogateescape")) > 100:
            heads[i] = len(long_name_header(name, 0))
    ends = np.cumsum(heads + sizes + -sizes % BLOCK)
    if not len(names):
        return ends, len(END)
    return np.concatenate(([0], ends[:-1])), int(ends[-1]) + len(END)
