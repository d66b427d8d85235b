"""Memory that the processes of a shared loader have in common: a ring of batches, and messages about them.

The memory is an anonymous file (memfd_create(2)), so nothing stays in /dev/shm, whose size does not matter,
and a killed process leaves nothing behind. The batch at position p is in slot p modulo the number of slots.
Messages go through a pair of sockets (SOCK_SEQPACKET) for each run, which the kernel closes when either side
ends: no lock can stay held by a dead process.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import socket
import struct
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # uint8 [images, 3, size, size] in channels_last order, int64 [images]

SLOTS = 8
_PAGE = mmap.PAGESIZE
_MESSAGE = struct.Struct("<qq")
_HELLO_BYTES = 1 << 16

# What a run sends, with a position: it wants that batch and none before it; it has copied that batch.
REQUEST, COPIED = 1, 2
# What it receives, with a position: the batch is ready; or it takes its own loader until the next epoch or
# validation, because the ring is not there, or because the image at the position cannot be read.
READY, PASSED, NOT_REACHED, UNREADABLE = 1, 2, 3, 4


class BatchRing:
    """A ring of slots, each for one batch.

    Args:
        descriptor: file descriptor of the memory.
        images: images of the largest batch.
        pixels: bytes of the pixels of the largest batch.
        create: whether to set the size of the memory; otherwise it has it already.
    """

    def __init__(self, descriptor: int, images: int, pixels: int, create: bool = False) -> None:
        self.images, self.pixels = images, pixels
        self._labels = -(-8 * images // 64) * 64  # bytes
        self._slot = -(-(self._labels + pixels) // _PAGE) * _PAGE
        if create:
            os.ftruncate(descriptor, SLOTS * self._slot)
        self._memory = mmap.mmap(descriptor, SLOTS * self._slot)

    def batch(self, position: int, shape: tuple[int, int]) -> Batch:
        """Return views of the slot of a batch.

        Args:
            position: position of the batch.
            shape: its images, and their side in px.
        """
        (images, size), begin = shape, position % SLOTS * self._slot
        labels = torch.frombuffer(self._memory, dtype=torch.int64, count=images, offset=begin)
        pixels = torch.frombuffer(
            self._memory, dtype=torch.uint8, count=images * size * size * 3, offset=begin + self._labels
        )
        return pixels.view(images, size, size, 3).permute(0, 3, 1, 2), labels

    def pin(self) -> bool:
        """Register the memory with CUDA, so that copies to a GPU need no other one; False if CUDA refuses."""
        memory = torch.frombuffer(self._memory, dtype=torch.uint8)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        return int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0


class Channel:
    """One side of the connection between a run and the process that decodes for it.

    A run's side blocks; the other side is served with a selector.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        """Return the file descriptor, for a selector."""
        return self._socket.fileno()

    def send(self, kind: int, position: int) -> bool:
        """Send a message; False if the connection has ended."""
        return self._send(_MESSAGE.pack(kind, position))

    def receive(self) -> tuple[int, int] | None:
        """Return the next message: its kind and its position; None if the connection has ended."""
        data = self._receive(_MESSAGE.size)
        return _MESSAGE.unpack(data) if len(data) == _MESSAGE.size else None

    def send_values(self, values: dict[str, Any]) -> bool:
        """Send the first message, which both sides begin with; False if the connection has ended."""
        return self._send(json.dumps(values).encode())

    def receive_values(self) -> dict[str, Any] | None:
        """Return the first message; None if the connection has ended."""
        data = self._receive(_HELLO_BYTES)
        return json.loads(data) if data else None

    def has_ended(self) -> bool:
        """Whether the other side has ended the connection, also if messages of it are left."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def end(self) -> None:
        """End the connection; the other side sees that at once."""
        with contextlib.suppress(OSError):  # the other side has ended it
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, data: bytes) -> bool:
        try:
            self._socket.send(data)
        except OSError:  # the other side is gone; or it reads nothing, and its queue is full
            return False
        return True

    def _receive(self, size: int) -> bytes:
        try:
            return self._socket.recv(size)
        except OSError:
            return b""
