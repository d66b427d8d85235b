"""Tar archives that are not stored: any byte is computed from the names, sizes and contents of the files.

So archives of class folders are downloaded like those of a server: in parallel ranges, resumed after a kill,
and hashed on the way. Equal files make equal bytes: there are no owners and times, and the order is given.
Format: POSIX.1-1988 ustar, long names as in GNU tar.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hpc_imagenet.data.sources.range_source import TransientError
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.tar_header import BLOCK, END, member_header, tar_member

Offsets = npt.NDArray[np.int64]


class VirtualFile(Protocol):
    """A file whose bytes are computed when they are read.

    Attributes:
        length: size in bytes.
        state: hash of the inputs; equal states mean equal bytes.
    """

    length: int
    state: str

    def read_from(self, at: int) -> bytes:
        """Return at least one byte from offset `at` on."""


class InMemoryFile:
    """A file in memory; a `VirtualFile`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.length = len(data)
        self.state = hashlib.sha256(data).hexdigest()

    def read_from(self, at: int) -> bytes:
        """Return the bytes from offset `at` on."""
        return self._data[at:]


class VirtualTar:
    """A tar of files; a `VirtualFile`.

    Args:
        root: folder that `paths` are relative to.
        names: names of the members.
        paths: paths of the files; an absolute one is that of a copy, whose name says what is in it.
        sizes: sizes of the files in bytes.
        times: mtimes of the files in ns.
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
        digest = hashlib.sha256()
        for name, path, size, time in zip(names, paths, sizes, times, strict=True):
            # Not where a copy is: that is in the workspace, which may be moved.
            stated = posixpath.basename(path) if posixpath.isabs(path) else path
            digest.update(f"{name}\0{stated}\0{size}\0{time}\n".encode("utf-8", "surrogateescape"))
        self.state = digest.hexdigest()

    def read_from(self, at: int) -> bytes:
        """Return the rest of the member that contains offset `at`."""
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
            raise UserError(
                f"{path}: {error.strerror}, while an archive was made of dataset.source; make the file "
                "readable or remove it, then run the same command again"
            ) from None
        except OSError as error:  # network file systems have transient errors
            raise TransientError(f"{path}: {error.strerror}") from None
        if len(data) != size:
            raise UserError(
                f"{path}: changed from {size} to {len(data)} bytes while an archive was made of "
                "dataset.source; run the same command again once the files are complete"
            )
        return data


class VirtualTarOfTars:
    """A tar of one tar per class, named `<wnid>.tar`; a `VirtualFile`."""

    def __init__(self, classes: dict[str, VirtualTar]) -> None:
        self._headers = [member_header(f"{wnid}.tar", tar.length) for wnid, tar in classes.items()]
        self._tars = list(classes.values())
        lengths = [len(header) + tar.length for header, tar in zip(self._headers, self._tars, strict=True)]
        self._begins = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self.length = int(self._begins[-1]) + len(END)
        states = (f"{wnid} {tar.state}\n" for wnid, tar in classes.items())
        self.state = hashlib.sha256("".join(states).encode()).hexdigest()

    def read_from(self, at: int) -> bytes:
        """Return at least one byte of the class that contains offset `at`."""
        i = int(np.searchsorted(self._begins, at, "right")) - 1
        within = at - int(self._begins[i])
        if i == len(self._tars):
            return END[within:]
        header = self._headers[i]
        return header[within:] if within < len(header) else self._tars[i].read_from(within - len(header))


def member_offsets(names: Sequence[str], sizes: Offsets) -> tuple[Offsets, int]:
    """Return the offsets of the members of a tar, of shape [members], and the size of the tar in bytes."""
    headers = np.full(len(names), BLOCK, np.int64)
    for i, name in enumerate(names):
        if len(name) > 25 and len(name.encode("utf-8", "surrogateescape")) > 100:
            headers[i] = len(member_header(name, 0))
    ends = np.cumsum(headers + sizes + -sizes % BLOCK)
    if not len(names):
        return ends, len(END)
    return np.concatenate(([0], ends[:-1])), int(ends[-1]) + len(END)
