"""A file that is being downloaded: `<file>.part`, and in `<file>.part.json` which bytes of what it has.

Several threads write, each where its bytes belong. The note is written after the bytes it speaks of are on
the disk, so it holds after a kill and after a power cut; what came since the last note is fetched again. A
note costs a flush, so one is written as often as takes a tenth of the time.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from hpc_imagenet.data.sources.range_source import Origin
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import make_read_only, read_json, sync_folder, write_json

SUFFIX = ".part"
SHARE = 10  # a note is followed by this many times its own duration without one
RAREST = 10.0  # s between notes at most, where flushes are slow


class PartialFile:
    """The part on disk; one process at a time.

    Attributes:
        origin: what its bytes are of; None for an empty part.
        changed: notified when bytes came, under its lock; it guards all but the file itself.
        generation: counts how often it began anew.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + SUFFIX)
        self.changed = threading.Condition()
        self.generation = 0
        self.origin: Origin | None = None
        self._spans: list[list[int]] = []  # [begin, end) of what is there: sorted, apart from each other
        self._noted: list[list[int]] = []
        self._due = 0.0
        self._note = target.with_name(f"{target.name}{SUFFIX}.json")
        while True:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock()
                if _has_name(self.file, self.path):
                    self._take_up()
                    return
            except BaseException:
                os.close(self.file)
                raise
            os.close(self.file)  # before it was locked, another process has made the archive of it

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        # Its end may be a full disk: the note before then stands.
        with contextlib.suppress(OSError):
            self.save()
        os.close(self.file)

    @property
    def size(self) -> int:
        """How many bytes are there."""
        with self.changed:
            return sum(end - begin for begin, end in self._spans)

    @property
    def contiguous_size(self) -> int:
        """How many bytes are there from the first one on without a gap."""
        with self.changed:
            return self._spans[0][1] if self._spans and self._spans[0][0] == 0 else 0

    @property
    def whole(self) -> bool:
        """Whether nothing is left to fetch, as far as the server said how much there is."""
        return self.origin is not None and self.contiguous_size == self.origin.total

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yield [begin, end) of what is missing, in order. Call it under `changed`."""
        at = 0
        for begin, end in self._spans:
            if at < begin:
                yield at, begin
            at = end
        total = self.origin.total if self.origin else None
        if total is None or at < total:
            yield at, total if total is not None else at

    def has(self, begin: int, end: int) -> bool:
        """Whether all bytes of [begin, end) are there."""
        with self.changed:
            place = self._place(begin + 1)
            return (
                place < len(self._spans) and self._spans[place][0] <= begin and end <= self._spans[place][1]
            )

    def clear(self) -> None:
        """Throw the bytes away."""
        with self.changed:
            self._spans, self._noted, self.origin = [], [], None
            self.generation += 1
            os.ftruncate(self.file, 0)
            self.changed.notify_all()

    def begin(self, origin: Origin) -> None:
        """Begin anew with what the server has now."""
        self.clear()
        write_json(self._note, _note(origin, []))
        self.origin = origin

    def write(self, at: int, data: bytes) -> None:
        """Write bytes to their place."""
        rest = memoryview(data)
        begin = at
        try:
            while rest:
                done = os.pwrite(self.file, rest, at)
                at, rest = at + done, rest[done:]
        finally:
            if at > begin:
                self._add(begin, at)

    def is_all(self) -> None:
        """Note that the file ends where the part ends: the server had not said how long it is."""
        origin = self.origin
        assert origin is not None
        self.origin = Origin(origin.url, origin.etag, origin.modified, self.contiguous_size, origin.ranges)

    def save(self, when_due: bool = False) -> None:
        """Bring the bytes to the disk, then note which are there.

        Args:
            when_due: only if the last time is long enough ago.
        """
        begin = time.monotonic()
        if when_due and begin < self._due:
            return
        with self.changed:
            spans, origin = [list(span) for span in self._spans], self.origin
        if origin is None or spans == self._noted:
            return
        os.fsync(self.file)
        write_json(self._note, _note(origin, spans))
        self._noted = spans
        end = time.monotonic()
        self._due = end + min(RAREST, SHARE * (end - begin))

    def stat(self) -> os.stat_result:
        """Return the file's stat when all its bytes are on the disk."""
        os.fsync(self.file)
        return os.fstat(self.file)

    def finalize(self) -> None:
        """Take the final name, and be written no more."""
        make_read_only(self.file)
        self.path.replace(self.target)
        self.discard_state()
        sync_folder(self.target.parent)

    def discard_state(self) -> None:
        """Remove the note: the bytes have gone elsewhere."""
        self.origin = None
        self._note.unlink(missing_ok=True)

    def _add(self, begin: int, end: int) -> None:
        with self.changed:
            spans = self._spans
            place = last = self._place(begin)
            while last < len(spans) and spans[last][0] <= end:
                begin, end = min(begin, spans[last][0]), max(end, spans[last][1])
                last += 1
            spans[place:last] = [[begin, end]]
            self.changed.notify_all()

    def _place(self, at: int) -> int:
        """Return the number of the first span that ends at `at` or behind it."""
        return bisect.bisect_left(self._spans, at, key=lambda span: span[1])

    def _take_up(self) -> None:
        size = os.fstat(self.file).st_size
        note = None
        with contextlib.suppress(json.JSONDecodeError):
            note = read_json(self._note)
        try:
            spans = [[int(begin), int(end)] for begin, end in note.pop("spans")] if note else []
            self.origin = Origin(**note) if note else None
        except (TypeError, ValueError, KeyError, AttributeError):
            spans, self.origin = [], None
        if not spans or self.origin is None or spans[-1][1] > min(size, self.origin.total or size):
            os.ftruncate(self.file, 0)  # bytes without a note are never taken up
            spans, self.origin = [], None
        self._spans, self._noted = spans, [list(span) for span in spans]

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another job is downloading it; python -m hpc_imagenet jobs shows which"
            ) from None
        except OSError:
            pass  # a file system without locks: then only the run's signature keeps two jobs apart


def allocated_bytes(target: Path) -> int:
    """Return the bytes of the disk that the part of an archive takes already; 0 without a part."""
    try:
        return target.with_name(target.name + SUFFIX).stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _note(origin: Origin, spans: list[list[int]]) -> dict[str, object]:
    return {**asdict(origin), "spans": spans}
