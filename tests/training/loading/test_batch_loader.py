"""Batch loader, crops and the CPUs of a task."""

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

from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus, pinned_cpus
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.loading.batch_loader import Batch, BatchBuilder, BatchLoader, start_threads
from hpc_imagenet.training.loading.crop import (
    CenterCrop,
    CropBox,
    CropPolicy,
    RandomResizedCrop,
    apply_crop,
    random_box,
)
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare, Key, TrainSampler, ValSampler

CROP = RandomResizedCrop(16, 0.3, 0.5)


def make_batch(split: SplitReader, crop: CropPolicy, seed: int, keys: list[Key]) -> Batch:
    builder = BatchBuilder(split, crop, seed)
    batch = builder.allocate(keys)
    assert not builder.fill(batch, keys, range(len(keys)))
    return batch


def cropped(image: Image.Image, crop: CropBox, size: int) -> np.ndarray:
    """Apply `crop` to an image; the result has shape [size, size, 3]."""
    source = np.array(image.crop(crop.source))
    out = torch.empty(1, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    apply_crop(torch.from_numpy(source).permute(2, 0, 1)[None], crop, out)
    return out[0].permute(1, 2, 0).numpy()


def photo(width: int, height: int) -> Image.Image:
    """Return an image with smooth areas, hard edges and noise."""
    bits = np.random.default_rng(width)
    coarse = bits.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), float)
    smooth[height // 3 :, width // 2 :] = 255 - smooth[height // 3 :, width // 2 :]
    return Image.fromarray((smooth + bits.normal(0, 8, (height, width, 1))).clip(0, 255).astype(np.uint8))


def damage(store: DatasetReader, folder: Path, split: str, *images: int) -> DatasetReader:
    """Copy a dataset and overwrite some of its images with zeros."""
    shutil.copytree(store.folder, folder)
    for image in images:
        offset, length, *_ = store.open_split(split).index[image].item()
        with (folder / f"{split}.tar").open("r+b") as file:
            file.seek(offset)
            file.write(b"\0" * length)
    return DatasetReader(folder)


def test_batch_has_pixels_and_labels_of_its_keys(tiny: DatasetReader) -> None:
    split = tiny.open_split("val")
    pixels, labels = make_batch(split, CenterCrop(32, 32), 0, [(0, 4), (0, PADDING), (0, 2)])
    assert pixels.shape == (3, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [split.read(4)[1], -1, split.read(2)[1]]
    expected = np.asarray(Image.open(io.BytesIO(split.read(4)[0])).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(pixels[0].numpy(), expected)
    assert not pixels[1].any()


def test_augmentation_depends_only_on_seed_epoch_and_image(tiny: DatasetReader) -> None:
    split = tiny.open_split("train")
    once = make_batch(split, CROP, 7, [(1, 5), (1, 6)])[0]
    again = make_batch(split, CROP, 7, [(1, 6), (1, 5)])[0]
    assert torch.equal(once[0], again[1])
    assert torch.equal(once[1], again[0])
    for other in (make_batch(split, CROP, 8, [(1, 5)])[0], make_batch(split, CROP, 7, [(2, 5)])[0]):
        assert not torch.equal(once[0], other[0])


@pytest.mark.slow
def test_number_of_threads_does_not_change_batches(tiny: DatasetReader) -> None:
    split = tiny.open_split("train")

    def batches(workers: int) -> list[Batch]:
        loader = BatchLoader(BatchBuilder(split, CROP, 0), TrainSampler(40, 0, BatchShare(20)), workers)
        assert len(loader) == 2
        return [batch for _ in range(2) for batch in loader]  # two epochs

    expected = batches(0)
    for workers in (1, 2, 5):
        found = batches(workers)
        assert len(expected) == len(found) == 4
        for (pixels, labels), (found_pixels, found_labels) in zip(expected, found, strict=True):
            assert torch.equal(pixels, found_pixels)
            assert torch.equal(labels, found_labels)
            assert found_pixels.is_contiguous(memory_format=torch.channels_last)


def test_yielded_batches_are_not_overwritten(tiny: DatasetReader) -> None:
    loader = BatchLoader(
        BatchBuilder(tiny.open_split("train"), CROP, 0), TrainSampler(40, 0, BatchShare(4)), 2
    )
    kept, copies = [], []
    for pixels, _ in loader:
        kept.append(pixels)
        copies.append(pixels.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_threads_can_fill_batches_in_inference_mode(tiny: DatasetReader) -> None:
    batches = BatchBuilder(tiny.open_split("val"), CenterCrop(16, 16), 0)
    plain = list(BatchLoader(batches, ValSampler(13, 4), 2))
    with torch.inference_mode():
        inference = list(BatchLoader(batches, ValSampler(13, 4), 2))
    assert [torch.equal(a, b) for (a, _), (b, _) in zip(plain, inference, strict=True)] == [True] * 4


@pytest.mark.parametrize(("workers", "started"), [(2, 3), (6, 6)])  # one task per batch
def test_prefetches_two_batches_or_one_task_per_thread(
    tiny: DatasetReader, workers: int, started: int
) -> None:
    sampled: list[int] = []

    class RecordingSampler(TrainSampler):
        def __iter__(self):
            for keys in super().__iter__():
                sampled.append(len(keys))
                yield keys

    iterator = iter(
        BatchLoader(
            BatchBuilder(tiny.open_split("train"), CROP, 0), RecordingSampler(40, 0, BatchShare(4)), workers
        )
    )
    next(iterator)
    assert len(sampled) == started
    next(iterator)
    assert len(sampled) == started + 1


@pytest.mark.slow
def test_epochs_do_not_leak_threads_files_or_memory(tiny: DatasetReader) -> None:
    """Also if an epoch is abandoned in the middle."""
    loader = BatchLoader(
        BatchBuilder(tiny.open_split("train"), CROP, 0), TrainSampler(40, 0, BatchShare(8)), 2
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


def test_loader_keeps_the_number_of_torch_threads(tiny: DatasetReader) -> None:
    torch.set_num_threads(2)
    list(BatchLoader(BatchBuilder(tiny.open_split("train"), CROP, 0), TrainSampler(40, 0, BatchShare(8)), 2))
    counts = [torch.get_num_threads()]
    other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert counts == [2, 2]


def test_threads_are_pinned_to_cpus(tiny: DatasetReader) -> None:
    cpu = min(os.sched_getaffinity(0))
    affinities = set()

    class RecordingBuilder(BatchBuilder):
        def fill(self, *args, **kwargs):
            affinities.add(frozenset(os.sched_getaffinity(0)))
            return super().fill(*args, **kwargs)

    before = os.sched_getaffinity(0)
    batches = RecordingBuilder(tiny.open_split("train"), CROP, 0)
    list(BatchLoader(batches, TrainSampler(40, 0, BatchShare(8)), 2, cpus=frozenset({cpu})))
    assert affinities == {frozenset({cpu})}
    assert os.sched_getaffinity(0) == before


def test_a_thread_that_cannot_start_leaves_none_waiting(monkeypatch) -> None:
    start, started = threading.Thread.start, []

    def fail_at_the_third(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_at_the_third)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        start_threads(4, frozenset())
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


def test_a_thread_that_cannot_be_pinned_is_an_error() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        start_threads(2, frozenset({max(os.sched_getaffinity(0)) + 4096}))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (30, 20), (1, 1), (700, 9)])
def test_resize_matches_pillow(size: tuple[int, int]) -> None:
    """The mean difference is below 0.25 grey levels, the largest at most 3."""
    image, rng = photo(*size), random.Random(1)
    for _ in range(8):
        crop = RandomResizedCrop(96, 0.08, 0.5)(*size, rng)
        expected = image.crop(crop.source).resize((96, 96), Image.Resampling.BILINEAR)
        if crop.mirrored:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        off = np.abs(cropped(image, crop, 96).astype(int) - np.asarray(expected).astype(int))
        assert off.mean() < 0.25
        assert off.max() <= 3


def test_resize_operator_matches_interpolate() -> None:
    """The operator is not public, unlike `F.interpolate`."""
    image = photo(120, 90)
    source = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    expected = F.interpolate(source, (64, 64), mode="bilinear", antialias=True)
    found = cropped(image, CropBox((0, 0, 120, 90), 64, 64), 64)
    assert np.array_equal(found, expected[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (640, 10), (1, 1)])
def test_random_boxes_are_inside_the_image_and_have_the_area(size: tuple[int, int]) -> None:
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
def test_center_crop_matches_torchvision(size: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    image = photo(*size)
    expected = np.asarray(v2.CenterCrop(28)(v2.Resize(32)(image)))
    found = cropped(image, CenterCrop(28, 32)(*size, random.Random(0)), 28)
    off = np.abs(found.astype(int) - expected.astype(int))
    assert off.mean() < 0.25
    assert off.max() <= (0 if min(size) == 32 else 3)


@pytest.mark.parametrize("size", [(50, 37), (37, 51), (40, 40), (32, 20), (20, 20)])
def test_center_crop_of_smaller_images_has_the_black_border_of_torchvision(size: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    image = photo(*size)
    expected = np.asarray(v2.CenterCrop(33)(v2.Resize(20)(image)))
    found = cropped(image, CenterCrop(33, 20)(*size, random.Random(0)), 33)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 3


def test_flip_mirrors_with_its_probability() -> None:
    image = photo(16, 16)
    plain, mirror = (
        cropped(image, RandomResizedCrop(16, 1, flip)(16, 16, random.Random(1)), 16) for flip in (0, 1)
    )
    assert np.array_equal(plain[:, ::-1], mirror)
    rng = random.Random(2)
    mirrored = [RandomResizedCrop(16, 1, 0.3)(16, 16, rng).mirrored for _ in range(1000)]
    assert 250 < sum(mirrored) < 350


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_error_has_its_name(tiny: DatasetReader, tmp_path: Path, workers: int) -> None:
    split = damage(tiny, tmp_path / "v1", "train", 7).open_split("train")
    with pytest.raises(UserError) as caught:
        list(BatchLoader(BatchBuilder(split, CROP, 0), TrainSampler(40, 0, BatchShare(8)), workers))
    line = f"{tmp_path}/v1: image train_0007.JPEG cannot be read (cannot identify image file): "
    assert str(caught.value).startswith(line)
    assert "loader.on_corrupt=skip" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_skipped_and_counted(
    tiny: DatasetReader, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    split = damage(tiny, tmp_path / "v1", "val", 3, 12).open_split("val")
    batches = BatchBuilder(split, CenterCrop(32, 32), 0, skip=True)
    loader = BatchLoader(batches, ValSampler(13, 4), workers)
    for _ in range(2):
        pixels, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        expected = [tiny.open_split("val").read(i)[1] for i in range(13)]
        expected[3] = expected[12] = PADDING
        assert labels.tolist() == [*expected, *[PADDING] * 3]  # the last batch is padded
        assert [i for i, image in enumerate(pixels) if not image.any()] == [3, 12, 13, 14, 15]
    assert batches.skipped == {"val_0003.JPEG", "val_0012.JPEG"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # one per image
    assert all("cannot be read (cannot identify image file): skipped" in line for line in lines)


def test_available_cpus_are_those_of_the_allocation() -> None:
    all_cpus = available_cpus(DistEnv(), {})
    assert available_cpus(DistEnv(), {"SLURM_CPUS_PER_TASK": "1"}) == 1
    # Slurm may be configured with more CPUs than exist.
    assert available_cpus(DistEnv(), {"SLURM_CPUS_PER_TASK": "1000000"}) == all_cpus
    assert available_cpus(DistEnv(size=2, local_size=2), {}) == max(1, all_cpus // 2)
    assert available_cpus(DistEnv(size=2, local_size=2), {"SLURM_PROCID": "0"}) == all_cpus


def test_unbound_tasks_split_the_cpus_of_their_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7, 12, 13, 14, 15})
    env = {"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "8"}
    assert pinned_cpus(DistEnv(2, 4, 0, 2, 1), env) == {4, 5, 6, 7}
    assert pinned_cpus(DistEnv(3, 4, 1, 2, 1), env) == {12, 13, 14, 15}
    assert not pinned_cpus(DistEnv(), env)  # one task
    assert not pinned_cpus(DistEnv(0, 2, 0, 2), {})  # not in a Slurm allocation
    # The affinity has fewer CPUs than the job: srun has bound the task.
    assert not pinned_cpus(DistEnv(0, 2, 0, 2), {**env, "SLURM_CPUS_ON_NODE": "16"})
    assert not pinned_cpus(DistEnv(0, 4, 0, 4), env)  # too few CPUs for all tasks


class RemoteShards:
    """Shards that claim to be remote, so that the loader prefetches."""

    def __init__(self, store: DatasetReader) -> None:
        self._shards = store.shards
        self.threads: set[str] = set()
        self.damaged: set[int] = set()  # offsets of images whose local copy cannot be decoded

    def read(self, shard: int, offset: int, length: int) -> bytes:
        self.threads.add(threading.current_thread().name.rpartition("_")[0])
        return b"x" * length if offset in self.damaged else self._shards.read(shard, offset, length)

    def reread(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        return self._shards.read(shard, offset, length)

    def read_ahead(self, shard: int, offset: int, length: int) -> None:
        pass

    def is_remote(self) -> bool:
        return True


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_images_are_prefetched_and_identical(tiny: DatasetReader, workers: int) -> None:
    remote = RemoteShards(tiny)
    split = DatasetReader(tiny.folder, remote).open_split("train")
    remote.damaged = {int(offset) for offset in split.index["offset"][:20:3]}
    sampler = TrainSampler(40, 0, BatchShare(10))
    found = list(BatchLoader(BatchBuilder(split, CROP, 0), sampler, workers))
    expected = list(BatchLoader(BatchBuilder(tiny.open_split("train"), CROP, 0), sampler, workers))
    assert remote.threads == {"read-ahead"}
    for (pixels, labels), (found_pixels, found_labels) in zip(expected, found, strict=True):
        assert torch.equal(pixels, found_pixels)
        assert torch.equal(labels, found_labels)
    assert len(expected) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_window_is_read_in_large_requests_and_gives_the_same_images(
    tiny: DatasetReader, workers: int
) -> None:
    sampler = TrainSampler(40, 0, BatchShare(4), start=1, window=16)
    split = tiny.open_split("train")
    found = list(BatchLoader(BatchBuilder(split, CROP, 0), sampler, workers))
    builder = BatchBuilder(split, CROP, 0)
    for (pixels, labels), keys in zip(found, sampler, strict=True):
        expected = builder.allocate(keys)
        builder.fill(expected, keys, range(len(keys)))
        assert torch.equal(pixels, expected[0])
        assert torch.equal(labels, expected[1])
    assert len(found) == 9
    reader = RemoteShards(tiny)
    reader.is_remote = lambda: False  # type: ignore[method-assign]
    list(
        BatchLoader(BatchBuilder(DatasetReader(tiny.folder, reader).open_split("train"), CROP, 0), sampler, 0)
    )
    assert "window-reader" in reader.threads
