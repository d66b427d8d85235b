from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from hpc_imagenet.training.augment import trivial_augment
from hpc_imagenet.training.augment.batch_augment import TRIES, BatchAugment, erase
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare
from hpc_imagenet.training.module import Classifier


def pictures(count: int, side: int = 24) -> torch.Tensor:
    """Smooth, so that a fraction of a pixel matters little, and of different contrasts."""
    rough = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(rough, (side, side), mode="bicubic")
    return (30 + 180 * smooth).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", trivial_augment.OPERATIONS)
def test_each_operation_is_torchvisions(name: str) -> None:
    strengths = np.array([0, 3, -19, 30, -30, 21]) / 30  # none where rounding decides
    number = np.full(len(strengths), trivial_augment.OPERATIONS.index(name))
    images = pictures(len(strengths))
    ours = trivial_augment.apply_operation(images, number, strengths)
    theirs = v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
    scale = magnitudes(trivial_augment.BINS, 24, 24)
    for image, result, strength in zip(images, ours, strengths, strict=True):
        at = 0.0 if scale is None else float(scale[round(abs(strength) * (trivial_augment.BINS - 1))])
        amount = -at if signed and strength < 0 else at
        right = theirs._apply_image_or_video_transform(
            image, name, amount, InterpolationMode.BILINEAR, theirs._fill
        )
        difference = (right.int() - result.int()).abs()
        assert difference.max() <= 1, strength
    changes = (ours != images).flatten(1).any(1)
    assert changes.any() == (name != "Identity")


def test_every_operation_and_sign_is_drawn() -> None:
    rows = np.random.default_rng(0).random((500, 3))
    images = pictures(1).repeat(500, 1, 1, 1)
    different = {bytes(image.numpy().tobytes()) for image in trivial_augment.trivial_augment(images, rows)}
    assert len(different) > 200
    assert set((rows[:, 0] * len(trivial_augment.OPERATIONS)).astype(int)) == set(
        range(len(trivial_augment.OPERATIONS))
    )


def test_erasing_takes_a_rectangle_of_some_images() -> None:
    rows = np.random.default_rng(0).random((400, 1 + 4 * TRIES))
    gone = erase(torch.ones(400, 3, 32, 32), rows, 0.25) == 0
    assert torch.equal(gone[:, 0], gone[:, 2])
    hit = gone[:, 0].flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32
    for mask in gone[hit, 0]:
        down, across = mask.any(1), mask.any(0)
        assert torch.equal(mask, down[:, None] & across[None])  # a rectangle, whole
        assert 0.01 < mask.float().mean() < 0.4
    assert not (erase(torch.ones(400, 3, 32, 32), rows, 0.0) == 0).any()


@pytest.mark.parametrize("world", [(2, 1), (1, 2), (2, 2)])
def test_another_world_does_the_same_to_the_same_images(config, world: tuple[int, int]) -> None:
    size, accumulate = world
    recipe = config(augment="trivial", erase=0.5).recipe
    images, labels = pictures(8), torch.arange(8)

    def treated(share: BatchShare, part: int, some: torch.Tensor) -> torch.Tensor:
        mixing = BatchAugment(recipe, 10, 3, share)
        pixels = mixing.pixels(some, 7, part)
        pixels = pixels.float().contiguous(memory_format=torch.channels_last) - 128
        images = mixing.normalised(pixels, labels[: len(some)], 7, part)[0]
        assert images.is_contiguous(memory_format=torch.channels_last)
        return images

    whole = treated(BatchShare(8), 0, images)
    assert not torch.equal(whole, images.float() - 128)
    cut = images.reshape(accumulate, size, -1, *images.shape[1:])
    pieces = [
        treated(BatchShare(8, rank, size, accumulate), part, cut[part, rank])
        for part in range(accumulate)
        for rank in range(size)
    ]
    assert torch.equal(torch.cat(pieces), whole)
    again = BatchAugment(recipe, 10, 3, BatchShare(8))
    assert not torch.equal(again.pixels(images, 8, 0), again.pixels(images, 7, 0))


def test_what_was_left_out_counts_nowhere(config) -> None:
    """Its labels have no share, and the loss is that of the others alone, mixed or not."""
    recipe = config(mixup=1.0).recipe
    module = Classifier(torch.nn.Identity(), 10, recipe, 3, 5, BatchShare(4))
    torch.manual_seed(0)
    images, labels, logits = torch.randn(4, 3, 8, 8), torch.tensor([1, PADDING, 3, 4]), torch.randn(4, 10)
    seen, shares = module.mixing.normalised(images, labels, 0, 0)
    assert not torch.equal(seen, images)
    weights = shares.sum(1)
    assert sorted(weights.tolist())[2:] == pytest.approx([1, 1])
    assert weights.sum() == pytest.approx(3)
    right = sum(
        weight * torch.nn.functional.cross_entropy(one[None], (share / weight)[None], label_smoothing=0.1)
        for one, share, weight in zip(logits, shares, weights, strict=True)
    )
    assert module._cross_entropy(logits, shares) == pytest.approx(float(right / 3))
    plain = torch.nn.functional.cross_entropy(logits[[0, 2, 3]], labels[[0, 2, 3]], label_smoothing=0.1)
    assert module._cross_entropy(logits, labels) == pytest.approx(float(plain))
    assert module._cross_entropy(logits, torch.full((4,), PADDING)) == 0  # and no number is missing


def test_mixed_labels_are_shares_of_classes(config) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    mixed = 0
    for recipe in (config(mixup=0.2).recipe, config(cutmix=1.0).recipe, config(mixup=0.2, cutmix=1.0).recipe):
        seen, shares = BatchAugment(recipe, 10, 3, BatchShare(8)).normalised(images, labels, 0, 0)
        assert shares.shape == (8, 10)
        torch.testing.assert_close(shares.sum(1), torch.ones(8))
        mixed += not torch.equal(seen, images)
    assert mixed == 3
    plain = BatchAugment(config().recipe, 10, 3, BatchShare(8))
    assert plain.normalised(images, labels, 0, 0)[1] is labels
    assert plain.pixels(images, 0, 0) is images
