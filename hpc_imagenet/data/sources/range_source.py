"""The interface of sources that serve byte ranges of files: an HTTP server, an S3 bucket, class folders."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Origin:
    """The URL, validators and size of a file at its source; equal validators mean equal bytes."""

    url: str  # without secrets: it is written to the state file and to errors
    etag: str | None = None
    modified: str | None = None  # Last-Modified
    total: int | None = None  # bytes
    ranges: bool = False  # whether the source serves byte ranges

    @property
    def validator(self) -> str | None:
        """A strong ETag, else the modification date, else None."""
        # RFC 9110, 13.1.5: equal weak ETags do not guarantee equal bytes.
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    @property
    def resumable(self) -> bool:
        """Whether ranges can be requested and verified to belong to the same version of the file."""
        return self.ranges and self.validator is not None and self.total is not None

    def matches(self, other: Origin) -> bool:
        """Whether no field that is known on both sides differs."""
        mine, theirs = (self.etag, self.modified, self.total), (other.etag, other.modified, other.total)
        return all(a == b for a, b in zip(mine, theirs, strict=True) if None not in (a, b))


class Response(Protocol):
    """Bytes [begin, end) of a file, or the whole file if `ranged` is False."""

    origin: Origin
    ranged: bool
    end: int | None  # None: unknown
    content_type: str  # the media type, or ""

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`; b"" at the end.

        Raises:
            TransientError: the connection failed.
        """

    def close(self) -> None:
        """Abort a `read` that is blocked in another thread."""


class RangeSource(Protocol):
    """Files under a URL prefix.

    Attributes:
        prefix: dataset.source; written to the receipts.
        reached: whether any request has been answered yet.
    """

    prefix: str
    reached: bool

    def url(self, file: str) -> str:
        """Return the name of a file in logs, errors and the state file."""

    def size(self, file: str) -> int | None:
        """Return the size of a file in bytes; None if unknown without fetching it.

        Raises:
            TransientError, NotAvailable: see `open`.
        """

    def open(
        self, file: str, begin: int = 0, end: int | None = None, origin: Origin | None = None
    ) -> AbstractContextManager[Response]:
        """Request bytes [begin, end) of a file, or the whole file if `end` is None.

        Args:
            file: name under the prefix.
            begin: offset of the first byte.
            end: offset after the last byte.
            origin: expected state of the file.

        Raises:
            TransientError: the request failed and may succeed later.
            ContentChanged: the file is in another state, or is shorter than `begin`.
            NotAvailable: the file does not exist or access is denied.
            UserError: the prefix is invalid.
        """


class TransientError(Exception):
    """A request failed and may succeed later.

    Args:
        reason: one line.
        wait: seconds to wait as requested by the server (Retry-After).
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class ContentChanged(Exception):
    """The file is not the one whose download was started; the download has to restart."""


class NotAvailable(Exception):
    """The server refused the request for good, with an HTTP status such as 403 or 404."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status
