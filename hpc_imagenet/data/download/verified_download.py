"""Verify a downloaded archive: hash it while it is written, then compare, write its receipt and rename it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.expected import ExpectedArchive, check_complete, quarantine
from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.data.download.streaming_hash import StreamingHash
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk

log = logging.getLogger(__name__)


def download_and_verify(
    expected: ExpectedArchive,
    target: Path,
    url: str,
    source: str,
    fill: Callable[[PartialFile], int],
    progress: Callable[[int], None],
) -> int:
    """Fill a partial file, verify it, write its receipt and rename it to `target`.

    Args:
        expected: the expected archive.
        target: final path.
        url: URL of the archive; bytes of an earlier attempt from another URL are discarded.
        source: origin recorded in the receipt.
        fill: function that writes all missing bytes; returns the number of bytes transferred.
        progress: called with the number of bytes downloaded, while the last of them are hashed.

    Returns:
        bytes transferred.

    Raises:
        UserError: the archive is not the expected one; it is renamed to `<target>.bad`.
    """
    with PartialFile(target) as part, disk.explain_disk_full(target.parent):
        if part.origin and part.origin.url != url:
            log.warning(
                "%s: restarting the download: %s has bytes from %s", target, part.path.name, part.origin.url
            )
            part.clear()
        with StreamingHash(part) as streaming_hash:
            transferred = fill(part)
            md5 = streaming_hash.result(lambda: progress(part.size))
        stat = part.stat()
        try:
            check_complete(part.path, expected, md5, url)
        except UserError as error:
            part.discard_state()
            raise quarantine(part.path, target, error) from None
        state = (part.origin and part.origin.etag) or ""
        receipt.write_receipt(target, md5, source, expected.md5_source, stat, state)
        part.finalize()
    return transferred
