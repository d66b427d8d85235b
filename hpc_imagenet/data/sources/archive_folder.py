"""Archives that lie on a disk already: verified where they are, then linked, never copied."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.expected import ExpectedArchive, check_complete, md5_of_file, quarantine
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import sync_folder


class ArchiveFolder:
    """A folder that holds archives.

    Args:
        folder: dataset.source.
        source: how receipts call it.
    """

    copies = False

    def __init__(self, folder: Path, source: str) -> None:
        self._folder = folder
        self._source = source

    def text(self, file: str) -> str | None:
        """Return a small text file, or None where there is none."""
        try:
            return (self._folder / file).read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, want: ExpectedArchive) -> int | None:
        """Return how many bytes an archive has, or None where it is missing."""
        path = self._folder / want.file
        return path.stat().st_size if path.is_file() else None

    def fetch(self, want: ExpectedArchive, target: Path, progress: Callable[[int], None]) -> int:
        """Verify an archive where it lies and link it to `target`, with its receipt.

        Returns:
            bytes that came over the network: 0.

        Raises:
            UserError: it is not there, or not what is wanted.
        """
        path = self._folder / want.file
        if not path.is_file():
            raise UserError(
                f"{path}: no such file ({_listing(self._folder)}); set {want.setting}.file or dataset.source"
            )
        path = path.resolve()
        verify_and_record(path, want, target, self._source, progress)
        _link(path, target)
        return 0


def verify_in_place(
    target: Path, want: ExpectedArchive, source: str, progress: Callable[[int], None]
) -> None:
    """Verify an archive that is in its final place without a receipt, and write that.

    Raises:
        UserError: it is not what is wanted; it is then kept aside as `<target>.bad`.
    """
    try:
        verify_and_record(target, want, target, source, progress)
    except UserError as error:
        raise quarantine(target, target, error) from None


def verify_and_record(
    path: Path, want: ExpectedArchive, target: Path, source: str, progress: Callable[[int], None]
) -> None:
    """Verify the bytes at `path` and write the receipt of `target`.

    Raises:
        UserError: they are not what is wanted.
    """
    before = path.stat()
    md5 = md5_of_file(path, progress)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path}: changed while it was read; ask again when it rests")
    check_complete(path, want, md5, str(path))
    receipt.write_receipt(target, md5, source, want.md5_source, before)


def _link(path: Path, target: Path) -> None:
    # A hard link survives the removal of the source. Another file system, or another owner where the
    # kernel protects hard links, leaves a symbolic one.
    link = target.with_name(f".{target.name}.link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        link.symlink_to(path)
    link.replace(target)
    sync_folder(target.parent)


def _listing(folder: Path) -> str:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except NotADirectoryError:
        return f"{folder} is no folder"
    except FileNotFoundError:
        return f"there is no folder {folder}"
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"there are {shown}" if names else "the folder is empty"
