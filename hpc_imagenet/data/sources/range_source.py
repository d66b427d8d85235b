"""What a download asks of whoever holds the bytes: a web server, a bucket, a tree of loose files."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Origin:
    """What a remote says about a file; as long as it says the same, the bytes are the same."""

    url: str  # without any secret: it stands in notes and errors
    etag: str | None = None
    modified: str | None = None  # Last-Modified
    total: int | None = None  # bytes
    ranges: bool = False  # whether single ranges are given

    @property
    def validator(self) -> str | None:
        """What names this state of the file: a strong ETag, else the date; None where there is neither."""
        # RFC 9110, 13.1.5: a weak ETag does not promise the same bytes.
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    @property
    def resumable(self) -> bool:
        """Whether single ranges can be asked for, and be known to be of the same file."""
        return self.ranges and self.validator is not None and self.total is not None

    def same(self, other: Origin) -> bool:
        """Whether `other` speaks of the same bytes, as far as both say."""
        mine, theirs = (self.etag, self.modified, self.total), (other.etag, other.modified, other.total)
        return all(a == b for a, b in zip(mine, theirs, strict=True) if None not in (a, b))


class Response(Protocol):
    """Bytes [begin, end) of a file, or the whole of it where `ranged` is False."""

    origin: Origin
    ranged: bool
    end: int | None  # None: unknown
    content_type: str  # the media type, or nothing

    def read(self, most: int) -> bytes:
        """Return the next bytes, at most so many; none at the end.

        Raises:
            Broken: the connection failed.
        """

    def close(self) -> None:
        """Make a `read` that waits in another thread end."""


class RangeSource(Protocol):
    """A prefix under which files lie.

    Attributes:
        prefix: dataset.source; receipts call it so.
        reached: whether it has answered at all.
    """

    prefix: str
    reached: bool

    def url(self, file: str) -> str:
        """Return what notes and errors call a file."""

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, as far as that is told without fetching it.

        Raises:
            Broken, Refused: see `ask`.
        """

    def open(
        self, file: str, begin: int = 0, end: int | None = None, origin: Origin | None = None
    ) -> AbstractContextManager[Response]:
        """Ask for bytes [begin, end) of a file, or for the whole where `end` is None.

        Args:
            file: its name under the prefix.
            begin: first byte.
            end: behind the last byte.
            origin: the state that the file must still be in.

        Raises:
            Broken: it failed and may do better later.
            Changed: the file is not in that state, or has not that many bytes.
            Refused: it is not there, or not given.
            UserError: the prefix makes no sense.
        """


class TransientError(Exception):
    """A request that failed and may do better later; `wait` is what the server asked for, in s."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class ContentChanged(Exception):
    """The file is not the one that was begun: all begins anew."""


class NotAvailable(Exception):
    """The server does not give the file, and will not later either."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status
