"""Decode the batches of several trainings once for all of them.

Each run reads the same sequence of batches (batch_sequence.py) at its own speed, from a ring (batch_ring.py):
the window of the ring begins at the run that is furthest behind. Runs within the window follow it. All others
have their own loaders, and may follow again when they begin an epoch or a validation.

A run can hold up the others only for a limited time: `patience`, plus a tenth of the time since the
beginning. Then the window goes on without it. At the beginning of an epoch the others wait for it again, but
only with what is left of its patience. A run that ends closes its connection, and is forgotten.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from hpc_imagenet.datastore.reader.prefetch import PagePrefetcher, Prefetcher
from hpc_imagenet.datastore.reader.window_reader import WindowReader, open_prefetcher
from hpc_imagenet.training.loading.batch_loader import (
    BatchBuilder,
    ReadImage,
    image_indices,
    in_chunks,
    start_threads,
)
from hpc_imagenet.training.loading.batch_ring import (
    COPIED,
    NOT_REACHED,
    PASSED,
    READY,
    REQUEST,
    SLOTS,
    UNREADABLE,
    BatchRing,
    Channel,
)
from hpc_imagenet.training.loading.batch_sequence import BatchSequence
from hpc_imagenet.training.loading.sampler import PADDING, Key

HELD_SHARE = 0.1  # of the time that a run may hold up the others, in addition to the patience
_TICK = 0.1  # s between two measurements of who waits for whom


@dataclass(eq=False)
class _Reader:
    """A run that reads the sequence.

    Attributes:
        end: position after its last batch; None before its first message.
        next: position of the first batch that it has not copied yet.
        waits: whether it waits for the batch `next`.
        since: when it requested that (s, monotonic).
        requested: whether it has requested a batch before.
        copies: whether it may be copying the batch `next` out of its slot.
        follows: whether the window waits for it.
        behind: whether the window has left it behind.
        held: seconds that it has held up the others.
    """

    name: str
    channel: Channel
    end: int | None = None
    next: int = 0
    waits: bool = False
    since: float = 0.0
    requested: bool = False
    copies: bool = False
    follows: bool = False
    behind: bool = False
    held: float = 0.0


class SharedDecoder:
    """Decodes for the runs at the other ends of some connections; `run` returns when all have ended.

    Args:
        sequence: batches of all runs.
        epochs: most epochs of a run.
        connections: connection to each run, by its name.
        memory: file descriptor of the shared memory, still empty.
        workers: number of decoding threads.
        patience: s that a run may hold up the others, and that they wait for it at the beginning of an epoch.
    """

    def __init__(
        self,
        sequence: BatchSequence,
        epochs: int,
        connections: Mapping[str, socket.socket],
        memory: int,
        workers: int,
        patience: float,
    ) -> None:
        self._sequence, self._patience = sequence, patience
        self._ring = BatchRing(memory, sequence.images, sequence.largest(epochs), create=True)
        self._threads = start_threads(max(1, workers), frozenset())
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._readers: list[_Reader] = []
        for name, each in connections.items():
            each.setblocking(False)
            reader = _Reader(name, Channel(each))
            self._readers.append(reader)
            self._selector.register(reader.channel, selectors.EVENT_READ, reader)
        self._decoded: deque[tuple[int, BaseException | None]] = deque()  # filled by the threads
        self._tasks: dict[int, int] = {}  # unfinished tasks of each batch that is being decoded
        self._failed: set[int] = set()  # positions of batches that cannot be decoded
        self._first = self._last = 0  # the window: its first position, and the one after its last batch
        self._stream: Iterator[tuple[BatchBuilder, list[Key], ReadImage]] = iter(())
        self._prefetchers: deque[Prefetcher | PagePrefetcher | WindowReader] = deque()  # of the newest parts

    def run(self) -> None:
        """Serve the runs until all have ended."""
        began = before = time.monotonic()
        try:
            while self._readers:
                for key, _ in self._selector.select(_TICK if self._measures() else None):
                    if key.data is None:
                        os.eventfd_read(self._wake)
                    elif key.data in self._readers:
                        self._receive(key.data)
                now = time.monotonic()
                self._collect()
                self._charge(min(now - before, 1.0), now - began)
                before = now
                self._admit(now)
                self._decode()
                self._answer()
        finally:
            for reader in list(self._readers):
                self._remove(reader)
            self._threads.shutdown(wait=True, cancel_futures=True)
            for prefetcher in self._prefetchers:
                prefetcher.close()
            self._selector.close()

    def _measures(self) -> bool:
        """Whether time matters: a run waits for a batch that is not being decoded."""
        return any(reader.waits for reader in self._readers) and not self._tasks

    def _receive(self, reader: _Reader) -> None:
        if reader.end is None:
            self._greet(reader)
            return
        message = reader.channel.receive()
        if message is None:
            self._remove(reader)
            return
        kind, position = message
        if kind == COPIED:
            reader.next, reader.copies = position + 1, False
        elif kind == REQUEST:
            if position != reader.next:  # it has left a part of the sequence out
                reader.follows = False
            reader.next, reader.waits, reader.since = position, True, time.monotonic()

    def _greet(self, reader: _Reader) -> None:
        """Answer the first message of a run: its images must be those of the sequence."""
        values = reader.channel.receive_values()
        if values is None:
            self._remove(reader)
            return
        own = self._sequence.values
        differing = [name for name, value in values["loader"].items() if own.get(name) != value]
        answer: dict[str, Any] = {"images": self._ring.images, "pixels": self._ring.pixels}
        reader.end = int(values["end"])
        if not reader.channel.send_values({"differs": differing} if differing else answer) or differing:
            self._remove(reader)

    def _remove(self, reader: _Reader) -> None:
        self._readers.remove(reader)
        self._selector.unregister(reader.channel)
        reader.channel.end()

    def _collect(self) -> None:
        """Count the finished tasks of the threads, and move the beginning of the window."""
        while self._decoded:
            position, error = self._decoded.popleft()
            if error is not None:
                self._failed.add(position)
            self._tasks[position] -= 1
            if not self._tasks[position]:
                del self._tasks[position]
        if followers := self._followers():
            self._first = max(self._first, min(reader.next for reader in followers))
            self._failed = {position for position in self._failed if position >= self._first}

    def _charge(self, seconds: float, total: float) -> None:
        """Charge a run for the time that the others wait for it; when that is too much, go on without it."""
        followers = self._followers()
        if any(self._meets(reader) for reader in followers):
            for reader in self._missing():
                reader.held += seconds
        full = self._last == self._first + SLOTS and not self._tasks
        if not full or not any(reader.waits and reader.next >= self._last for reader in followers):
            return
        for reader in followers:
            if reader.next == self._first and not reader.waits:
                reader.held += seconds
                if reader.held > self._patience + HELD_SHARE * total:
                    reader.follows = False
                    if reader.copies:  # it may still read the slot, and must not use what it has read
                        self._remove(reader)

    def _admit(self, now: float) -> None:
        """Let waiting runs follow if the window contains their positions; else answer that it does not."""
        for reader in self._waiting():
            if not self._followers() and not self._begin(now):
                return
            if self._first <= reader.next < self._first + SLOTS:
                reader.follows, reader.requested, reader.behind = True, True, False
            elif reader.next < self._first:
                self._refuse(reader, PASSED)
            elif not self._may_wait(reader, now):
                self._refuse(reader, NOT_REACHED)

    def _begin(self, now: float) -> bool:
        """Set the window for the runs that wait, once all of them do or have been waited for."""
        waiting = self._waiting()
        if len(waiting) < len(self._readers) and all(self._may_wait(reader, now) for reader in waiting):
            return False
        if self._tasks:  # of the previous window
            return False
        positions = [reader.next for reader in waiting]

        def runs_from(first: int) -> int:
            return sum(first <= position < first + SLOTS for position in positions)

        self._first = self._last = max(positions, key=lambda first: (runs_from(first), -first))
        self._failed.clear()
        self._stream = self._read_ahead(self._first)
        return True

    def _may_wait(self, reader: _Reader, now: float) -> bool:
        """Whether a run that does not follow may wait for the others: when it starts, or begins an epoch."""
        meets = not reader.requested or self._sequence.begins_epoch(reader.next)
        return meets and now - reader.since < self._patience

    def _refuse(self, reader: _Reader, kind: int) -> None:
        reader.waits = reader.follows = False
        reader.requested, reader.behind = True, kind == PASSED
        if not reader.channel.send(kind, reader.next):
            self._remove(reader)

    def _decode(self) -> None:
        """Start to decode the batches of the window, as far as their slots are free and a run needs them."""
        end = max((reader.end or 0 for reader in self._followers()), default=0)
        while self._last < min(end, self._first + SLOTS) and self._last - SLOTS not in self._tasks:
            position = self._last
            builder, keys, read = next(self._stream)
            batch = self._ring.batch(position, self._sequence.shape(position))
            batch[1].fill_(PADDING)
            tasks = in_chunks(range(len(keys)))
            self._tasks[position], self._last = len(tasks), position + 1
            for chunk in tasks:
                task = self._threads.submit(builder.fill, batch, keys, chunk, read)
                task.add_done_callback(partial(self._finish, position))

    def _finish(self, position: int, task: Future[Any]) -> None:
        """Report a finished task to `run`; called in a thread."""
        self._decoded.append((position, None if task.cancelled() else task.exception()))
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def _answer(self) -> None:
        """Send what is ready to the runs that wait for it."""
        for reader in self._followers():
            if not reader.waits or reader.next >= self._last or reader.next in self._tasks:
                continue
            if self._meets(reader) and self._missing():
                continue
            if reader.next in self._failed:  # its own loader names the image
                self._refuse(reader, UNREADABLE)
                continue
            reader.waits, reader.copies = False, True
            if not reader.channel.send(READY, reader.next):
                self._remove(reader)

    def _meets(self, reader: _Reader) -> bool:
        """Whether a run waits at the beginning of an epoch."""
        return reader.waits and self._sequence.begins_epoch(reader.next)

    def _missing(self) -> list[_Reader]:
        """Return the runs that those at the beginning of an epoch wait for."""
        return [
            reader
            for reader in self._readers
            if reader.behind and not reader.waits and reader.held < self._patience
        ]

    def _followers(self) -> list[_Reader]:
        return [reader for reader in self._readers if reader.follows]

    def _waiting(self) -> list[_Reader]:
        """Return the runs that wait and do not follow."""
        return [reader for reader in self._readers if reader.waits and not reader.follows]

    def _read_ahead(self, position: int) -> Iterator[tuple[BatchBuilder, list[Key], ReadImage]]:
        """Yield builder and keys of each batch, and what reads its images: ahead of use if it is slow."""
        while self._prefetchers:
            self._prefetchers.popleft().close()
        for builder, key_lists, windows in self._sequence.parts(position):
            prefetcher = open_prefetcher(builder.split, windows)
            self._prefetchers.append(prefetcher)
            if len(self._prefetchers) > SLOTS:  # the first was of batches that the window has left
                self._prefetchers.popleft().close()
            indexed = ((keys, image_indices(keys)) for keys in key_lists)
            yield from ((builder, keys, prefetcher.read) for keys in prefetcher.batches(indexed))
