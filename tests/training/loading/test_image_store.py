"""A datastore as arrays."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_training import write_store

from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore.versions import open_version
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.loading.image_store import ImageStore

TRAIN, VAL = 40, 13


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageStore]:
    folder = tmp_path_factory.mktemp("datastores")
    write_store(folder / "digits/v1", {"train": TRAIN, "val": VAL})
    with ImageStore(open_version(Datastore("digits", str(folder)))) as store:
        yield store


def test_shows_what_it_has(store: ImageStore) -> None:
    assert repr(store) == "<digits@v1: 10 classes, train: 40, val: 13 images>"
    assert store.classes == tuple("0123456789")
    assert store.ids[3] == "n00000003"
    assert store.splits == {"train": TRAIN, "val": VAL}
    assert store.settings[1] == "datastore.name=digits@v1"
    assert Path(store.settings[0].removeprefix("datastore.url=")).name.startswith("datastores")
    with pytest.raises(UserError, match="digits@v1 has no split valid; did you mean: val"):
        store["valid"]


def test_an_image_is_an_array_and_a_label(store: ImageStore) -> None:
    val = store["val"]
    assert len(val) == VAL == len(val.labels) == val.counts().sum()
    for i in (0, 5, -1):
        pixels, label = val[i]
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, np.array(Image.open(io.BytesIO(val.file(i))).convert("RGB")))
        assert label == val.labels[i]
    first, _ = val[0]
    assert np.array_equal(first, val[0][0])  # not overwritten by later reads
    assert [label for _, label in val[2:5]] == val.labels[2:5].tolist()
    assert [label for _, label in val] == val.labels.tolist()
    assert val.file_name(2) == "val_0002.JPEG"
    with pytest.raises(IndexError):
        val[VAL]


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_have_every_image_once(store: ImageStore, seed: int | None) -> None:
    train = store["train"]
    batches = list(train.batches(32, 16, shuffle_seed=seed))
    assert [len(labels) for _, labels in batches] == [16, 16, 8]
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert pixels.shape == (TRAIN, 32, 32, 3)
    order = np.arange(TRAIN) if seed is None else np.random.default_rng(seed).permutation(TRAIN)
    assert labels.tolist() == train.labels[order].tolist()
    assert np.array_equal(pixels[7], train[order[7]][0])


def test_batches_are_cropped(store: ImageStore) -> None:
    pixels, _ = next(iter(store["val"].batches(20, 4, resize=32)))
    assert np.array_equal(pixels[0], store["val"][0][0][6:26, 6:26])
    for wrong in ({"size": 0}, {"size": 20, "batch": 0}, {"size": 20, "resize": -1}):
        with pytest.raises(UserError, match=r"^batches: .* is less than 1$"):
            next(iter(store["val"].batches(**wrong)))
    with pytest.raises(UserError, match=r"^batches: resize=32 is less than size=64: set at least 64$"):
        next(iter(store["val"].batches(64, resize=32)))


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_store(tmp_path / "digits/v1", {"train": 3, "val": 2})
    with ImageStore(open_version(Datastore("digits", str(tmp_path)))) as store:
        offset = int(store["val"]._reader.index["offset"][1])
        with (tmp_path / "digits/v1/val.tar").open("r+b") as tar:
            tar.seek(offset)
            tar.write(b"broken" * 10)
        store["val"][0]
        with pytest.raises(UserError, match=r"val_0001\.JPEG of digits@v1 cannot be decoded"):
            store["val"][1]
