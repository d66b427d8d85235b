"""Exports are loaded back by plain libraries, in a process that cannot import this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from trained_samples import NAMES, trained_of

from hpc_imagenet.errors import UserError
from hpc_imagenet.training.export import model_files
from hpc_imagenet.training.export.export_formats import FORMATS
from hpc_imagenet.training.export.exporter import export_network
from hpc_imagenet.training.predictor import predict_images
from hpc_imagenet.training.trained import TrainedModel

pytestmark = pytest.mark.slow

SQUASH = {"crop_mode": "squash", "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
FILES = {"README.md", "config.json", "load.py"}
# What a user would write, with `images` and the export as current folder.
PLAIN = {
    "state_dict": """
import torchvision
model = torchvision.models.get_model("resnet18", num_classes=6)
model.load_state_dict(torch.load("model.pt", weights_only=True))
logits = model.eval()(images)
""",
    "safetensors": """
import torchvision
from safetensors.torch import load_file
model = torchvision.models.get_model("resnet18", num_classes=6)
model.load_state_dict(load_file("model.safetensors"))
logits = model.eval()(images)
""",
    "torch_export": 'logits = torch.export.load("model.pt2").module()(images)',
    "onnx": """
import onnxruntime
(logits,) = onnxruntime.InferenceSession("model.onnx").run(None, {"images": images.numpy()})
logits = torch.from_numpy(logits)
""",
    "hf": """
import timm
model = timm.create_model("local-dir:.", pretrained=True).eval()
assert list(timm.data.resolve_model_data_config(model)["mean"]) == [0.5, 0.5, 0.5]
assert model.pretrained_cfg["label_names"][0] == "café"
logits = model(images)
""",
}


def without_package(code: str, folder: Path, *arguments: str) -> str:
    """Run Python code in a process that cannot import this package, and return its output."""
    blocked = "import sys; sys.modules['hpc_imagenet'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def save_image(path: Path, seed: int = 0, width: int = 50, height: int = 40, **options: Any) -> Path:
    """Write a JPEG of coarse noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(
        path, quality=95, **options
    )
    return path


