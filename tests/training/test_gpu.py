"""What is left to a GPU, and how it gets there; the device of these tests is a CPU."""

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
from hpc_imagenet.training.loading import batch_loader, device_prefetch
from hpc_imagenet.training.loading.batch_loader import Batch, BatchBuilder, BatchLoader
from hpc_imagenet.training.loading.crop import RandomResizedCrop
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare, TrainSampler

VIEW = RandomResizedCrop(16, 0.3, 0.5)


class Tampered(SplitReader):
    """A split of which one image is another one."""

    def __init__(self, split: SplitReader, image: int, data: bytes) -> None:
        super().__init__(split.store, split.index)
        self.image, self.data = image, data

    def read(self, i: int) -> tuple[bytes, int]:
        return (self.data, 9) if i == self.image else super().read(i)


def through(split: SplitReader, on_gpu: bool, skip: bool = False) -> Batch:
    batches = BatchBuilder(split, RandomResizedCrop(24, 0.3, 0.5), 0, skip, on_gpu)
    return next(iter(BatchLoader(batches, TrainSampler(40, 0, BatchShare(40)), 2)))


def test_what_is_left_to_a_gpu_is_the_same_batch(tiny: DatasetReader) -> None:
    """The way of `loader.decode=gpu`, with a CPU as the device: floats instead of bytes when resizing."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer, "PNG")  # which no GPU decodes
    split = Tampered(tiny.open_split("train"), 11, buffer.getvalue())
    whole = BatchBuilder(split, RandomResizedCrop(24, 0.3, 0.5), 0, on_gpu=True)
    keys = [(0, i) for i in range(40)]
    assert [piece.place for piece in whole.fill(whole.empty(keys), keys, range(40))] == [
        *range(11),
        *range(12, 40),
    ]
    (pixels, labels), (others, names) = through(split, False), through(split, True)
    assert torch.equal(labels, names)
    off = (pixels.int() - others.int()).abs()
    assert off.max() <= 3
    assert off.float().mean() < 0.25
    assert pixels.float().std() > 10


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_gpu_names_an_unreadable_image_as_well(tiny: DatasetReader, on_gpu: bool) -> None:
    split = tiny.open_split("train")
    cut = Tampered(split, 5, split.read(5)[0][:300])
    with pytest.raises(UserError, match=r"image train_0005.JPEG cannot be read"):
        through(cut, on_gpu)
    pixels, labels = through(cut, on_gpu, skip=True)
    assert (labels == PADDING).sum() == 1
    assert not pixels[labels == PADDING].any()


def test_batches_are_sent_by_another_thread_one_ahead(monkeypatch) -> None:
    """With the streams of a GPU left out: what is sent when, by whom, and how errors and ends come back."""
    monkeypatch.setattr(device_prefetch, "_stream", lambda device: SimpleNamespace(record_event=lambda: None))
    monkeypatch.setattr(device_prefetch, "_received", lambda batch, event: batch)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    asked: list[int] = []
    closed: list[bool] = []

    def prepared() -> Iterator[int]:
        try:
            for number in range(5):
                asked.append(number)
                yield number
            raise UserError("no more")
        finally:
            closed.append(True)

    def finish(number: int) -> Batch:
        assert threading.current_thread() is not threading.main_thread()
        return torch.tensor(number), torch.tensor(number)

    device = torch.device("cuda", 1)
    placed: list[tuple[object, str]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda place: placed.append((place, threading.current_thread().name))
    )
    sent = device_prefetch.prefetch_to_device(prepared(), device, finish)
    for number in range(5):
        assert int(next(sent)[0]) == number
        assert len(asked) <= number + 2
    with pytest.raises(UserError, match="no more"):
        next(sent)
    assert closed == [True]
    assert placed == [(device, "sender_0")]  # before the stream, whose end goes back to the thread's device
    early = device_prefetch.prefetch_to_device(prepared(), device, finish)
    next(early)
    early.close()
    assert closed == [True, True]
    assert "sender" not in str(threading.enumerate())


def test_decoding_is_checked_and_measured_before_the_training(monkeypatch) -> None:
    line = device_prefetch.check_gpu_decode(torch.device("cpu"), threads=3)
    assert re.fullmatch(r"libjpeg: [\d,]+ images/s; 3 CPU threads: about [\d,]+(, so .*)?", line)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("nvjpegCreateEx failed: 5.\nmore of it")

    monkeypatch.setattr(device_prefetch, "decode_jpeg", refuse)
    line = "but torchvision does not decode on cuda (nvjpegCreateEx failed: 5): set loader.decode=cpu"
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
def test_the_engine_of_nvjpeg_is_named(monkeypatch, capability, library, expected) -> None:
    def load(name: str) -> None:
        if not library:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(device_prefetch.ctypes, "CDLL", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device_prefetch._engine(torch.device("cuda")) == expected


def of_red(data: torch.Tensor) -> bool:
    """Whether an encoded image is the one that a test has made red."""
    image = Image.open(io.BytesIO(bytes(data.numpy()))).convert("RGB")
    red, green, _ = image.getpixel((0, 0))
    return red > green + 50


def with_red(split: SplitReader, image: int) -> Tampered:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(buffer, "JPEG")
    return Tampered(split, image, buffer.getvalue())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_the_device_refuses_is_decoded_by_cpus_alone(
    tiny: DatasetReader, monkeypatch, capsys, workers: int
) -> None:
    decode, sizes = device_prefetch.decode_jpeg, []

    def picky(encoded: list[torch.Tensor], **more: Any) -> Any:
        if any(map(of_red, encoded)):
            raise RuntimeError("Error while decoding JPEG images: Unknown chroma subsampling")
        sizes.append(len(encoded))
        return decode(encoded, **more)

    monkeypatch.setattr(device_prefetch, "decode_jpeg", picky)
    split = with_red(tiny.open_split("train"), 11)
    batches = BatchBuilder(split, VIEW, 0, on_gpu=True)
    loader = BatchLoader(batches, TrainSampler(40, 0, BatchShare(20)), workers)
    there = list(loader)
    assert sum(sizes) == 39  # each of the others once, on the device
    here = list(BatchLoader(BatchBuilder(split, VIEW, 0), TrainSampler(40, 0, BatchShare(20)), 2))
    for (pixels, labels), (others, names) in zip(there, here, strict=True):
        assert torch.equal(labels, names)
        assert (pixels.int() - others.int()).abs().max() <= 3
    assert batches.refused == {11}
    warning = "warning: cpu cannot decode image train_0011.JPEG; a CPU decodes it\n"
    assert capsys.readouterr().out == warning
    sizes.clear()
    list(loader)
    assert sizes == [20, 19] or sizes == [19, 20]  # it is not left to the device again
    assert capsys.readouterr().out == ""


def without_huffman_table(split: SplitReader, image: int) -> Tampered:
    """Damage an image so that its header still looks whole."""
    whole, table = bytearray(split.read(image)[0]), b"\xff\xc4"
    at = whole.index(table) + 5  # behind marker, length and number
    whole[at : at + 16] = b"\xff" * 16  # more codes than there can be
    return Tampered(split, image, bytes(whole))


def test_a_refused_image_that_cpus_cannot_decode_either_counts_nowhere(
    tiny: DatasetReader, monkeypatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to parse jpeg stream: 3")

    monkeypatch.setattr(device_prefetch, "decode_jpeg", refuse)
    cut = without_huffman_table(tiny.open_split("train"), 5)
    with pytest.raises(UserError, match=r"image train_0005.JPEG cannot be read"):
        through(cut, True)
    pixels, labels = through(cut, True, skip=True)
    assert (labels == PADDING).sum() == 1
    assert not pixels[labels == PADDING].any()


@pytest.mark.parametrize(
    "words",
    [
        "Error while decoding JPEG images: CUDA out of memory. Tried to allocate 2.00 MiB",
        "Error while decoding JPEG images: Failed to decode batch: 5",  # NVJPEG_STATUS_ALLOCATOR_FAILURE
    ],
)
def test_out_of_memory_in_nvjpeg_is_out_of_memory(tiny: DatasetReader, monkeypatch, words: str) -> None:
    calls: list[int] = []

    def refuse(encoded: list[torch.Tensor], **_: object) -> None:
        calls.append(len(encoded))
        raise RuntimeError(words)

    monkeypatch.setattr(device_prefetch, "decode_jpeg", refuse)
    with pytest.raises(torch.OutOfMemoryError, match=r"^nvJPEG: Error while decoding") as caught:
        through(tiny.open_split("train"), True)
    assert calls == [40, 40]  # once more, then no image is blamed for it
    assert out_of_memory(caught.value)


def test_a_sample_of_what_the_device_decodes_is_checked_by_a_cpu(tiny: DatasetReader, monkeypatch) -> None:
    """A device decodes damaged data without an error."""
    cut = without_huffman_table(tiny.open_split("train"), 5)
    monkeypatch.setattr(
        device_prefetch, "decode_jpeg", lambda encoded, **_: [torch.zeros(3, 32, 32)] * len(encoded)
    )
    monkeypatch.setattr(batch_loader, "SAMPLED", 0.0)
    through(cut, True)
    monkeypatch.setattr(batch_loader, "SAMPLED", 1.0)
    with pytest.raises(UserError, match=r"image train_0005.JPEG cannot be read"):
        through(cut, True)


def test_a_host_without_page_locked_memory_does_not_blame_the_gpu(tiny: DatasetReader, monkeypatch) -> None:
    def full(*_: object, **more: object) -> None:
        assert more["pin_memory"]
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match=r"^the host has no page-locked memory for a batch of 1 images of 16"):
        BatchBuilder(tiny.open_split("train"), VIEW, 0).empty([(0, 0)], pin=True)
