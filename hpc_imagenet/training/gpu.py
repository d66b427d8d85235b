"""Batches on their way into a GPU: copied while it works on the one before; decoded there, if so asked for.

nvJPEG decodes a list of JPEGs at once. It rounds and smooths colours in its own way, so its pixels are not
quite those of libjpeg-turbo: a training that decodes there is another run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from hpc_imagenet.errors import UserError, first_line
from hpc_imagenet.training.transforms import Crop

Batch = tuple[Tensor, Tensor]
Prepared = TypeVar("Prepared")


class Piece(NamedTuple):
    """An image that is still to be decoded into its place in a batch."""

    place: int
    data: bytes
    crop: Crop


def ahead(
    prepared: Iterator[Prepared], device: torch.device, finish: Callable[[Prepared], Batch]
) -> Iterator[Batch]:
    """Yield what `finish` makes of each batch, by a thread and on a stream of their own, one batch ahead.

    Args:
        prepared: batches on the host.
        device: a GPU.
        finish: puts one there; it may wait for the GPU, while the caller gives that more to do.
    """
    stream = _stream(device)

    def send() -> tuple[Batch, torch.cuda.Event] | None:
        with torch.cuda.stream(stream):  # and on its device, which a new thread does not know
            for one in prepared:
                return finish(one), stream.record_event()
        return None

    with ThreadPoolExecutor(1, "sender") as sender:
        coming = sender.submit(send)
        while sent := coming.result():
            coming = sender.submit(send)
            yield _received(*sent)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for batches: torch gives the memory of one stream to no other.

    Its small kernels go before those of a step, which would make them wait for a step's whole length.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def _received(batch: Batch, sent: torch.cuda.Event) -> Batch:
    now = torch.cuda.current_stream(batch[0].device)
    now.wait_event(sent)
    for tensor in batch:
        tensor.record_stream(now)  # else its memory is given away while this stream still reads it
    return batch


def check(device: torch.device) -> None:
    """Decode something small where `loader.decode=gpu` wants it.

    Raises:
        UserError: it cannot be done there.
    """
    try:
        decode_jpeg([encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))], device=device)
    except RuntimeError as error:
        raise UserError(
            f"loader.decode=gpu, but torchvision does not decode on {device} ({first_line(error)}): "
            "set loader.decode=cpu"
        ) from None


def decode(pieces: Sequence[Piece], pixels: Tensor) -> None:
    """Decode and resize images where `pixels` lies, and write them into their places.

    Args:
        pieces: JPEGs.
        pixels: uint8 [images, 3, size, size].

    Raises:
        RuntimeError: one of them cannot be decoded.
    """
    if not pieces:
        return
    encoded = [torch.frombuffer(bytearray(piece.data), dtype=torch.uint8) for piece in pieces]
    size = pixels.shape[-1]
    # nvJPEG writes on a stream of its own, which does not wait for ours: what ours still reads of the batch
    # before must not be given away as its memory. (The decoder waits for its own end in any case.)
    if pixels.device.type == "cuda":
        torch.cuda.current_stream(pixels.device).synchronize()
    images = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=pixels.device)
    for piece, image in zip(pieces, images, strict=True):
        crop = piece.crop
        left, upper, right, lower = crop.source
        source = image[None, :, upper:lower, left:right]
        if source.shape[-2:] != (crop.height, crop.width):
            shape = (crop.height, crop.width)
            # The antialiased filter knows no bytes on a GPU.
            resized = F.interpolate(source.float(), shape, mode="bilinear", antialias=True)
            source = resized.round_().clamp_(0, 255)
        view = source[..., crop.upper : crop.upper + size, crop.left : crop.left + size]
        pixels[piece.place : piece.place + 1] = view.flip(-1) if crop.mirrored else view
