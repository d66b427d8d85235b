"""Copy batches to a GPU while it works on the one before, and decode JPEGs there (`loader.decode=gpu`).

nvJPEG decodes a list of JPEGs at once. It rounds and smooths colours in its own way, so its pixels are not
quite those of libjpeg-turbo: a training that decodes there is another run.
"""

from __future__ import annotations

import ctypes
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import simplejpeg
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from hpc_imagenet.errors import UserError, first_line
from hpc_imagenet.training.distributed import out_of_memory
from hpc_imagenet.training.loading.crop import CropBox

Batch = tuple[Tensor, Tensor]
Prepared = TypeVar("Prepared")

SAMPLES = 64  # images that `check` decodes to measure a rate


class PendingImage(NamedTuple):
    """An image that is still to be decoded into its place in a batch."""

    place: int
    data: bytes
    crop: CropBox


def prefetch_to_device(
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
        with torch.cuda.stream(stream):
            for one in prepared:
                return finish(one), stream.record_event()
        return None

    # A new thread is on GPU 0, and leaving `torch.cuda.stream` goes back to it. That makes a context there
    # (0.5 GB), or fails where GPU 0 belongs to another process alone.
    with ThreadPoolExecutor(1, "sender", torch.cuda.set_device, (device,)) as sender:
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


def check_gpu_decode(device: torch.device, threads: int = 1) -> str:
    """Decode a sample where `loader.decode=gpu` wants it, and measure how fast that is.

    Args:
        device: a GPU; or a CPU, in tests.
        threads: number of CPU threads that would decode otherwise.

    Returns:
        a line for the log: nvJPEG's engine, its images/s, and those of the CPU threads.

    Raises:
        UserError: the device cannot decode.
    """
    bits = torch.Generator().manual_seed(0)  # the training's own random numbers stay as they are
    grain = torch.randint(0, 64, (3, 375, 500), dtype=torch.uint8, generator=bits)
    slope = torch.arange(500, dtype=torch.float).mul(191 / 500).to(torch.uint8)
    sample = encode_jpeg(grain + slope, quality=92)  # ImageNet's usual size, 500 x 375 px and about 110 kB
    try:
        decode_jpeg([sample] * SAMPLES, mode=ImageReadMode.RGB, device=device)  # creates nvJPEG's handle
        began = time.perf_counter()
        decode_jpeg([sample] * SAMPLES, mode=ImageReadMode.RGB, device=device)  # returns when it has ended
        rate = SAMPLES / (time.perf_counter() - began)
    except RuntimeError as error:
        raise UserError(
            f"loader.decode=gpu, but torchvision does not decode on {device} ({first_line(error)}): "
            "set loader.decode=cpu"
        ) from None
    data, began = bytes(sample.numpy()), time.perf_counter()
    for _ in range(8):
        simplejpeg.decode_jpeg(data, "RGB")
    others = threads * 8 / (time.perf_counter() - began)
    line = f"{_engine(device)}: {rate:,.0f} images/s; {threads} CPU threads: about {others:,.0f}"
    return line if rate > others else f"{line}, so loader.decode=cpu is faster"


def _engine(device: torch.device) -> str:
    """Return which of nvJPEG's engines is to be expected; neither nvJPEG nor torchvision says it."""
    if device.type != "cuda":
        return "libjpeg"
    try:
        ctypes.CDLL("libnvcuvid.so.1")  # nvJPEG reaches the hardware by it
    except OSError:
        return "nvJPEG (software: libnvcuvid.so.1 is missing, NVIDIA_DRIVER_CAPABILITIES needs video)"
    major, minor = torch.cuda.get_device_capability(device)
    has_engine = major >= 9 or (major, minor) in ((8, 0), (8, 9))  # A100, A30, Ada; Hopper and later
    return f"nvJPEG ({'hardware' if has_engine else 'software'})"


def decode_on_gpu(pieces: Sequence[PendingImage], pixels: Tensor) -> list[PendingImage]:
    """Decode and resize images on the device of `pixels`, and write them into their places.

    Args:
        pieces: JPEGs.
        pixels: uint8 [images, 3, size, size].

    Returns:
        the pieces that the device refused; their places are not written.

    Raises:
        torch.OutOfMemoryError: the device has no memory left for it.
    """
    if not pieces:
        return []
    size = pixels.shape[-1]
    # nvJPEG's hardware engine ignores its stream (pytorch/torchcodec PR 1634) and so may write into memory
    # that this stream still reads for the batch before. Only waiting on the host prevents it. (The decoder
    # waits for its own end in any case.)
    if pixels.device.type == "cuda":
        torch.cuda.current_stream(pixels.device).synchronize()
    decoded, refused = _decoded(pieces, pixels.device)
    for piece, image in decoded:
        crop = piece.crop
        left, upper, right, lower = crop.source
        source = image[None, :, upper:lower, left:right]
        if source.shape[-2:] != (crop.height, crop.width):
            shape = (crop.height, crop.width)
            # The antialiased filter does not take uint8 on a GPU.
            resized = F.interpolate(source.float(), shape, mode="bilinear", antialias=True)
            source = resized.round_().clamp_(0, 255)
        view = source[..., crop.upper : crop.upper + size, crop.left : crop.left + size]
        pixels[piece.place : piece.place + 1] = view.flip(-1) if crop.mirrored else view
    return refused


def _decoded(
    pieces: Sequence[PendingImage], device: torch.device
) -> tuple[list[tuple[PendingImage, Tensor]], list[PendingImage]]:
    """Return the images [3, height, width] that the device decodes, and the pieces that it refuses.

    An error does not say which image it is about, so halves are tried until it is alone.
    """
    encoded = [torch.frombuffer(bytearray(piece.data), dtype=torch.uint8) for piece in pieces]
    for again in (True, False):
        try:
            images = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
            return list(zip(pieces, images, strict=True)), []
        except RuntimeError as error:
            if not _no_memory(error):
                break
            if not again:
                raise torch.OutOfMemoryError(f"nvJPEG: {first_line(error)}") from None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what was begun before the error may still be written
            torch.cuda.empty_cache()  # nvJPEG takes its memory from outside of torch's cache
    if len(pieces) == 1:
        return [], list(pieces)
    middle = len(pieces) // 2
    (first, refused), (second, others) = (_decoded(p, device) for p in (pieces[:middle], pieces[middle:]))
    return first + second, refused + others


def _no_memory(error: RuntimeError) -> bool:
    """Whether nvJPEG's error is about memory; torchvision makes all of them a plain RuntimeError."""
    return out_of_memory(error) or bool(re.search(r"[Ff]ailed[^:\n]*: 5\b", str(error)))  # ALLOCATOR_FAILURE
