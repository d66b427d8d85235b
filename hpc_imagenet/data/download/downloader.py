"""Download archives, resumed and retried (transfer.py) and verified (verified_download.py)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from hpc_imagenet.data.download.download_retry import DownloadRetry
from hpc_imagenet.data.download.expected import TEXT_LIMIT, ExpectedArchive
from hpc_imagenet.data.download.file_type import is_html
from hpc_imagenet.data.download.range_scheduler import SIZES, TransferSizes
from hpc_imagenet.data.download.rate_limit import RateLimiter
from hpc_imagenet.data.download.transfer import Transfer
from hpc_imagenet.data.download.verified_download import download_and_verify
from hpc_imagenet.data.sources.range_source import (
    ContentChanged,
    NotAvailable,
    RangeSource,
    TransientError,
)
from hpc_imagenet.io.printable import error_line

log = logging.getLogger(__name__)

MIN_RATE = 1000  # bytes per second


class Downloader:
    """Downloads archives from a source that serves byte ranges.

    Args:
        source: source of the bytes.
        retries: retries in a row without a new byte before giving up.
        timeout: seconds without a byte after which a connection counts as broken.
        connections: number of parallel connections.
        limit: bytes per second, all connections together; None for no limit.
        hint: dataset.hint, appended to errors.
        origin: origin for the receipts; empty: the prefix of the source.
        sleep: function that waits between attempts; None for a wait that ends with the download.
        sizes: sizes of ranges and reads.
        min_rate: bytes per second; a connection below that for a whole `timeout` counts as broken.
    """

    copies = True

    def __init__(
        self,
        source: RangeSource,
        retries: int,
        timeout: float,
        *,
        connections: int = 1,
        limit: float | None = None,
        hint: str = "",
        origin: str = "",
        sleep: Callable[[float], object] | None = None,
        sizes: TransferSizes = SIZES,
        min_rate: float = MIN_RATE,
    ) -> None:
        self.source = source
        self.retries = retries
        self.timeout = timeout
        self.connections = connections
        self.rate_limiter = RateLimiter(limit)
        self.hint = hint
        self.origin = origin or source.prefix
        self.tail = f"; {hint}" if hint else ""
        self.sleep = sleep
        self.sizes = sizes
        self.min_rate = min_rate

    def text(self, file: str) -> str | None:
        """Return the content of a small text file; None if it does not exist.

        Raises:
            UserError: the source cannot be reached.
        """
        retry = self.new_retry(file, lambda: 0, time.sleep)
        while True:
            content = b""
            try:
                with self.source.open(file) as response:
                    while len(content) < TEXT_LIMIT and (data := response.read(TEXT_LIMIT - len(content))):
                        content += data
            except TransientError as error:
                retry.wait_or_raise(error)
            except ContentChanged:
                return None
            except NotAvailable as error:
                # S3 also answers 403 for a file that does not exist, so this cannot be an error.
                if error.status not in (404, 410):
                    _warn_unread(self.source.url(file), str(error))
                return None
            else:
                if is_html(content):
                    _warn_unread(self.source.url(file), "an HTML page")
                    return None
                return content.decode("utf-8", "replace")

    def size(self, expected: ExpectedArchive) -> int | None:
        """Return the size of an archive in bytes; None if the source does not report it."""
        try:
            return self.source.size(expected.file)
        except (TransientError, NotAvailable):
            return None

    def new_retry(
        self, file: str, size: Callable[[], int], sleep: Callable[[float], object]
    ) -> DownloadRetry:
        """Return the retry counter of one file.

        Args:
            file: name of the file.
            size: function that returns how many bytes have been downloaded.
            sleep: function that waits, unless the downloader has its own.
        """
        return DownloadRetry(self.source, file, self.retries, size, self.sleep or sleep, self.tail)

    def fetch(self, expected: ExpectedArchive, target: Path, progress: Callable[[int], None]) -> int:
        """Download an archive to `target`, verify it and write its receipt.

        Args:
            expected: the expected archive.
            target: final path; the bytes are in `<target>.part` until the archive is complete.
            progress: called with the number of bytes of the archive that are downloaded.

        Returns:
            bytes transferred.

        Raises:
            UserError: the download failed, or the archive is not the expected one.
        """
        url = self.source.url(expected.file)
        return download_and_verify(
            expected,
            target,
            url,
            self.origin,
            lambda part: Transfer(self, expected, part, progress).run(),
            progress,
        )


def _warn_unread(url: str, reason: str) -> None:
    print(
        f"warning: {error_line(url)} cannot be read ({reason}): archives are not compared with it", flush=True
    )
