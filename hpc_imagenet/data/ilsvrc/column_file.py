"""A column of a table in a temporary file: an array that grows, and needs no memory of the process.

The array is mapped from the file, so the kernel keeps of it what fits into memory. With 44 bytes per image, a
scan of ImageNet-21k would otherwise take 0.6 GB.
"""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import is_disk_full

CHUNK = 1 << 16  # rows that are converted at a time

Array = npt.NDArray[Any]


class ColumnFile:
    """An array of one dimension that is written part by part, in $TMPDIR.

    The file has no name, so that nothing remains of it when the process ends, however it ends.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - mapped as long as the array is used
        self._dtype: np.dtype[Any] | None = None
        self._rows = 0

    def __del__(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take is written again
            self._file.close()

    def append(self, part: Array) -> None:
        """Append rows. Parts have one dtype; of strings the longest one decides.

        Raises:
            UserError: the disk of $TMPDIR is full.
        """
        try:
            if self._dtype is None:
                self._dtype = part.dtype
            elif part.dtype.itemsize > self._dtype.itemsize:
                self._widen(part.dtype)
            self._file.write(part.astype(self._dtype, copy=False).tobytes())
            self._file.flush()
            self._rows += len(part)
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise UserError(
                f"no space left in {tempfile.gettempdir()} for the list of images: free some space there, or "
                "set TMPDIR to another folder"
            ) from None

    def array(self) -> Array:
        """Return all rows, shape [rows], mapped from the file; changes of the array do not reach the file."""
        if self._dtype is None or not self._rows:
            return np.empty(0, self._dtype or np.uint8)
        return np.memmap(self._file, self._dtype, "c", shape=(self._rows,))

    def _widen(self, dtype: np.dtype[Any]) -> None:
        old = self.array()
        self._file.close()  # what is mapped remains
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        for begin in range(0, self._rows, CHUNK):
            self._file.write(old[begin : begin + CHUNK].astype(dtype).tobytes())
        self._dtype = dtype
