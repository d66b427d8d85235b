"""The loader of a run whose batches another process decodes, for several runs at once (shared_decoder.py).

Sharing only saves time. Whenever a batch cannot be had from there (the run fell behind, the process died, an
image is damaged), the run decodes it itself: the batch at a position has the same pixels everywhere.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hpc_imagenet.cluster.dist_env import SHARED_LOADER_VARIABLE
from hpc_imagenet.training.loading.batch_loader import BatchBuilder, BatchLoader, HostBatch
from hpc_imagenet.training.loading.batch_ring import (
    COPIED,
    NOT_REACHED,
    PASSED,
    READY,
    REQUEST,
    UNREADABLE,
    Batch,
    BatchRing,
    Channel,
)
from hpc_imagenet.training.loading.batch_sequence import BatchSequence
from hpc_imagenet.training.loading.sampler import Key

_REASONS = {
    PASSED: "the other runs are ahead",
    NOT_REACHED: "the other runs are behind",
    UNREADABLE: "an image cannot be read",
}


class SharedBatches:
    """A run's connection to the process that decodes for it.

    Args:
        connection: connection to that process.
        memory: file descriptor of the shared memory.
        sequence: batches of this run.
        epochs: epochs of this run.
        device: device of the batches.
    """

    def __init__(
        self,
        connection: socket.socket,
        memory: int,
        sequence: BatchSequence,
        epochs: int,
        device: torch.device,
    ) -> None:
        self.sequence, self._memory, self._device = sequence, memory, device
        self._channel: Channel | None = Channel(connection)
        self._ring: BatchRing | None = None
        self._shares: bool | None = None  # whether the last batch was shared
        self._channel.send_values({"loader": sequence.values, "end": sequence.end(epochs)})

    def batch(self, position: int, keys: list[Key], builder: BatchBuilder) -> Batch | None:
        """Return a copy of a batch on the device; None if this run has to decode it, and those after it.

        Args:
            position: position of the batch.
            keys: its keys.
            builder: this run's builder, which counts the images that were skipped.
        """
        if self._channel is None or (ring := self._open_ring()) is None:
            return None
        message = self._channel.receive() if self._channel.send(REQUEST, position) else None
        if message is None:
            self._leave("the process that decodes for it has ended, or went on without it")
            return None
        if message[0] != READY:
            self._report(_REASONS[message[0]])
            return None
        shared = ring.batch(position, self.sequence.shape(position))
        with torch.inference_mode(False):
            labels = shared[1].clone()
            if self._device.type == "cuda":
                copy = shared[0].to(self._device, non_blocking=True), labels.to(self._device)
                torch.cuda.current_stream(self._device).synchronize()
            else:
                copy = shared[0].clone(), labels
        if self._channel.has_ended():  # the slot may have been overwritten meanwhile
            self._leave("the other runs went on without it")
            return None
        builder.note_skipped(keys, labels)
        self._channel.send(COPIED, position)
        if not self._shares:
            self._shares = True
            print("this run shares its loader", flush=True)
        return copy

    def close(self) -> None:
        """End the connection: this run needs no more batches."""
        if self._channel is not None:
            self._channel.end()
        self._channel = None

    def _open_ring(self) -> BatchRing | None:
        """Return the ring, once the other process has answered the first message."""
        if self._ring is None and self._channel is not None:
            values = self._channel.receive_values()
            if values is None:
                self._leave("the process that decodes for it has ended")
                return None
            if "differs" in values:
                self._leave(f"it differs from the other runs in {', '.join(values['differs'])}")
                return None
            self._ring = BatchRing(self._memory, **values)
            if self._device.type == "cuda":
                self._ring.pin()
        return self._ring

    def _leave(self, reason: str) -> None:
        self.close()
        self._report(reason)

    def _report(self, reason: str) -> None:
        if self._shares is not False:
            self._shares = False
            print(f"this run takes its own loader: {reason}", flush=True)


class SharedBatchLoader(BatchLoader):
    """A `BatchLoader` whose batches come from another process, as far as that has them.

    Args:
        arguments: those of `BatchLoader`.
        shared: the connection.
        begin: returns the position of the sampler's first batch.
    """

    def __init__(self, *arguments: Any, shared: SharedBatches, begin: Callable[[], int]) -> None:
        super().__init__(*arguments)
        self._shared, self._begin = shared, begin

    def _host_batches(self) -> Iterator[HostBatch]:
        """Yield the shared batches, then those that this loader decodes."""
        key_lists = iter(self.sampler)
        begin = self._begin()
        for taken, keys in enumerate(key_lists):
            batch = self._shared.batch(begin + taken, keys, self.batches)
            if batch is None:
                yield from self._own_batches(itertools.chain([keys], key_lists), taken)
                return
            yield batch, keys, []


def connect(sequence: BatchSequence, epochs: int, device: torch.device) -> SharedBatches | None:
    """Return the connection of this process to the one that decodes for it; None if there is none."""
    descriptors = os.environ.pop(SHARED_LOADER_VARIABLE, "")  # not for processes that this one starts
    if not descriptors:
        return None
    connection, memory = map(int, descriptors.split(","))
    for descriptor in (connection, memory):
        os.set_inheritable(descriptor, False)
    return SharedBatches(socket.socket(fileno=connection), memory, sequence, epochs, device)
