"""`TrainSampler` and `ValSampler` for any number of ranks and device batches."""

from __future__ import annotations

from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.training.loading.image_order import BLOCK, ImageOrder, permutation
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare, TrainSampler, ValSampler

world_sizes = st.integers(1, 4)


class Training(NamedTuple):
    images: int
    seed: int
    size: int
    accumulate: int
    batch: int
    window: int | None


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    """Draw a training with a global batch divisible by ranks times accumulate, with a window or none."""
    size, accumulate = draw(world_sizes), draw(st.integers(1, 3))
    batch = size * accumulate * draw(st.integers(1, 5))
    images = batch * draw(st.integers(1, 40)) + draw(st.integers(0, batch - 1))
    window = draw(st.none() | st.integers(1, 2 * images))
    return Training(images, draw(st.integers(0, 2**31)), size, accumulate, batch, window)


def global_batches(training: Training, epoch: int = 0, start: int = 0) -> list[list[list[int]]]:
    """Return indices as [step][device batch, over all ranks]."""
    images, seed, size, accumulate, batch, window = training
    ranks = []
    for rank in range(size):
        share = BatchShare(batch, rank, size, accumulate)
        sampler = TrainSampler(images, seed, share, epoch, start, window)
        keys = list(sampler)
        assert all(e == epoch for part in keys for e, _ in part)
        ranks.append([[i for _, i in part] for part in keys])
    lengths = {len(rank) for rank in ranks}
    assert len(lengths) == 1
    parts = [[i for rank in ranks for i in rank[p]] for p in range(lengths.pop())]
    return [parts[s : s + accumulate] for s in range(0, len(parts), accumulate)]


@pytest.mark.slow
@given(trainings(), st.integers(0, 3))
def test_epoch_has_every_image_at_most_once_and_drops_less_than_a_batch(training, epoch) -> None:
    images, batch = training.images, training.batch
    steps = global_batches(training, epoch)
    seen = [i for step in steps for part in step for i in part]
    assert len(steps) == images // batch
    assert all(sum(map(len, step)) == batch for step in steps)
    assert len(set(seen)) == len(seen) == images - images % batch
    assert set(seen) <= set(range(images))


@pytest.mark.slow
@given(trainings())
def test_order_without_a_window_is_the_permutation(training) -> None:
    steps = global_batches(training._replace(window=None))
    seen = [i for step in steps for part in step for i in part]
    assert seen == permutation(training.images, training.seed, 0)[: len(seen)].tolist()


@pytest.mark.slow
@given(trainings(), st.integers(0, 3))
def test_world_size_does_not_change_global_batches(training, epoch) -> None:
    alone = global_batches(training._replace(size=1, accumulate=1), epoch)
    shared = global_batches(training, epoch)
    assert [list(chain(*step)) for step in shared] == [list(chain(*step)) for step in alone]


@pytest.mark.slow
@given(trainings(), st.integers(0, 3), st.data())
def test_start_skips_the_first_steps(training, epoch, data) -> None:
    start = data.draw(st.integers(0, training.images // training.batch))
    assert global_batches(training, epoch, start) == global_batches(training, epoch)[start:]


@pytest.mark.slow
@given(trainings(), st.data())
def test_windows_number_the_device_batches_of_equal_windows(training, data) -> None:
    images, seed, size, accumulate, batch, _ = training
    window = data.draw(st.integers(1, images))
    start = data.draw(st.integers(0, images // batch))
    taken = data.draw(st.integers(0, 2 * accumulate))
    sampler = TrainSampler(images, seed, BatchShare(batch, 0, size, accumulate), 0, start, window)
    numbers = list(zip(list(sampler)[taken:], sampler.windows(taken), strict=False))
    for device_batch, (_, number) in enumerate(numbers, start * accumulate + taken):
        step = device_batch // accumulate
        assert number == step // -(-window // batch)
    plain = TrainSampler(images, seed, BatchShare(batch, 0, size, accumulate))
    assert plain.windows() is None


@pytest.mark.slow
@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 5))
def test_a_rank_reads_whole_blocks_within_a_window(size, epoch) -> None:
    images, batch, window = 20_000, 16, 2048  # per rank and window two blocks or more
    reads = 0
    for rank in range(size):
        sampler = TrainSampler(images, 3, BatchShare(batch, rank, size), epoch, window=window)
        for _, pairs in groupby(zip(sampler, sampler.windows(), strict=False), lambda pair: pair[1]):
            used = np.sort([i for keys, _ in pairs for _, i in keys])
            reads += 1 + np.count_nonzero(np.diff(used) > 1)
    blocks = images / BLOCK
    # A stream or a window may begin within a block, which is then read in two parts.
    assert reads <= blocks + 16 + 16 * images / window + 2


def test_window_mixes_images_of_distant_blocks_in_every_batch() -> None:
    order = ImageOrder(100_000, 0, 64, window=8192)
    batches = list(order.batches(1))
    classes = [len(np.unique(batch // 1000)) for batch in batches]
    assert min(classes) >= 35  # of 100; drawn at random they are 47 on average
    assert np.mean(classes) > 46


def test_epochs_cut_other_blocks() -> None:
    """So that the same images are not in one window in every epoch."""
    order = ImageOrder(6400, 0, 1, window=BLOCK)
    firsts = [np.sort(np.concatenate(list(order.batches(epoch))[:BLOCK])) for epoch in range(10)]
    ends = [(block[0], block[-1]) for block in firsts if block[-1] - block[0] == BLOCK - 1]
    assert len({begin % BLOCK for begin, _ in ends}) > 5


def test_permutation_depends_on_seed_and_epoch() -> None:
    orders = [permutation(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == permutation(50, 0, 0).tolist()


def test_start_applies_to_its_own_epoch_only() -> None:
    sampler = TrainSampler(10, 0, BatchShare(2), epoch=1, start=3)
    assert len(sampler) == 5  # of the whole epoch, as Lightning expects
    sampler.set_epoch(1)
    assert len(list(sampler)) == 2
    sampler.set_epoch(2)
    assert [e for ((e, _), _) in sampler] == [2] * 5


@pytest.mark.slow
@given(st.integers(1, 60), st.integers(1, 9), world_sizes)
def test_val_sampler_yields_every_image_once(images, batch, size) -> None:
    ranks = [list(ValSampler(images, batch, rank, size)) for rank in range(size)]
    assert len({len(rank) for rank in ranks}) == 1  # no rank waits for another
    (length,) = {len(part) for rank in ranks for part in rank}  # all batches have one shape
    assert length <= batch
    assert len(ranks[0]) == len(ValSampler(images, batch, 0, size))
    seen = [i for rank in ranks for part in rank for _, i in part]
    assert sorted(i for i in seen if i != PADDING) == list(range(images))
    assert len(seen) - images < size * (1 + length)


def test_order_is_stable_across_numpy_versions() -> None:
    # A run resumed with another NumPy version must see the remaining images.
    assert np.array_equal(permutation(8, 0, 0), ORDER)
    batches = list(ImageOrder(300, 0, 4, window=8).batches(0))
    assert [batch.tolist() for batch in batches[:4]] == WINDOW_ORDER


ORDER = [2, 4, 3, 6, 5, 0, 1, 7]
WINDOW_ORDER = [[131, 128, 132, 130], [133, 134, 129, 127], [140, 138, 137, 136], [135, 141, 139, 142]]
