"""Predictions for files and arrays, as validation computes them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trained_samples import NAMES, trained_of

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.loading.batch_loader import BatchBuilder
from hpc_imagenet.training.loading.crop import CenterCrop
from hpc_imagenet.training.predictor import (
    BATCH,
    Prediction,
    find_image_files,
    predict_images,
    prediction_row,
)
from hpc_imagenet.training.trained import TrainedModel


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "mirrored"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("trained")
    return trained_of(folder, "squeezenet1_1", 24, val_resize=28, val_flip=request.param)


def labels(prediction: Prediction) -> list[int]:
    return [guess.label for guess in prediction.guesses]


@pytest.mark.slow
def test_probabilities_are_those_of_validation(
    trained: TrainedModel, tiny: DatasetReader, tmp_path: Path
) -> None:
    split, keys = tiny.open_split("val"), [(0, i) for i in range(13)]
    batches = BatchBuilder(split, CenterCrop(24, 28), seed=0)
    batch = batches.allocate(keys)
    batches.fill(batch, keys, range(13))
    mean, std = (
        255 * torch.tensor(value).view(3, 1, 1) for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    images = (batch[0] - mean) / std
    with torch.inference_mode():
        logits = trained.network(images)
        if trained.config.recipe.val_flip:
            logits = (logits + trained.network(images.flip(-1))) / 2
    paths = []
    for i in range(13):
        paths.append(tmp_path / f"{i}.jpg")
        paths[-1].write_bytes(split.read(i)[0])
    for predictions in (
        list(predict_images(trained, paths, len(NAMES))),
        list(predict_images(trained, [np.array(Image.open(path).convert("RGB")) for path in paths], 6)),
    ):
        assert len(predictions) == 13 <= BATCH
        for prediction, expected in zip(predictions, logits.softmax(1), strict=True):
            found = torch.tensor([guess.probability for guess in prediction.guesses])
            torch.testing.assert_close(found, expected[labels(prediction)])
            assert sorted(labels(prediction)) == list(range(6))
            assert list(found) == sorted(found, reverse=True)


@pytest.mark.slow
def test_a_turned_photograph_is_classified_upright(trained: TrainedModel, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees
    turned, upright = tmp_path / "turned.png", tmp_path / "upright.png"
    Image.fromarray(np.rot90(pixels).copy()).save(turned, exif=exif)
    Image.fromarray(pixels).save(upright)
    one, other = predict_images(trained, [turned, upright], 6)
    assert one.guesses == other.guesses


def test_other_formats_and_unreadable_files(trained: TrainedModel, tmp_path: Path) -> None:
    image = Image.fromarray(np.full((30, 30, 3), 99, np.uint8))
    names = [f"image.{ending}" for ending in ("png", "gif", "webp", "bmp", "tiff")]
    for name in names:
        image.save(tmp_path / name)
    (tmp_path / "text.jpg").write_text("no image")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:300])
    paths = [tmp_path / name for name in (*names, "text.jpg", "cut.jpg", "gone.jpg")]
    predictions = list(predict_images(trained, paths, 2))
    assert [bool(prediction.problem) for prediction in predictions] == [False] * 5 + [True] * 3
    assert [len(prediction.guesses) for prediction in predictions] == [2] * 5 + [0] * 3
    row = prediction_row(predictions[0])
    assert row["image"] == str(paths[0])
    assert row["classes"][0].keys() == {"label", "id", "name", "probability"}
    assert row["classes"][0]["name"] == NAMES[row["classes"][0]["label"]]
    assert prediction_row(predictions[-1])["problem"] == "No such file or directory"


def test_folders_are_searched_for_images(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    (folder / "deep er").mkdir(parents=True)
    (folder / "notes.txt").touch()
    (folder / ".hidden.jpg").touch()
    for other in ("paper.pdf", "film.mpg", "drawing.eps", "array.h5"):  # Pillow knows them, but reads none
        (folder / other).touch()
    found = [folder / "2.JPG", folder / "deep er" / "é.webp"]
    for path in found:
        path.touch()
    single = tmp_path / "without an ending"
    single.touch()
    assert find_image_files([str(single), folder]) == [single, *found]
    with pytest.raises(UserError, match="nothing: no such image or folder"):
        find_image_files([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        find_image_files([tmp_path / "empty"])
