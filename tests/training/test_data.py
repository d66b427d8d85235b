from __future__ import annotations

import gc
import io
import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.dist_env import DistEnv, available_cpus, pinned_cpus
from hpc_imagenet.training.loading.batch_loader import Batch, BatchBuilder, BatchLoader
from hpc_imagenet.training.loading.crop import (
    CenterCrop,
    CropBox,
    CropPolicy,
    RandomResizedCrop,
    apply_crop,
    random_box,
)
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare, Key, TrainSampler, ValSampler

VIEW = RandomResizedCrop(16, 0.3, 0.5)


def batch(split: SplitReader, view: CropPolicy, seed: int, keys: list[Key]) -> Batch:
    batches = BatchBuilder(split, view, seed)
    made = batches.empty(keys)
    assert not batches.fill(made, keys, range(len(keys)))
    return made


def drawn(picture: Image.Image, crop: CropBox, size: int) -> np.ndarray:
    """What `crop` makes of a picture, [size, size, 3]."""
    source = np.array(picture.crop(crop.source))
    out = torch.empty(1, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    apply_crop(torch.from_numpy(source).permute(2, 0, 1)[None], crop, out)
    return out[0].permute(1, 2, 0).numpy()


def photo(width: int, height: int) -> Image.Image:
    """Soft forms with hard edges and grain."""
    bits = np.random.default_rng(width)
    coarse = bits.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), float)
    soft[height // 3 :, width // 2 :] = 255 - soft[height // 3 :, width // 2 :]
    return Image.fromarray((soft + bits.normal(0, 8, (height, width, 1))).clip(0, 255).astype(np.uint8))


def spoil(store: DatasetReader, folder: Path, split: str, *images: int) -> DatasetReader:
    """Copy a datastore, and overwrite some of its images."""
    shutil.copytree(store.folder, folder)
    for image in images:
        offset, length, *_ = store.open_split(split).index[image].item()
        with (folder / f"{split}.tar").open("r+b") as file:
            file.seek(offset)
            file.write(b"\0" * length)
    return DatasetReader(folder)


def test_a_batch_holds_the_pictures_of_its_keys(tiny: DatasetReader) -> None:
    split = tiny.open_split("val")
    pixels, labels = batch(split, CenterCrop(32, 32), 0, [(0, 4), (0, PADDING), (0, 2)])
    assert pixels.shape == (3, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [split.read(4)[1], -1, split.read(2)[1]]
    expected = np.asarray(Image.open(io.BytesIO(split.read(4)[0])).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(pixels[0].numpy(), expected)
    assert not pixels[1].any()


def test_augmentation_depends_on_seed_epoch_and_image_alone(tiny: DatasetReader) -> None:
    split = tiny.open_split("train")
    once = batch(split, VIEW, 7, [(1, 5), (1, 6)])[0]
    again = batch(split, VIEW, 7, [(1, 6), (1, 5)])[0]
    assert torch.equal(once[0], again[1])
    assert torch.equal(once[1], again[0])
    for other in (batch(split, VIEW, 8, [(1, 5)])[0], batch(split, VIEW, 7, [(2, 5)])[0]):
        assert not torch.equal(once[0], other[0])


def test_the_number_of_threads_changes_nothing(tiny: DatasetReader) -> None:
    split = tiny.open_split("train")

    def seen(workers: int) -> list[Batch]:
        loader = BatchLoader(BatchBuilder(split, VIEW, 0), TrainSampler(40, 0, BatchShare(20)), workers)
        assert len(loader) == 2
        return [one for _ in range(2) for one in loader]  # an epoch twice over

    here = seen(0)
    for workers in (1, 2, 5):
        there = seen(workers)
        assert len(here) == len(there) == 4
        for (pixels, labels), (others, names) in zip(here, there, strict=True):
            assert torch.equal(pixels, others)
            assert torch.equal(labels, names)
            assert others.is_contiguous(memory_format=torch.channels_last)


def test_batches_that_were_handed_out_stay_as_they_are(tiny: DatasetReader) -> None:
    loader = BatchLoader(
        BatchBuilder(tiny.open_split("train"), VIEW, 0), TrainSampler(40, 0, BatchShare(4)), 2
    )
    kept, copies = [], []
    for pixels, _ in loader:
        kept.append(pixels)
        copies.append(pixels.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_threads_write_for_somebody_in_inference_mode(tiny: DatasetReader) -> None:
    batches = BatchBuilder(tiny.open_split("val"), CenterCrop(16, 16), 0)
    plain = list(BatchLoader(batches, ValSampler(13, 4), 2))
    with torch.inference_mode():
        there = list(BatchLoader(batches, ValSampler(13, 4), 2))
    assert [torch.equal(a, b) for (a, _), (b, _) in zip(plain, there, strict=True)] == [True] * 4


@pytest.mark.parametrize(("workers", "begun"), [(2, 3), (6, 6)])  # of one part each
def test_no_more_is_made_ahead_than_two_batches_or_a_part_a_thread(
    tiny: DatasetReader, workers: int, begun: int
) -> None:
    asked: list[int] = []

    class Told(TrainSampler):
        def __iter__(self):
            for keys in super().__iter__():
                asked.append(len(keys))
                yield keys

    iterator = iter(
        BatchLoader(BatchBuilder(tiny.open_split("train"), VIEW, 0), Told(40, 0, BatchShare(4)), workers)
    )
    next(iterator)
    assert len(asked) == begun
    next(iterator)
    assert len(asked) == begun + 1


def test_epochs_leave_nothing_behind(tiny: DatasetReader) -> None:
    """Neither threads, files nor memory, also where an epoch was left in its middle."""
    loader = BatchLoader(
        BatchBuilder(tiny.open_split("train"), VIEW, 0), TrainSampler(40, 0, BatchShare(8)), 2
    )
    process = psutil.Process()

    def epoch() -> tuple[int, int]:
        list(loader)
        next(iter(loader))
        return threading.active_count(), process.num_fds()

    gc.collect()
    epoch()
    first = epoch()
    before = process.memory_info().rss
    assert {epoch() for _ in range(15)} == {first}
    assert process.memory_info().rss - before < 8e6  # 600 images and 150 batches later


def test_torchs_own_threads_stay_the_trainings(tiny: DatasetReader) -> None:
    torch.set_num_threads(2)
    list(BatchLoader(BatchBuilder(tiny.open_split("train"), VIEW, 0), TrainSampler(40, 0, BatchShare(8)), 2))
    counts = [torch.get_num_threads()]
    other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert counts == [2, 2]


def test_threads_keep_to_their_cpus(tiny: DatasetReader) -> None:
    cpu = min(os.sched_getaffinity(0))
    seen = set()

    class Watched(BatchBuilder):
        def fill(self, *args, **kwargs):
            seen.add(frozenset(os.sched_getaffinity(0)))
            return super().fill(*args, **kwargs)

    before = os.sched_getaffinity(0)
    batches = Watched(tiny.open_split("train"), VIEW, 0)
    list(BatchLoader(batches, TrainSampler(40, 0, BatchShare(8)), 2, bound=frozenset({cpu})))
    assert seen == {frozenset({cpu})}
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (30, 20), (1, 1), (700, 9)])
def test_pictures_are_resized_as_by_pillow(size: tuple[int, int]) -> None:
    """On average within 0.25 grey levels, and nowhere more than 3 off."""
    picture, rng = photo(*size), random.Random(1)
    for _ in range(8):
        crop = RandomResizedCrop(96, 0.08, 0.5)(*size, rng)
        expected = picture.crop(crop.source).resize((96, 96), Image.Resampling.BILINEAR)
        if crop.mirrored:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        off = np.abs(drawn(picture, crop, 96).astype(int) - np.asarray(expected).astype(int))
        assert off.mean() < 0.25
        assert off.max() <= 3


def test_resizing_is_torchs_own() -> None:
    """The operator is not public, the function in front of it is."""
    picture = photo(120, 90)
    source = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    expected = F.interpolate(source, (64, 64), mode="bilinear", antialias=True)
    found = drawn(picture, CropBox((0, 0, 120, 90), 64, 64), 64)
    assert np.array_equal(found, expected[0].permute(1, 2, 0).numpy())


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


@pytest.mark.parametrize("size", [(50, 37), (37, 51), (40, 40), (32, 41), (45, 32)])
def test_val_view_is_torchvisions(size: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    picture = photo(*size)
    expected = np.asarray(v2.CenterCrop(28)(v2.Resize(32)(picture)))
    found = drawn(picture, CenterCrop(28, 32)(*size, random.Random(0)), 28)
    off = np.abs(found.astype(int) - expected.astype(int))
    assert off.mean() < 0.25
    assert off.max() <= (0 if min(size) == 32 else 3)


def test_flip_is_a_mirror_with_its_chance() -> None:
    picture = photo(16, 16)
    plain, mirror = (
        drawn(picture, RandomResizedCrop(16, 1, flip)(16, 16, random.Random(1)), 16) for flip in (0, 1)
    )
    assert np.array_equal(plain[:, ::-1], mirror)
    rng = random.Random(2)
    chances = [RandomResizedCrop(16, 1, 0.3)(16, 16, rng).mirrored for _ in range(1000)]
    assert 250 < sum(chances) < 350


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(tiny: DatasetReader, tmp_path: Path, workers: int) -> None:
    split = spoil(tiny, tmp_path / "v1", "train", 7).open_split("train")
    with pytest.raises(UserError) as caught:
        list(BatchLoader(BatchBuilder(split, VIEW, 0), TrainSampler(40, 0, BatchShare(8)), workers))
    line = f"{tmp_path}/v1: image train_0007.JPEG cannot be read (cannot identify image file): "
    assert str(caught.value).startswith(line)
    assert "loader.on_corrupt=skip" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_left_out_and_counted(
    tiny: DatasetReader, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    split = spoil(tiny, tmp_path / "v1", "val", 3, 12).open_split("val")
    batches = BatchBuilder(split, CenterCrop(32, 32), 0, skip=True)
    loader = BatchLoader(batches, ValSampler(13, 4), workers)
    for _ in range(2):
        pixels, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        expected = [tiny.open_split("val").read(i)[1] for i in range(13)]
        expected[3] = expected[12] = PADDING
        assert labels.tolist() == [*expected, *[PADDING] * 3]  # the last batch is filled
        assert [i for i, image in enumerate(pixels) if not image.any()] == [3, 12, 13, 14, 15]
    assert batches.skipped == {"val_0003.JPEG", "val_0012.JPEG"}
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2  # once each
    assert all("cannot be read (cannot identify image file): left out" in line for line in told)


def test_cpus_are_those_of_the_allocation() -> None:
    mine = available_cpus(DistEnv(), {})
    assert available_cpus(DistEnv(), {"SLURM_CPUS_PER_TASK": "1"}) == 1
    assert (
        available_cpus(DistEnv(), {"SLURM_CPUS_PER_TASK": "1000000"}) == mine
    )  # Slurm may be told of more than there are
    assert available_cpus(DistEnv(size=2, local_size=2), {}) == max(1, mine // 2)
    assert available_cpus(DistEnv(size=2, local_size=2), {"SLURM_PROCID": "0"}) == mine


def test_tasks_that_are_not_bound_share_the_cpus_of_their_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7, 12, 13, 14, 15})
    env = {"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "8"}
    assert pinned_cpus(DistEnv(2, 4, 0, 2, 1), env) == {4, 5, 6, 7}
    assert pinned_cpus(DistEnv(3, 4, 1, 2, 1), env) == {12, 13, 14, 15}
    assert not pinned_cpus(DistEnv(), env)  # alone
    assert not pinned_cpus(DistEnv(0, 2, 0, 2), {})  # nobody says that others keep off
    assert not pinned_cpus(
        DistEnv(0, 2, 0, 2), {**env, "SLURM_CPUS_ON_NODE": "16"}
    )  # bound by srun, or not ours
    assert not pinned_cpus(DistEnv(0, 4, 0, 4), env)  # they do not go round


class Far:
    """Shards behind a network: reading them is worth doing ahead."""

    def __init__(self, store: DatasetReader) -> None:
        self._shards = store.shards
        self.threads: set[str] = set()
        self.damaged: set[int] = set()  # offsets of images whose copy here cannot be decoded

    def read(self, shard: int, offset: int, length: int) -> bytes:
        self.threads.add(threading.current_thread().name.rpartition("_")[0])
        return b"x" * length if offset in self.damaged else self._shards.read(shard, offset, length)

    def again(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        return self._shards.read(shard, offset, length)

    def far(self) -> bool:
        return True


@pytest.mark.parametrize("workers", [0, 2])
def test_images_from_afar_are_read_ahead_and_are_the_same(tiny: DatasetReader, workers: int) -> None:
    far = Far(tiny)
    split = DatasetReader(tiny.folder, far).open_split("train")
    far.damaged = {int(offset) for offset in split.index["offset"][:20:3]}
    sampler = TrainSampler(40, 0, BatchShare(10))
    there = list(BatchLoader(BatchBuilder(split, VIEW, 0), sampler, workers))
    here = list(BatchLoader(BatchBuilder(tiny.open_split("train"), VIEW, 0), sampler, workers))
    assert far.threads == {"read-ahead"}
    for (pixels, labels), (others, names) in zip(here, there, strict=True):
        assert torch.equal(pixels, others)
        assert torch.equal(labels, names)
    assert len(here) == 4
