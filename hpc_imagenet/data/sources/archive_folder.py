"""A folder of archives as a source: they are verified in place and linked into the workspace, not copied."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.expected import (
    TEXT_LIMIT,
    ExpectedArchive,
    check_complete,
    md5_of_file,
    quarantine,
)
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import sync_folder


class ArchiveFolder:
    """A folder that contains archives.

    Args:
        folder: path of the folder.
        source: dataset.source; written to the receipts.
    """

    copies = False

    def __init__(self, folder: Path, source: str) -> None:
        self._folder = folder
        self._source = source

    def text(self, file: str) -> str | None:
        """Return the first 1 MiB of a small text file; None if it does not exist.

        Raises:
            UserError: it is not a readable file.
        """
        path = self._folder / file
        try:
            if not path.is_file() and path.exists():
                raise UserError(f"{path} is not a file: remove or rename it")
            with path.open(errors="replace") as text:
                return text.read(TEXT_LIMIT)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError:
            raise
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None

    def size(self, expected: ExpectedArchive) -> int | None:
        """Return the size of an archive in bytes; None if it does not exist."""
        path = self._folder / expected.file
        return path.stat().st_size if path.is_file() else None

    def fetch(self, expected: ExpectedArchive, target: Path, progress: Callable[[int], None]) -> int:
        """Verify an archive in place, link it to `target` and write its receipt.

        Returns:
            bytes transferred over the network: 0.

        Raises:
            UserError: the file does not exist, or is not the expected archive.
        """
        path = self._folder / expected.file
        if not path.is_file():
            raise UserError(
                f"{path}: no such file ({_describe_folder(self._folder)}); set {expected.setting}.file or "
                "dataset.source, or for a folder of images dataset=images"
            )
        path = path.resolve()
        verify_and_record(path, expected, target, self._source, progress)
        _link(path, target)
        return 0


class _StillChangingError(UserError):
    """A file was modified while it was read."""


def verify_in_place(
    target: Path, expected: ExpectedArchive, source: str, progress: Callable[[int], None]
) -> None:
    """Verify an archive that exists at its final path without a valid receipt, and write the receipt.

    Raises:
        UserError: it is not the expected archive; it is renamed to `<target>.bad`, unless it still changes.
    """
    try:
        verify_and_record(target, expected, target, source, progress)
    except _StillChangingError:
        raise  # another program writes to it, under this name
    except UserError as error:
        raise quarantine(target, target, error) from None


def verify_and_record(
    path: Path, expected: ExpectedArchive, target: Path, source: str, progress: Callable[[int], None]
) -> None:
    """Verify the archive at `path` and write the receipt of `target`.

    Raises:
        UserError: it is not the expected archive, or it was modified while it was read.
    """
    before = path.stat()
    md5 = md5_of_file(path, progress)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise _StillChangingError(
            f"{path}: changed while it was read; run the same command again once it is complete"
        )
    check_complete(path, expected, md5, str(path))
    receipt.write_receipt(target, md5, source, expected.md5_source, before)


def _link(path: Path, target: Path) -> None:
    # A hard link survives the removal of the source. It is impossible across file systems, and for files of
    # another owner if the kernel protects hard links; then a symbolic link is made.
    link = target.with_name(f".{target.name}.link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        link.symlink_to(path)
    link.replace(target)
    sync_folder(target.parent)


def _describe_folder(folder: Path) -> str:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except NotADirectoryError:
        return f"{folder} is not a folder"
    except FileNotFoundError:
        return f"the folder {folder} does not exist"
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"the folder contains {shown}" if names else "the folder is empty"
