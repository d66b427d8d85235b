from __future__ import annotations

import io
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_imagenet.datastore.store import Store
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.data import Batches, cpus, loader
from hpc_imagenet.training.sampler import PADDING, Share, TrainSampler
from hpc_imagenet.training.transforms import TrainView, ValView, random_box
from hpc_imagenet.world import World

VIEW = TrainView(16, 0.3, 0.5)


def test_a_batch_holds_the_pictures_of_its_keys(tiny: Store) -> None:
    split = tiny.split("val")
    pixels, labels = Batches(split, ValView(32, 32), 0)[[(0, 4), (0, PADDING), (0, 2)]]
    assert pixels.shape == (3, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [split.read(4)[1], -1, split.read(2)[1]]
    expected = np.asarray(Image.open(io.BytesIO(split.read(4)[0])).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(pixels[0].numpy(), expected)
    assert not pixels[1].any()


def test_augmentation_depends_on_seed_epoch_and_image_alone(tiny: Store) -> None:
    split = tiny.split("train")
    once = Batches(split, VIEW, 7)[[(1, 5), (1, 6)]][0]
    again = Batches(split, VIEW, 7)[[(1, 6), (1, 5)]][0]
    assert torch.equal(once[0], again[1])
    assert torch.equal(once[1], again[0])
    for other in (Batches(split, VIEW, 8)[[(1, 5)]][0], Batches(split, VIEW, 7)[[(2, 5)]][0]):
        assert not torch.equal(once[0], other[0])


def test_workers_change_nothing(tiny: Store) -> None:
    def seen(workers: int) -> list[torch.Tensor]:
        batches = Batches(tiny.split("train"), VIEW, 0)
        return [p for p, _ in loader(batches, TrainSampler(40, 0, Share(8)), workers, pin=False)]

    here, there = seen(0), seen(2)
    assert len(here) == len(there) == 5
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert there[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (640, 10), (1, 1)])
def test_random_boxes_lie_inside_and_have_the_area(size: tuple[int, int]) -> None:
    rng = random.Random(0)
    boxes = [random_box(*size, 0.25, rng) for _ in range(300)]
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= size[0]
        assert 0 <= upper < lower <= size[1]
    if min(size) >= 64:
        areas = [(r - x) * (b - y) / (size[0] * size[1]) for x, y, r, b in boxes]
        assert min(areas) > 0.23
        assert max(areas) > 0.8
        assert len(set(boxes)) > 250


def test_val_view_is_torchvisions() -> None:
    from torchvision.transforms import v2

    rng = np.random.default_rng(0)
    for width, height in ((50, 37), (37, 51), (40, 40)):
        picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        expected = v2.CenterCrop(28)(v2.Resize(32)(picture))
        assert np.array_equal(np.asarray(ValView(28, 32)(picture, random.Random(0))), np.asarray(expected))


def test_flip_is_a_mirror_with_its_chance() -> None:
    picture = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    plain, mirror = (np.asarray(TrainView(16, 1, flip)(picture, random.Random(1))) for flip in (0, 1))
    assert np.array_equal(plain[:, ::-1], mirror)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tiny: Store, tmp_path: Path, workers: int) -> None:
    shutil.copytree(tiny.folder, tmp_path / "v1")
    offset, length, *_ = tiny.split("train").index[7].item()
    with (tmp_path / "v1" / "train.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * length)
    batches = Batches(Store(tmp_path / "v1").split("train"), VIEW, 0)
    iterator: Any = iter(loader(batches, TrainSampler(40, 0, Share(8)), workers, pin=False))
    with pytest.raises(UserError) as caught:
        list(iterator)
    if workers:
        iterator._shutdown_workers()
    line = str(caught.value).splitlines()[-1]
    assert f"{tmp_path}/v1: image train_0007.JPEG cannot be read (cannot identify image file)" in line


def test_cpus_are_those_of_the_allocation() -> None:
    mine = cpus(World(), {})
    assert cpus(World(), {"SLURM_CPUS_PER_TASK": "1"}) == 1
    assert (
        cpus(World(), {"SLURM_CPUS_PER_TASK": "1000000"}) == mine
    )  # Slurm may be told of more than there are
    assert cpus(World(size=2, local_size=2), {}) == max(1, mine // 2)
    assert cpus(World(size=2, local_size=2), {"SLURM_PROCID": "0"}) == mine
