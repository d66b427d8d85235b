"""What is left to a GPU, and how it gets there; the device of these tests is a CPU."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from hpc_imagenet.datastore.store import Split, Store
from hpc_imagenet.errors import UserError
from hpc_imagenet.training import gpu
from hpc_imagenet.training.data import Batch, Batches, Loader
from hpc_imagenet.training.sampler import PADDING, Share, TrainSampler
from hpc_imagenet.training.transforms import TrainView

VIEW = TrainView(16, 0.3, 0.5)


class Tampered(Split):
    """A split of which one image is another one."""

    def __init__(self, split: Split, image: int, data: bytes) -> None:
        super().__init__(split.store, split.index)
        self.image, self.data = image, data

    def read(self, i: int) -> tuple[bytes, int]:
        return (self.data, 9) if i == self.image else super().read(i)


def through(split: Split, on_gpu: bool, skip: bool = False) -> Batch:
    batches = Batches(split, TrainView(24, 0.3, 0.5), 0, skip, on_gpu)
    return next(iter(Loader(batches, TrainSampler(40, 0, Share(40)), 2)))


def test_what_is_left_to_a_gpu_is_the_same_batch(tiny: Store) -> None:
    """The way of `loader.decode=gpu`, with a CPU as the device: floats instead of bytes when resizing."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer, "PNG")  # which no GPU decodes
    split = Tampered(tiny.split("train"), 11, buffer.getvalue())
    whole = Batches(split, TrainView(24, 0.3, 0.5), 0, on_gpu=True)
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
def test_a_gpu_names_an_unreadable_image_as_well(tiny: Store, on_gpu: bool) -> None:
    split = tiny.split("train")
    cut = Tampered(split, 5, split.read(5)[0][:300])
    with pytest.raises(UserError, match=r"image train_0005.JPEG cannot be read"):
        through(cut, on_gpu)
    pixels, labels = through(cut, on_gpu, skip=True)
    assert (labels == PADDING).sum() == 1
    assert not pixels[labels == PADDING].any()


def test_batches_are_sent_by_another_thread_one_ahead(monkeypatch) -> None:
    """With the streams of a GPU left out: what is sent when, by whom, and how errors and ends come back."""
    monkeypatch.setattr(gpu, "_stream", lambda device: SimpleNamespace(record_event=lambda: None))
    monkeypatch.setattr(gpu, "_received", lambda batch, event: batch)
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

    device = torch.device("cuda", 0)
    sent = gpu.ahead(prepared(), device, finish)
    for number in range(5):
        assert int(next(sent)[0]) == number
        assert len(asked) <= number + 2
    with pytest.raises(UserError, match="no more"):
        next(sent)
    assert closed == [True]
    early = gpu.ahead(prepared(), device, finish)
    next(early)
    early.close()
    assert closed == [True, True]
    assert "sender" not in str(threading.enumerate())


def test_a_device_that_does_not_decode_is_told_before_it_has_to(monkeypatch) -> None:
    gpu.check(torch.device("cpu"))

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("nvjpegCreateEx failed: 5.\nmore of it")

    monkeypatch.setattr(gpu, "decode_jpeg", refuse)
    line = "but torchvision does not decode on cuda (nvjpegCreateEx failed: 5): set loader.decode=cpu"
    with pytest.raises(UserError, match=re.escape(line)):
        gpu.check(torch.device("cuda"))


def test_a_batch_that_the_device_refuses_is_decoded_all_the_same_and_told_once(
    tiny: Store, monkeypatch, capsys
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(gpu, "decode_jpeg", refuse)
    loader = Loader(Batches(tiny.split("train"), VIEW, 0, on_gpu=True), TrainSampler(40, 0, Share(10)), 2)
    there = list(loader)
    here = list(Loader(Batches(tiny.split("train"), VIEW, 0), TrainSampler(40, 0, Share(10)), 2))
    assert all(
        torch.equal(a, b)
        for one, other in zip(there, here, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert capsys.readouterr().out == "warning: cpu did not decode a batch, and CPUs do (no)\n"
