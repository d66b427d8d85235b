"""`TrainSampler` and `ValSampler` for any number of ranks and device batches."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.training.loading.sampler import PADDING, BatchShare, TrainSampler, ValSampler, permutation

world_sizes = st.integers(1, 4)


@st.composite
def trainings(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """Draw images, seed, ranks, accumulate, and a global batch divisible by ranks times accumulate."""
    size, accumulate = draw(world_sizes), draw(st.integers(1, 3))
    batch = size * accumulate * draw(st.integers(1, 5))
    images = batch * draw(st.integers(1, 4)) + draw(st.integers(0, batch - 1))
    return images, draw(st.integers(0, 2**31)), size, accumulate, batch


def global_batches(
    images: int, seed: int, size: int, accumulate: int, batch: int, epoch: int = 0, start: int = 0
) -> list[list[list[int]]]:
    """Return indices as [step][device batch, over all ranks]."""
    ranks = []
    for rank in range(size):
        sampler = TrainSampler(images, seed, BatchShare(batch, rank, size, accumulate), epoch, start)
        keys = list(sampler)
        assert all(e == epoch for part in keys for e, _ in part)
        ranks.append([[i for _, i in part] for part in keys])
    lengths = {len(rank) for rank in ranks}
    assert len(lengths) == 1
    parts = [[i for rank in ranks for i in rank[p]] for p in range(lengths.pop())]
    return [parts[s : s + accumulate] for s in range(0, len(parts), accumulate)]


@given(trainings())
def test_epoch_is_a_permutation_cut_into_global_batches(training) -> None:
    images, seed, _, _, batch = training
    steps = global_batches(*training)
    seen = [i for step in steps for part in step for i in part]
    assert len(steps) == images // batch
    assert all(sum(map(len, step)) == batch for step in steps)
    assert len(set(seen)) == len(seen) == images - images % batch
    assert seen == permutation(images, seed, 0)[: len(seen)].tolist()


@given(trainings(), st.integers(0, 3))
def test_world_size_does_not_change_global_batches(training, epoch) -> None:
    images, seed, _, _, batch = training
    alone = global_batches(images, seed, 1, 1, batch, epoch)
    shared = global_batches(*training, epoch)
    assert [list(chain(*step)) for step in shared] == [list(chain(*step)) for step in alone]


@given(trainings(), st.integers(0, 3), st.data())
def test_start_skips_the_first_steps(training, epoch, data) -> None:
    images, _, _, _, batch = training
    start = data.draw(st.integers(0, images // batch))
    assert global_batches(*training, epoch, start) == global_batches(*training, epoch)[start:]


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


def test_permutation_is_stable_across_numpy_versions() -> None:
    # A run resumed with another NumPy version must see the remaining images.
    assert np.array_equal(permutation(8, 0, 0), ORDER)


ORDER = [2, 4, 3, 6, 5, 0, 1, 7]
