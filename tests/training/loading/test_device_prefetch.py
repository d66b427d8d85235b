"""GPU decoding and prefetching to the device, tested with a CPU as the device."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.distributed import out_of_memory
from hpc_imagenet.training.loading import device_prefetch
from hpc_imagenet.training.loading.batch_loader import Batch, BatchBuilder, BatchLoader
from hpc_imagenet.training.loading.crop import CenterCrop, RandomResizedCrop
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare, TrainSampler, ValSampler

CROP, VAL = RandomResizedCrop(16, 0.3, 0.5), ValSampler(13, 4)


class PatchedSplit(SplitReader):
    """A split in which one image is replaced."""

    def __init__(self, split: SplitReader, image: int, data: bytes) -> None:
        super().__init__(split.store, split.index)
        self.image, self.data = image, data

    def read(self, i: int) -> tuple[bytes, int]:
        return (self.data, 9) if i == self.image else super().read(i)


def load_batch(
    split: SplitReader, on_gpu: bool, skip: bool = False, interpolation: str = "bilinear", **more: float
) -> Batch:
    batches = BatchBuilder(split, RandomResizedCrop(24, 0.3, 0.5, interpolation), 0, skip, on_gpu, **more)
    return next(iter(BatchLoader(batches, TrainSampler(40, 0, BatchShare(40)), 2)))


@pytest.mark.slow
def test_gpu_decode_gives_the_same_batch(tiny: DatasetReader) -> None:
    """The code path of `loader.decode=gpu` resizes float pixels instead of bytes."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer, "PNG")  # not decodable by a GPU
    split = PatchedSplit(tiny.open_split("train"), 11, buffer.getvalue())
    builder = BatchBuilder(split, RandomResizedCrop(24, 0.3, 0.5), 0, on_gpu=True)
    keys = [(0, i) for i in range(40)]
    assert [image.position for image in builder.fill(builder.allocate(keys), keys, range(40))] == [
        *range(11),
        *range(12, 40),
    ]
    (pixels, labels), (gpu_pixels, gpu_labels) = load_batch(split, False), load_batch(split, True)
    assert torch.equal(labels, gpu_labels)
    off = (pixels.int() - gpu_pixels.int()).abs()
    assert off.max() <= 3
    assert off.float().mean() < 0.25
    assert pixels.float().std() > 10


def test_gpu_decode_with_the_bicubic_filter(tiny: DatasetReader) -> None:
    split = tiny.open_split("train")
    linear, cubic, gpu_cubic = (
        load_batch(split, on_gpu, interpolation=name)[0].int()
        for on_gpu, name in ((False, "bilinear"), (False, "bicubic"), (True, "bicubic"))
    )
    assert (cubic - gpu_cubic).abs().max() <= 4
    assert (cubic - linear).abs().float().mean() > 1


def test_gpu_decode_of_images_smaller_than_the_crop(tiny: DatasetReader) -> None:
    split, crop = tiny.open_split("val"), CenterCrop(48, 40)
    pixels, gpu_pixels = (
        next(iter(BatchLoader(BatchBuilder(split, crop, 0, on_gpu=on_gpu), VAL, 0)))[0].int()
        for on_gpu in (False, True)
    )
    assert (pixels - gpu_pixels).abs().max() <= 3
    assert pixels[..., 4:44, 4:44].float().std() > 10
    assert not gpu_pixels[..., :4, :].any()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_unreadable_image_error_has_its_name_with_gpu_decode(tiny: DatasetReader, on_gpu: bool) -> None:
    split = tiny.open_split("train")
    truncated = PatchedSplit(split, 5, split.read(5)[0][:300])
    with pytest.raises(UserError, match=r"image train_0005.JPEG cannot be read"):
        load_batch(truncated, on_gpu)
    pixels, labels = load_batch(truncated, on_gpu, skip=True)
    assert (labels == PADDING).sum() == 1
    assert not pixels[labels == PADDING].any()