def exported(trained: TrainedModel, name: str, folder: Path) -> Path:
    return export_network(trained, folder / "out", name)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_libraries_load_every_format(name: str, tmp_path: Path) -> None:
    network = "timm/vit_tiny_patch16_224.augreg_in21k" if name == "hf" else "resnet18"
    trained = trained_of(tmp_path, network, 96, val_resize=101)
    out = exported(trained, name, tmp_path)
    assert {path.name for path in out.iterdir()} == {FORMATS[name].file, *FILES}
    for count in (1, 3):  # any number of images
        images = model_files.example_images(trained.preprocessing, count)
        np.save(tmp_path / f"images-{count}.npy", images.numpy())
    code = [
        "import numpy, torch\nfor count in (1, 3):",
        "    images = torch.from_numpy(numpy.load(f'../images-{count}.npy'))",
        *(f"    {line}" for line in PLAIN[name].strip().splitlines()),
        "    numpy.save(f'../logits-{count}.npy', logits.detach().numpy())",
    ]
    without_package("\n".join(code), out)
    for count in (1, 3):
        with torch.inference_mode():
            expected = trained.network(torch.from_numpy(np.load(tmp_path / f"images-{count}.npy"))).numpy()
        assert expected.std() > 0.01
        found = np.load(tmp_path / f"logits-{count}.npy")
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "network", "recipe"),
    [
        ("state_dict", "resnet18", {"blurpool": True}),
        ("onnx", "mobilenet_v3_small", {"ema": 0.9, "preprocessing": SQUASH}),
    ],
)
def test_the_script_gives_the_same_predictions(
    name: str, network: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    trained = trained_of(tmp_path, network, val_resize=36, **recipe)
    out = exported(trained, name, tmp_path)
    images = [save_image(tmp_path / "wide.jpg"), save_image(tmp_path / "high.jpg", 1, 40, 70)]
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    images.append(save_image(tmp_path / "turned.jpg", 2, exif=exif))
    code = (
        "import json, runpy; runpy.run_path('load.py', run_name='__main__'); import load\n"
        "network = load.load_model()\n"
        "rows = [load.predict(network, load.preprocess(load.Image.open(name)))[0] for name in sys.argv[1:]]\n"
        "print(json.dumps([[float(value) for value in row] for row in rows]))"
    )
    *printed, numbers = without_package(code, out, *map(str, images)).splitlines()
    rows = json.loads(numbers)
    best = NAMES[int(np.argmax(rows[0]))]
    assert printed[0].startswith(f"{images[0]}: {best} ")
    for prediction, row in zip(predict_images(trained, images, len(NAMES)), rows, strict=True):
        for guess in prediction.guesses:
            # The script resizes by Pillow: on average 0.02 grey levels from torch's filter.
            assert row[guess.label] == pytest.approx(guess.probability, abs=0.02)


@pytest.mark.parametrize(
    ("network", "size", "recipe"),
    [
        ("vit_b_32", 32, {}),  # patches of another size
        ("googlenet", 32, {}),
        ("mnasnet0_5", 32, {}),  # reads the metadata of a state dict
        ("convnext_tiny", 64, {}),
        ("densenet121", 96, {}),
        ("resnet18", 64, {"blurpool": True, "norm_momentum": 0.05, "val_flip": True}),
        ("timm/mobilenetv4_conv_small", 32, {}),
        ("timm/tf_efficientnet_lite0", 32, {}),  # layers of timm's own
    ],
)
def test_code_builds_networks_whose_layers_were_changed(
    network: str, size: int, recipe: dict[str, Any], tmp_path: Path
) -> None:
    trained = trained_of(tmp_path, network, size, **recipe)
    out = exported(trained, "safetensors", tmp_path)  # compares the outputs
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    script = (out / "load.py").read_text()
    assert "hpc_imagenet" not in script
    architecture = json.loads((out / "config.json").read_text())["architecture"]
    changed = ".set_submodule(" in script or "get_submodule(" in script
    assert changed == (size <= 64)
    assert (" changed " in architecture) == changed


def test_a_network_of_the_user_is_exported_with_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("WIDTH = 4\n")
    (package / "small.py").write_text(
        "from torch import nn\nfrom nets.parts import WIDTH\n"
        "def make(num_classes, stride=2):\n"
        "    layers = [nn.Conv2d(3, WIDTH, 3, stride), nn.AdaptiveAvgPool2d(1), nn.Flatten()]\n"
        "    return nn.Sequential(*layers, nn.Linear(WIDTH, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    trained = trained_of(tmp_path, "nets.small:make")
    (package / "parts.py").write_text("WIDTH = 5\n")  # a later edit
    out = exported(trained, "state_dict", tmp_path)
    assert (out / "source/nets/parts.py").read_text() == "WIDTH = 4\n"
    image = save_image(tmp_path / "image.jpg")
    run = "import runpy; sys.argv[0] = 'load.py'; runpy.run_path('load.py', run_name='__main__')"
    (prediction,) = predict_images(trained, [image], 1)
    assert f": {NAMES[prediction.guesses[0].label]} " in without_package(run, out, str(image))


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    trained = trained_of(tmp_path, "squeezenet1_1")
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(UserError, match="out exists: type a new folder"):
        export_network(trained, out, "state_dict")
    out.unlink()
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        export_network(trained, tmp_path / "nowhere/out", "state_dict")
    out.mkdir()
    assert export_network(trained, out, "state_dict") == out
    with pytest.raises(UserError, match="out exists"):
        export_network(trained, out, "state_dict")


def test_a_format_that_fails_leaves_nothing(tmp_path: Path) -> None:
    trained = trained_of(tmp_path, "squeezenet1_1")
    before = sorted(tmp_path.iterdir())
    with (
        mock.patch.object(torch.export, "export", side_effect=RuntimeError("control flow\nmore")),
        pytest.raises(UserError) as error,
    ):
        export_network(trained, tmp_path / "out", "torch_export")
    assert str(error.value) == (
        "--format torch_export cannot represent this squeezenet1_1 (control flow): "
        "take --format state_dict or safetensors"
    )
    with (
        mock.patch.object(model_files, "plain_network", side_effect=AttributeError("no layer")),
        pytest.raises(UserError, match="take --format onnx or torch_export"),
    ):
        export_network(trained, tmp_path / "out", "state_dict")
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_load_into_another_network_are_refused(tmp_path: Path) -> None:
    trained = trained_of(tmp_path, "squeezenet1_1")
    first = trained.network.get_submodule("features.0")
    assert isinstance(first, torch.nn.Conv2d)
    first.forward = lambda images: images  # type: ignore[method-assign]
    with pytest.raises(UserError, match="cannot represent"):
        export_network(trained, tmp_path / "out", "state_dict")
    assert not (tmp_path / "out").exists()


def test_missing_packages_and_unknown_formats_are_named(tmp_path: Path) -> None:
    trained = trained_of(tmp_path, "squeezenet1_1")
    with pytest.raises(UserError, match="--format onx is unknown; did you mean: onnx"):
        export_network(trained, tmp_path / "out", "onx")
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(UserError, match=r"needs onnx and onnxscript: pip install -c .*\[export\]"),
    ):
        export_network(trained, tmp_path / "out", "onnx")


def test_a_full_disk_and_a_read_only_folder_are_named(tmp_path: Path) -> None:
    trained = trained_of(tmp_path, "squeezenet1_1")
    before = sorted(tmp_path.iterdir())
    usage = os.statvfs_result((1, 1, 9, 9, 9, 9, 9, 9, 0, 255))
    with (
        mock.patch("os.statvfs", return_value=usage),
        pytest.raises(UserError, match="not enough free space for --format state_dict"),
    ):
        export_network(trained, tmp_path / "out", "state_dict")
    with (
        mock.patch.object(Path, "write_text", side_effect=OSError(28, "No space left on device")),
        pytest.raises(UserError, match="out cannot be written: No space left on device"),
    ):
        export_network(trained, tmp_path / "out", "state_dict")
    assert sorted(tmp_path.iterdir()) == before


def test_weights_beyond_a_file_of_onnx_are_beside_it(tmp_path: Path) -> None:
    import onnxruntime

    trained = trained_of(tmp_path, "squeezenet1_1")
    with mock.patch.object(model_files, "_INLINE", 0):
        out = exported(trained, "onnx", tmp_path)
    assert {path.name for path in out.iterdir()} == {"model.onnx", "model.onnx.data", *FILES}
    images = model_files.example_images(trained.preprocessing)
    (logits,) = onnxruntime.InferenceSession(out / "model.onnx").run(None, {"images": images.numpy()})
    with torch.inference_mode():
        expected = trained.network(images).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
