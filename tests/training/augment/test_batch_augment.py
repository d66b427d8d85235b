from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from hpc_imagenet.training.augment import trivial_augment
from hpc_imagenet.training.augment.batch_augment import CANDIDATES, BatchAugment, erase
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare
from hpc_imagenet.training.module import Classifier


def smooth_images(count: int, side: int = 24) -> torch.Tensor:
    """Return smooth images of different contrast, which change little if shifted by part of a pixel."""
    rough = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(rough, (side, side), mode="bicubic")
    return (30 + 180 * smooth).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", trivial_augment.OPERATIONS)
def test_operation_matches_torchvision(name: str) -> None:
    strengths = np.array([0, 3, -19, 30, -30, 21]) / 30  # none at a rounding boundary
    number = np.full(len(strengths), trivial_augment.OPERATIONS.index(name))
    images = smooth_images(len(strengths))
    ours = trivial_augment.apply_operation(images, number, strengths)
    theirs = v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
    scale = magnitudes(trivial_augment.BINS, 24, 24)
    for image, result, strength in zip(images, ours, strengths, strict=True):
        bin_index = round(abs(strength) * (trivial_augment.BINS - 1))
        magnitude = 0.0 if scale is None else float(scale[bin_index])
        amount = -magnitude if signed and strength < 0 else magnitude
        expected = theirs._apply_image_or_video_transform(
            image, name, amount, InterpolationMode.BILINEAR, theirs._fill
        )
        difference = (expected.int() - result.int()).abs()
        assert difference.max() <= 1, strength
    changes = (ours != images).flatten(1).any(1)
    assert changes.any() == (name != "Identity")


def test_all_operations_and_signs_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).random((500, 3))
    images = smooth_images(1).repeat(500, 1, 1, 1)
    different = {bytes(image.numpy().tobytes()) for image in trivial_augment.trivial_augment(images, rows)}
    assert len(different) > 200
    drawn = []
    monkeypatch.setattr(trivial_augment, "apply_operation", lambda images, *rest: drawn.append(rest))
    trivial_augment.trivial_augment(images, rows)
    ((operations, strengths),) = drawn
    assert set(operations) == set(range(len(trivial_augment.OPERATIONS)))
    assert (strengths.min(), strengths.max()) == (-1, 1)


def test_erase_zeroes_a_rectangle_of_some_images() -> None:
    rows = np.random.default_rng(0).random((400, 1 + 4 * CANDIDATES))
    erased = erase(torch.ones(400, 3, 32, 32), rows, 0.25) == 0
    assert torch.equal(erased[:, 0], erased[:, 2])
    changed = erased[:, 0].flatten(1).any(1)
    assert 0.18 < changed.float().mean() < 0.32
    for mask in erased[changed, 0]:
        down, across = mask.any(1), mask.any(0)
        assert torch.equal(mask, down[:, None] & across[None])  # a full rectangle
        assert 0.01 < mask.float().mean() < 0.4
    assert not (erase(torch.ones(400, 3, 32, 32), rows, 0.0) == 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("world", [(2, 1), (1, 2), (2, 2)])
def test_augmentation_is_independent_of_the_world_size(config, world: tuple[int, int]) -> None:
    size, accumulate = world
    recipe = config(augment="trivial", erase=0.5).recipe
    images, labels = smooth_images(8), torch.arange(8)

    def augmented(share: BatchShare, part: int, batch: torch.Tensor) -> torch.Tensor:
        batch_augment = BatchAugment(recipe, 10, 3, share)
        pixels = batch_augment.augment_pixels(batch, 7, part)
        pixels = pixels.float().contiguous(memory_format=torch.channels_last) - 128
        images = batch_augment.augment_normalized(pixels, labels[: len(batch)], 7, part)[0]
        assert images.is_contiguous(memory_format=torch.channels_last)
        return images

    expected = augmented(BatchShare(8), 0, images)
    assert not torch.equal(expected, images.float() - 128)
    split = images.reshape(accumulate, size, -1, *images.shape[1:])
    parts = [
        augmented(BatchShare(8, rank, size, accumulate), part, split[part, rank])
        for part in range(accumulate)
        for rank in range(size)
    ]
    assert torch.equal(torch.cat(parts), expected)
    other = BatchAugment(recipe, 10, 3, BatchShare(8))
    assert not torch.equal(other.augment_pixels(images, 8, 0), other.augment_pixels(images, 7, 0))


@pytest.mark.slow
def test_padding_images_do_not_change_the_loss(config) -> None:
    """Their labels are all 0, and the loss is the mean of the other images, mixed or not."""
    recipe = config(mixup=1.0).recipe
    module = Classifier(torch.nn.Identity(), 10, recipe, 3, 5, BatchShare(4))
    torch.manual_seed(0)
    images, labels, logits = torch.randn(4, 3, 8, 8), torch.tensor([1, PADDING, 3, 4]), torch.randn(4, 10)
    mixed, shares = module.batch_augment.augment_normalized(images, labels, 0, 0)
    assert not torch.equal(mixed, images)
    weights = shares.sum(1)
    assert sorted(weights.tolist())[2:] == pytest.approx([1, 1])
    assert weights.sum() == pytest.approx(3)
    expected = sum(
        weight * torch.nn.functional.cross_entropy(one[None], (share / weight)[None], label_smoothing=0.1)
        for one, share, weight in zip(logits, shares, weights, strict=True)
    )
    assert module._cross_entropy(logits, shares) == pytest.approx(float(expected / 3))
    plain = torch.nn.functional.cross_entropy(logits[[0, 2, 3]], labels[[0, 2, 3]], label_smoothing=0.1)
    assert module._cross_entropy(logits, labels) == pytest.approx(float(plain))
    assert module._cross_entropy(logits, torch.full((4,), PADDING)) == 0  # and not NaN


def test_mixed_labels_sum_to_one(config) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    mixed = 0
    for recipe in (config(mixup=0.2).recipe, config(cutmix=1.0).recipe, config(mixup=0.2, cutmix=1.0).recipe):
        batch_augment = BatchAugment(recipe, 10, 3, BatchShare(8))
        output, shares = batch_augment.augment_normalized(images, labels, 0, 0)
        assert shares.shape == (8, 10)
        torch.testing.assert_close(shares.sum(1), torch.ones(8))
        mixed += not torch.equal(output, images)
    assert mixed == 3
    plain = BatchAugment(config().recipe, 10, 3, BatchShare(8))
    assert plain.augment_normalized(images, labels, 0, 0)[1] is labels
    assert plain.augment_pixels(images, 0, 0) is images