def test_thread_transfers_one_batch_ahead(monkeypatch) -> None:
    """Without CUDA streams: order of transfers, their thread, errors, and the end of the iterator."""
    monkeypatch.setattr(device_prefetch, "_stream", lambda device: SimpleNamespace(record_event=lambda: None))
    monkeypatch.setattr(device_prefetch, "_on_current_stream", lambda batch, event: batch)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    requested: list[int] = []
    closed: list[bool] = []

    def host_batches() -> Iterator[int]:
        try:
            for number in range(5):
                requested.append(number)
                yield number
            raise UserError("no more")
        finally:
            closed.append(True)

    def to_device(number: int) -> Batch:
        assert threading.current_thread() is not threading.main_thread()
        return torch.tensor(number), torch.tensor(number)

    device = torch.device("cuda", 1)
    devices: list[tuple[object, str]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: devices.append((device, threading.current_thread().name))
    )
    sent = device_prefetch.prefetch_to_device(host_batches(), device, to_device)
    for number in range(5):
        assert int(next(sent)[0]) == number
        assert len(requested) <= number + 2
    with pytest.raises(UserError, match="no more"):
        next(sent)
    assert closed == [True]
    assert devices == [(device, "sender_0")]
    abandoned = device_prefetch.prefetch_to_device(host_batches(), device, to_device)
    next(abandoned)
    abandoned.close()
    assert closed == [True, True]
    assert "sender" not in str(threading.enumerate())


@pytest.mark.slow
def test_check_gpu_decode_reports_rates_or_an_error(monkeypatch) -> None:
    line = device_prefetch.check_gpu_decode(torch.device("cpu"), threads=3)
    assert re.fullmatch(r"libjpeg: [\d,]+ images/s; 3 CPU threads: about [\d,]+(, so .*)?", line)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("nvjpegCreateEx failed: 5.\nmore of it")

    monkeypatch.setattr(device_prefetch, "decode_jpeg", refuse)
    line = "but torchvision cannot decode on cuda (nvjpegCreateEx failed: 5): set loader.decode=cpu"
    with pytest.raises(UserError, match=re.escape(line)):
        device_prefetch.check_gpu_decode(torch.device("cuda"))


