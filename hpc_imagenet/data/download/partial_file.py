"""A partially downloaded file: bytes in `<file>.part`, their offsets in the state file `<file>.part.json`.

Several threads write at their own offsets. The state file is written after an fsync of the bytes it lists, so
it is correct after a kill and after a power failure; bytes written since then are fetched again. Because of
the fsync, the state is saved only so often that saving takes at most a tenth of the time.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from hpc_imagenet.data.sources.range_source import Origin
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import WRITE_BYTES, make_read_only, read_json, sync_folder, write_json

SUFFIX = ".part"
SAVE_INTERVAL_FACTOR = 10  # time between saves, as a multiple of the duration of a save …
MAX_SAVE_INTERVAL = 10.0  # … but at most so many s, for file systems with a slow fsync


class PartialFile:
    """The partial file of an archive, locked by one process at a time.

    Args:
        target: final path of the archive.

    Attributes:
        origin: source state of the bytes; None for an empty file.
        changed: notified when bytes are written; its lock guards everything except the file's content.
        generation: number of times that the file was cleared.

    Raises:
        UserError: another process holds the lock.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + SUFFIX)
        self.changed = threading.Condition()
        self.generation = 0
        self.origin: Origin | None = None
        self._spans: list[list[int]] = []  # [begin, end) of the written bytes: sorted, disjoint, not adjacent
        self._saved_spans: list[list[int]] = []
        self._next_save = 0.0
        self._state_path = target.with_name(f"{target.name}{SUFFIX}.json")
        while True:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                self._lock()
                if _is_same_file(self.file, self.path):
                    self._load_state()
                    return
            except BaseException:
                os.close(self.file)
                raise
            os.close(self.file)  # between open and lock, another process renamed the file to the archive

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        # If the disk is full, the last saved state stays valid.
        with contextlib.suppress(OSError):
            self.save_state()
        os.close(self.file)

    @property
    def size(self) -> int:
        """Number of bytes written, gaps excluded."""
        with self.changed:
            return sum(end - begin for begin, end in self._spans)

    @property
    def contiguous_size(self) -> int:
        """Number of bytes from the start of the file to the first gap."""
        with self.changed:
            return self._spans[0][1] if self._spans and self._spans[0][0] == 0 else 0

    @property
    def complete(self) -> bool:
        """Whether all bytes are written; False while the total is unknown."""
        return self.origin is not None and self.contiguous_size == self.origin.total

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yield [begin, end) of the missing bytes, in order. The caller must hold `changed`."""
        at = 0
        for begin, end in self._spans:
            if at < begin:
                yield at, begin
            at = end
        total = self.origin.total if self.origin else None
        if total is None or at < total:
            yield at, total if total is not None else at

    def has(self, begin: int, end: int) -> bool:
        """Whether all bytes of [begin, end) are written."""
        with self.changed:
            index = self._span_index(begin + 1)
            return (
                index < len(self._spans) and self._spans[index][0] <= begin and end <= self._spans[index][1]
            )

    def clear(self) -> None:
        """Discard all bytes."""
        with self.changed:
            self._spans, self._saved_spans, self.origin = [], [], None
            self.generation += 1
            os.ftruncate(self.file, 0)
            self.changed.notify_all()

    def restart(self, origin: Origin) -> None:
        """Discard all bytes and start a download of `origin`."""
        self.clear()
        write_json(self._state_path, _state(origin, []))
        self.origin = origin

    def write(self, at: int, data: bytes) -> None:
        """Write bytes at offset `at`."""
        rest = memoryview(data)
        begin = at
        try:
            while rest:
                done = os.pwrite(self.file, rest[:WRITE_BYTES], at)
                at, rest = at + done, rest[done:]
        finally:
            if at > begin:
                self._add_span(begin, at)

    def set_total_to_size(self) -> None:
        """Record the written size as the total, if the server did not send a length."""
        origin = self.origin
        assert origin is not None
        self.origin = Origin(origin.url, origin.etag, origin.modified, self.contiguous_size, origin.ranges)

    def save_state(self, if_due: bool = False) -> None:
        """Sync the bytes to the disk, then record them in the state file.

        Args:
            if_due: do nothing if the last save is too recent.
        """
        begin = time.monotonic()
        if if_due and begin < self._next_save:
            return
        with self.changed:
            spans, origin = [list(span) for span in self._spans], self.origin
        if origin is None or spans == self._saved_spans:
            return
        os.fsync(self.file)
        write_json(self._state_path, _state(origin, spans))
        self._saved_spans = spans
        end = time.monotonic()
        self._next_save = end + min(MAX_SAVE_INTERVAL, SAVE_INTERVAL_FACTOR * (end - begin))

    def stat(self) -> os.stat_result:
        """Sync the bytes to the disk and return the file's stat."""
        os.fsync(self.file)
        return os.fstat(self.file)

    def finalize(self) -> None:
        """Make the file read-only and rename it to its final path."""
        make_read_only(self.file)
        self.path.replace(self.target)
        self.discard_state()
        sync_folder(self.target.parent)

    def discard_state(self) -> None:
        """Remove the state file, after the bytes were moved away."""
        self.origin = None
        self._state_path.unlink(missing_ok=True)

    def _add_span(self, begin: int, end: int) -> None:
        with self.changed:
            spans = self._spans
            first = last = self._span_index(begin)
            while last < len(spans) and spans[last][0] <= end:
                begin, end = min(begin, spans[last][0]), max(end, spans[last][1])
                last += 1
            spans[first:last] = [[begin, end]]
            self.changed.notify_all()

    def _span_index(self, at: int) -> int:
        """Return the index of the first span whose end is at least `at`."""
        return bisect.bisect_left(self._spans, at, key=lambda span: span[1])

    def _load_state(self) -> None:
        size = os.fstat(self.file).st_size
        try:
            self.origin, spans = _read_state(read_json(self._state_path), size)
        except ValueError:
            os.ftruncate(self.file, 0)  # without a valid state file the bytes cannot be trusted
            spans, self.origin = [], None
        self._spans, self._saved_spans = spans, [list(span) for span in spans]

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another job is downloading it; python -m hpc_imagenet jobs shows which"
            ) from None
        except OSError:
            pass  # a file system without locks: two jobs are kept apart by the run's signature only


