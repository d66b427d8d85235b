"""A file that is being downloaded: `<file>.part`, and in `<file>.part.json` what it is a part of.

Killed at any byte, it is taken up where it ends. The MD5 is computed while writing; only the bytes of an
earlier try are read back, once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_imagenet.archives.wanted import CHUNK, new_md5
from hpc_imagenet.durable import read_json, sync_folder, write_json
from hpc_imagenet.errors import UserError


@dataclass(frozen=True)
class Origin:
    """What the server said about the file when its first byte was asked for."""

    url: str
    etag: str | None = None
    modified: str | None = None  # Last-Modified
    total: int | None = None  # bytes

    @property
    def validator(self) -> str | None:
        """What If-Range compares: a strong ETag, else the date; None where a server gives neither."""
        # RFC 9110, 13.1.5: a weak ETag does not promise the same bytes.
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


class Part:
    """The part on disk, open for appending; one process at a time.

    Attributes:
        size: bytes that are there.
        origin: what they are a part of; None for an empty part.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self._note = target.with_name(target.name + ".part.json")
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            self._lock()
            self.size = os.fstat(self._file.fileno()).st_size
            self.origin = self._read_note() if self.size else None
            if self.size and (self.origin is None or (self.origin.total or self.size) < self.size):
                self.clear()
        except BaseException:
            self._file.close()
            raise
        self._file.seek(self.size)
        self._md5 = new_md5()
        self._hashed = 0

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def whole(self) -> bool:
        """Whether nothing is left to fetch, as far as the server said how much there is."""
        return self.origin is not None and self.size == self.origin.total

    def clear(self) -> None:
        """Throw the bytes away. Before the note is: bytes without a note are never taken up."""
        self._file.seek(0)
        self._file.truncate()
        self.size, self.origin = 0, None
        self._md5, self._hashed = new_md5(), 0

    def begin(self, origin: Origin) -> None:
        """Begin anew with what the server has now."""
        self.clear()
        write_json(self._note, asdict(origin))
        self.origin = origin

    def hash_earlier(self, progress: Callable[[int], None]) -> None:
        """Read back what an earlier try has written, for the MD5."""
        while self._hashed < self.size:
            chunk = os.pread(self._file.fileno(), min(CHUNK, self.size - self._hashed), self._hashed)
            if not chunk:
                raise UserError(
                    f"{self.path}: became shorter while it was read; is something else writing it?"
                )
            self._md5.update(chunk)
            self._hashed += len(chunk)
            progress(self._hashed)

    def append(self, data: bytes) -> None:
        """Write the next bytes."""
        self._file.write(data)
        self._md5.update(data)
        self.size += len(data)
        self._hashed += len(data)

    def finish(self) -> tuple[str, os.stat_result]:
        """Bring the bytes to the disk; return their MD5 and the file's stat."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._md5.hexdigest(), os.fstat(self._file.fileno())

    def become_whole(self) -> None:
        """Take the final name."""
        self.path.replace(self.target)
        self.forget()
        sync_folder(self.target.parent)

    def forget(self) -> None:
        """Remove the note: the bytes have gone elsewhere."""
        self._note.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another job is downloading it; python -m hpc_imagenet jobs shows which"
            ) from None
        except OSError:
            pass  # a file system without locks: then only the run's signature keeps two jobs apart

    def _read_note(self) -> Origin | None:
        with contextlib.suppress(json.JSONDecodeError, TypeError):
            note = read_json(self._note)
            return None if note is None else Origin(**note)
        return None