@pytest.mark.parametrize(
    ("capability", "library", "expected"),
    [
        ((9, 0), True, "nvJPEG (hardware)"),
        ((8, 6), True, "nvJPEG (software)"),
        (
            (9, 0),
            False,
            "nvJPEG (software: libnvcuvid.so.1 is missing, NVIDIA_DRIVER_CAPABILITIES needs video)",
        ),
    ],
)
def test_nvjpeg_engine_by_capability_and_library(monkeypatch, capability, library, expected) -> None:
    def load(name: str) -> None:
        if not library:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(device_prefetch.ctypes, "CDLL", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device_prefetch._engine(torch.device("cuda")) == expected


def is_red(data: torch.Tensor) -> bool:
    """Whether an encoded image is red."""
    image = Image.open(io.BytesIO(bytes(data.numpy()))).convert("RGB")
    red, green, _ = image.getpixel((0, 0))
    return red > green + 50


def with_red_image(split: SplitReader, image: int) -> PatchedSplit:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(buffer, "JPEG")
    return PatchedSplit(split, image, buffer.getvalue())


@pytest.mark.parametrize("workers", [0, 2])
def test_refused_image_is_decoded_by_cpus(tiny: DatasetReader, monkeypatch, capsys, workers: int) -> None:
    decode, sizes = device_prefetch.decode_jpeg, []

    def refuse_red(encoded: list[torch.Tensor], **kwargs: Any) -> Any:
        if any(map(is_red, encoded)):
            raise RuntimeError("Error while decoding JPEG images: Unknown chroma subsampling")
        sizes.append(len(encoded))
        return decode(encoded, **kwargs)

    monkeypatch.setattr(device_prefetch, "decode_jpeg", refuse_red)
    split = with_red_image(tiny.open_split("train"), 11)
    batches = BatchBuilder(split, CROP, 0, on_gpu=True)
    loader = BatchLoader(batches, TrainSampler(40, 0, BatchShare(20)), workers)
    found = list(loader)
    assert sum(sizes) == 39  # the device decodes each other image once
    expected = list(BatchLoader(BatchBuilder(split, CROP, 0), TrainSampler(40, 0, BatchShare(20)), 2))
    for (pixels, labels), (cpu_pixels, cpu_labels) in zip(found, expected, strict=True):
        assert torch.equal(labels, cpu_labels)
        assert (pixels.int() - cpu_pixels.int()).abs().max() <= 3
    assert batches.refused == {11}
    warning = "warning: cpu cannot decode or resize image train_0011.JPEG; a CPU does\n"
    assert capsys.readouterr().out == warning
    sizes.clear()
    list(loader)
    assert sizes == [20, 19] or sizes == [19, 20]  # not submitted to the device again
    assert capsys.readouterr().out == ""


def without_huffman_table(split: SplitReader, image: int) -> PatchedSplit:
    """Damage an image so that its header still looks valid."""
    data, table = bytearray(split.read(image)[0]), b"\xff\xc4"
    at = data.index(table) + 5  # after marker, length and table number
    data[at : at + 16] = b"\xff" * 16  # impossibly many codes
    return PatchedSplit(split, image, bytes(data))


def test_refused_image_that_cpus_cannot_decode_either_is_corrupt(tiny: DatasetReader, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to parse jpeg stream: 3")

    monkeypatch.setattr(device_prefetch, "decode_jpeg", refuse)
    damaged = without_huffman_table(tiny.open_split("train"), 5)
    with pytest.raises(UserError, match=r"image train_0005.JPEG cannot be read"):
        load_batch(damaged, True)
    pixels, labels = load_batch(damaged, True, skip=True)
    assert (labels == PADDING).sum() == 1
    assert not pixels[labels == PADDING].any()


@pytest.mark.parametrize(
    "message",
    [
        "Error while decoding JPEG images: CUDA out of memory. Tried to allocate 2.00 MiB",
        "Error while decoding JPEG images: Failed to decode batch: 5",  # NVJPEG_STATUS_ALLOCATOR_FAILURE
    ],
)
def test_nvjpeg_allocation_failure_is_out_of_memory(tiny: DatasetReader, monkeypatch, message: str) -> None:
    calls: list[int] = []

    def refuse(encoded: list[torch.Tensor], **_: object) -> None:
        calls.append(len(encoded))
        raise RuntimeError(message)

    monkeypatch.setattr(device_prefetch, "decode_jpeg", refuse)
    with pytest.raises(torch.OutOfMemoryError, match=r"^nvJPEG: Error while decoding") as caught:
        load_batch(tiny.open_split("train"), True)
    assert calls == [40, 40]  # one retry, and no bisection
    assert out_of_memory(caught.value)


def test_image_that_the_device_cannot_reduce_is_resized_on_cpus(
    tiny: DatasetReader, monkeypatch, capsys
) -> None:
    """CUDA's antialiased filter refuses large factors."""
    resize = torch.nn.functional.interpolate

    def refuse_large(source: torch.Tensor, shape: tuple[int, int], **options: Any) -> torch.Tensor:
        if source.shape[-1] > 20:
            raise RuntimeError("Provided interpolation parameters can not be handled with current algorithm")
        return resize(source, shape, **options)

    monkeypatch.setattr(device_prefetch, "F", SimpleNamespace(interpolate=refuse_large))
    split = tiny.open_split("train")
    (pixels, labels), (gpu_pixels, gpu_labels) = load_batch(split, False), load_batch(split, True)
    assert "cannot decode or resize image" in capsys.readouterr().out
    assert torch.equal(labels, gpu_labels)
    assert (pixels.int() - gpu_pixels.int()).abs().max() <= 3


def test_cpu_checks_a_sample_of_device_decoded_images(tiny: DatasetReader, monkeypatch) -> None:
    """A device decodes damaged data without an error."""
    damaged = without_huffman_table(tiny.open_split("train"), 5)
    monkeypatch.setattr(
        device_prefetch, "decode_jpeg", lambda encoded, **_: [torch.zeros(3, 32, 32)] * len(encoded)
    )
    load_batch(damaged, True, cpu_checked=0.0)
    with pytest.raises(UserError, match=r"image train_0005.JPEG cannot be read"):
        load_batch(damaged, True, cpu_checked=1.0)


def test_missing_page_locked_memory_error(tiny: DatasetReader, monkeypatch) -> None:
    def fail(*_: object, **kwargs: object) -> None:
        assert kwargs["pin_memory"]
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(UserError, match=r"^the host has no page-locked memory for a batch of 1 images of 16"):
        BatchBuilder(tiny.open_split("train"), CROP, 0).allocate([(0, 0)], pin=True)