def allocated_bytes(target: Path) -> int:
    """Return the bytes of disk space that the partial file of `target` occupies; 0 without one."""
    try:
        return target.with_name(target.name + SUFFIX).stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_state(state: Any, size: int) -> tuple[Origin, list[list[int]]]:
    """Return origin and spans from the contents of a state file.

    Args:
        state: JSON value, as `_state` returns it; None: there is no state file.
        size: bytes of the partial file.

    Raises:
        ValueError: it is damaged, or does not fit the partial file.
    """
    if not isinstance(state, dict):
        raise ValueError("no state")
    found = state.pop("spans", None)
    origin = {"etag": None, "modified": None, "total": None, "ranges": False, **state}
    types: dict[str, Any] = {"url": str, "etag": (str, NoneType), "modified": (str, NoneType)}
    types |= {"total": (int, NoneType), "ranges": bool}
    if origin.keys() != types.keys() or not all(isinstance(origin[key], types[key]) for key in types):
        raise ValueError("a wrong type")
    if not isinstance(found, list) or not found:
        raise ValueError("no spans")
    end, total = -1, origin["total"]
    for span in found:
        if (
            not isinstance(span, list)
            or [type(at) for at in span] != [int, int]
            or not end < span[0] < span[1]
        ):
            raise ValueError("spans are not sorted, or adjacent")
        end = span[1]
    if end > (size if total is None else min(size, total)):
        raise ValueError("more bytes than the file has")
    return Origin(**origin), found


def _state(origin: Origin, spans: list[list[int]]) -> dict[str, object]:
    return {**asdict(origin), "spans": spans}
