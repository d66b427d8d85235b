"""The packed index: the address of every image of a split, 16 bytes per image, memory-mapped.

An image's address is (shard, offset, length). A shard is an uncompressed tar and `offset` is the image's
first byte in it, so the tar header, which contains the file name, is the 512 bytes before `offset`. The index
of 1.28 million images has 20.5 MB, opens in well under a millisecond and is shared between all processes of a
node by the page cache. The file format is NumPy's .npy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc_imagenet.errors import UserError, first_line
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.io.printable import error_line

ENTRY = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<u2"), ("shard", "<u2")])

Index = npt.NDArray[Any]  # shape [images], dtype ENTRY


def write_index(path: Path, entries: Index) -> None:
    """Write `entries` (shape [images], dtype `ENTRY`) to `path` atomically."""
    if entries.dtype != ENTRY or entries.ndim != 1:
        raise TypeError(f"an index has one dimension of {ENTRY}, not {entries.ndim} of {entries.dtype}")
    with atomic_write(path) as file:
        np.save(file, entries, allow_pickle=False)


def open_index(path: Path) -> Index:
    """Map the index at `path` into memory, read-only.

    Raises:
        UserError: the file does not exist or is not an index.
    """
    try:
        entries: Index = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such index; create it with +stage=process") from None
    except OSError:
        raise
    except Exception as error:
        # NumPy evaluates the header as Python, which raises many kinds of errors for a damaged one. An index
        # of zero images cannot be mapped, but an empty split is not a dataset either.
        reason = error_line(first_line(error))
        raise UserError(f"{path}: not an index ({reason}); recreate it with +stage=process") from None
    if entries.dtype != ENTRY or entries.ndim != 1:
        raise UserError(
            f"{path}: not an index (dtype {entries.dtype}, {entries.ndim} dimensions); "
            "recreate it with +stage=process"
        )
    return entries
