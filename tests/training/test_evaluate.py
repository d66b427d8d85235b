"""`evaluate`: accuracy of a file or of torchvision's cached weights on val."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from command_line import Cli
from run_stage import config_of, run_stage
from sample_images import encoded
from torchvision import models

from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages.work import download, process
from hpc_imagenet.training.evaluate import evaluate

pytestmark = pytest.mark.slow

NAME = "mobilenet_v3_small"
FILE = "mobilenet_v3_small-047dcff4.pth"  # its name in torchvision's cache


def make_dataset(workspace: Path, classes: int) -> DatasetReader:
    """Process a dataset with one train image per class and 20 val images of the first five classes."""
    source, bits = workspace / "source", random.Random(2)
    source.mkdir()
    synsets = [Synset(i + 1, f"n{i:04d}", f"word {i}") for i in range(classes)]
    image = encoded()
    ilsvrc_writer.write_train(source / ilsvrc_writer.TRAIN, [(synset.wnid, [image]) for synset in synsets])
    sizes = [(bits.randrange(20, 60), bits.randrange(20, 60)) for _ in range(20)]
    ilsvrc_writer.write_val(source / ilsvrc_writer.VAL, [encoded(size=size) for size in sizes])
    ilsvrc_writer.write_devkit(source / ilsvrc_writer.DEVKIT, synsets, [1 + i % 5 for i in range(20)])
    config = config_of(workspace, source)
    run_stage(download, config)
    run_stage(process, config)
    return DatasetReader(workspace / "datasets" / config.dataset.name)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> DatasetReader:
    return make_dataset(tmp_path_factory.mktemp("few"), 6)


def weights(classes: int, answer: int) -> dict[str, torch.Tensor]:
    """Return the state dict of a network that always ranks class `answer` first, then the others in order."""
    model = models.get_model(NAME, weights=None, num_classes=classes)
    last = model.classifier[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = -torch.arange(classes, dtype=torch.float)
    last.bias.data[answer] = 1
    return model.state_dict()


def test_evaluates_a_weights_file(few: DatasetReader, tmp_path: Path) -> None:
    torch.save(weights(6, answer=1), tmp_path / "w.pth")
    result = evaluate(few, f"{NAME}={tmp_path / 'w.pth'}", 0)
    # A fifth of val has class 1; only class 5, which val lacks, is not among the top five.
    assert (result.images, result.top1, result.top5, result.published) == (20, pytest.approx(0.2), 1.0, None)
    torch.save(weights(6, answer=5), tmp_path / "w.pth")
    result = evaluate(few, f"{NAME}={tmp_path / 'w.pth'}", 0)
    assert (result.top1, result.top5) == (0.0, pytest.approx(0.8))


def test_evaluates_an_old_file_without_num_batches_tracked(few: DatasetReader, tmp_path: Path) -> None:
    """Training also accepts such files."""
    old = {k: v for k, v in weights(6, answer=1).items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "w.pth")
    assert evaluate(few, f"{NAME}={tmp_path / 'w.pth'}", 0).top1 == pytest.approx(0.2)


def test_evaluates_weights_in_torchvision_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(weights(1000, answer=2), folder / FILE)
    store = make_dataset(tmp_path, 1000)
    result = evaluate(store, NAME, 0)
    assert (result.weights, result.top1, result.top5) == (
        f"{NAME}:IMAGENET1K_V1",
        pytest.approx(0.2),
        pytest.approx(1.0),
    )
    assert result.published == pytest.approx((0.67668, 0.87402))
    cli = Cli(tmp_path)
    output = cli("verify", "numbers", "--weights", NAME).stdout
    assert "top-1 20.00%, top-5 100.00% of 20 images of val (published: 67.67% and 87.40%)" in output


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(
    tiny: DatasetReader, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_imagenet.training.evaluate.BATCH_SIZE", 8)  # fewer images need no processes
    torch.save(weights(10, answer=1), tmp_path / "w.pth")
    shutil.copytree(tiny.folder, tmp_path / "copy")
    with (tmp_path / "copy" / "val.tar").open("r+b") as file:
        file.seek(int(tiny.open_split("val").index["offset"][11]))
        file.write(b"broken" * 10)
    line = rf"^{tmp_path}/copy: image val_0011\.JPEG cannot be read \(cannot identify image file\)$"
    with pytest.raises(UserError, match=line):
        evaluate(DatasetReader(tmp_path / "copy"), f"{NAME}={tmp_path / 'w.pth'}", workers)


def test_errors_are_one_line(few: DatasetReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "text").write_text("no weights")
    torch.save(weights(7, answer=0), tmp_path / "seven.pth")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / FILE).write_bytes(b"x")
    for option, message in (
        ("resnet5", "unknown model resnet5; did you mean: resnet50"),
        ("resnet18", "not on disk; .* wget -P .* https://"),
        (f"{NAME}:V9", "one of: IMAGENET1K_V1"),
        (NAME, "the weights have 1000 classes, but the dataset has 6"),
        (f"{NAME}={tmp_path / 'none.pth'}", "no such file"),
        (f"{NAME}={tmp_path / 'text'}", "not a file of weights"),
        (f"{NAME}={tmp_path / 'seven.pth'}", "not weights of mobilenet_v3_small for 6 classes"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            evaluate(few, option, 0)
        assert "\n" not in str(caught.value)
