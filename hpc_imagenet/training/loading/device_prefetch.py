"""Copy batches to a GPU one ahead of the training, and decode JPEGs on it (`loader.decode=gpu`).

nvJPEG decodes a list of JPEGs at once. It rounds and upsamples chroma differently from libjpeg-turbo, so the
pixels differ slightly: `loader.decode` is part of a run's signature.
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
from hpc_imagenet.training.loading.crop import CropBox, cut_square

Batch = tuple[Tensor, Tensor]
HostBatch = TypeVar("HostBatch")

# CUDA's antialiased filter keeps its weights in 48 KB of shared memory: it reduces a side to 1/94 at most if
# it is bilinear, and to 1/47 if it is bicubic (ATen's UpSampleBilinear2d.cu).
_TOO_LARGE_FACTOR = "interpolation parameters can not be handled"
SAMPLES = 64  # images that `check_gpu_decode` decodes to measure its rate


class PendingImage(NamedTuple):
    """An image that still has to be decoded on the device.

    Attributes:
        position: position in the batch.
        data: JPEG.
        crop: crop of the image.
    """

    position: int
    data: bytes
    crop: CropBox


def prefetch_to_device(
    host_batches: Iterator[HostBatch], device: torch.device, to_device: Callable[[HostBatch], Batch]
) -> Iterator[Batch]:
    """Yield batches on the GPU; a thread transfers the next one on its own CUDA stream.

    Args:
        host_batches: batches in host memory.
        device: a GPU.
        to_device: transfers one batch; it may wait for the GPU, while the caller submits more work to it.
    """
    stream = _stream(device)

    def send() -> tuple[Batch, torch.cuda.Event] | None:
        with torch.cuda.stream(stream):
            for host_batch in host_batches:
                return to_device(host_batch), stream.record_event()
        return None

    # The current device of a new thread is GPU 0, and leaving `torch.cuda.stream` restores it. That would
    # create a context there (0.5 GB), or fail if another process uses GPU 0 exclusively.
    with ThreadPoolExecutor(1, "sender", torch.cuda.set_device, (device,)) as sender:
        pending = sender.submit(send)
        while sent := pending.result():
            pending = sender.submit(send)
            yield _on_current_stream(*sent)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the only stream for batches: torch's allocator does not share memory between streams.

    Its high priority lets its small kernels run between those of a step instead of after them.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def _on_current_stream(batch: Batch, sent: torch.cuda.Event) -> Batch:
    stream = torch.cuda.current_stream(batch[0].device)
    stream.wait_event(sent)
    for tensor in batch:
        tensor.record_stream(stream)  # else its memory could be reused while this stream still reads it
    return batch


def check_gpu_decode(device: torch.device, threads: int = 1) -> str:
    """Check that the device can decode JPEGs, and measure its rate.

    Args:
        device: a GPU; a CPU in tests.
        threads: number of CPU threads to compare with.

    Returns:
        the log line with nvJPEG's engine, its images/s, and those of the CPU threads.

    Raises:
        UserError: the device cannot decode.
    """
    bits = torch.Generator().manual_seed(0)  # does not change the random numbers of the training
    grain = torch.randint(0, 64, (3, 375, 500), dtype=torch.uint8, generator=bits)
    slope = torch.arange(500, dtype=torch.float).mul(191 / 500).to(torch.uint8)
    sample = encode_jpeg(grain + slope, quality=92)  # ImageNet's usual size, 500 x 375 px and about 110 kB
    try:
        decode_jpeg([sample] * SAMPLES, mode=ImageReadMode.RGB, device=device)  # creates the nvJPEG handle
        began = time.perf_counter()
        decode_jpeg([sample] * SAMPLES, mode=ImageReadMode.RGB, device=device)  # blocks until done
        rate = SAMPLES / (time.perf_counter() - began)
    except RuntimeError as error:
        raise UserError(
            f"loader.decode=gpu, but torchvision cannot decode on {device} ({first_line(error)}): "
            "set loader.decode=cpu"
        ) from None
    data, began = bytes(sample.numpy()), time.perf_counter()
    for _ in range(8):
        simplejpeg.decode_jpeg(data, "RGB")
    cpu_rate = threads * 8 / (time.perf_counter() - began)
    line = f"{_engine(device)}: {rate:,.0f} images/s; {threads} CPU threads: about {cpu_rate:,.0f}"
    return line if rate > cpu_rate else f"{line}, so loader.decode=cpu is faster"


def _engine(device: torch.device) -> str:
    """Return the engine that nvJPEG is expected to use; no API reports it."""
    if device.type != "cuda":
        return "libjpeg"
    try:
        ctypes.CDLL("libnvcuvid.so.1")  # nvJPEG needs it for the hardware engine
    except OSError:
        return "nvJPEG (software: libnvcuvid.so.1 is missing, NVIDIA_DRIVER_CAPABILITIES needs video)"
    major, minor = torch.cuda.get_device_capability(device)
    has_engine = major >= 9 or (major, minor) in ((8, 0), (8, 9))  # A100, A30, Ada; Hopper and later
    return f"nvJPEG ({'hardware' if has_engine else 'software'})"


def decode_on_gpu(images: Sequence[PendingImage], pixels: Tensor) -> list[PendingImage]:
    """Decode and resize images on the device of `pixels`, and write them to their positions.

    Args:
        images: images to decode.
        pixels: pixels of the batch: uint8 [images, 3, size, size].

    Returns:
        images that the device cannot decode or resize; their positions are not written.

    Raises:
        torch.OutOfMemoryError: the device has too little free memory.
    """
    if not images:
        return []
    # nvJPEG's hardware engine ignores its stream (pytorch/torchcodec PR 1634), so it may write into memory
    # that this stream still reads for the previous batch. Only waiting on the host prevents that. (The
    # decoder itself blocks until it is done.)
    if pixels.device.type == "cuda":
        torch.cuda.current_stream(pixels.device).synchronize()
    decoded, refused = _decode(images, pixels.device)
    for image, whole in decoded:
        crop = image.crop
        left, upper, right, lower = crop.source
        source = whole[None, :, upper:lower, left:right]
        if source.shape[-2:] != (crop.height, crop.width):
            shape = (crop.height, crop.width)
            try:
                # The antialiased filter does not support uint8 on a GPU.
                resized = F.interpolate(source.float(), shape, mode=crop.interpolation, antialias=True)
            except RuntimeError as error:
                if _TOO_LARGE_FACTOR not in str(error):
                    raise
                refused.append(image)
                continue
            source = resized.round_().clamp_(0, 255)
        cut_square(source, crop, pixels[image.position : image.position + 1])
    return refused


def _decode(
    images: Sequence[PendingImage], device: torch.device
) -> tuple[list[tuple[PendingImage, Tensor]], list[PendingImage]]:
    """Return the decoded images with their pixels [3, height, width], and the refused images.

    An error does not name the image that caused it, so the list is bisected.
    """
    encoded = [torch.frombuffer(bytearray(image.data), dtype=torch.uint8) for image in images]
    for may_retry in (True, False):
        try:
            decoded = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
            return list(zip(images, decoded, strict=True)), []
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                break
            if not may_retry:
                raise torch.OutOfMemoryError(f"nvJPEG: {first_line(error)}") from None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels launched before the error may still write
            torch.cuda.empty_cache()  # nvJPEG allocates outside of torch's cache
    if len(images) == 1:
        return [], list(images)
    middle = len(images) // 2
    (first, refused), (second, more) = (_decode(half, device) for half in (images[:middle], images[middle:]))
    return first + second, refused + more


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an nvJPEG error is about memory; torchvision raises all of them as RuntimeError."""
    return out_of_memory(error) or bool(re.search(r"[Ff]ailed[^:\n]*: 5\b", str(error)))  # ALLOCATOR_FAILURE
