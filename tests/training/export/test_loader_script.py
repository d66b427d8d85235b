"""load.py reads images as training does."""

from __future__ import annotations

import random
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_imagenet.data.images import pillow
from hpc_imagenet.training.export import loader_script
from hpc_imagenet.training.loading.crop import CenterCrop, apply_crop
from hpc_imagenet.training.models.preprocessing import Preprocessing

PLAIN = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", 8, 8)


def executed(preprocessing: Preprocessing, folder: Path) -> dict[str, Any]:
    """Return what load.py defines."""
    (folder / "config.json").write_text('{"label_names": ["a", "b"]}')
    script: dict[str, Any] = {"__name__": "load", "__file__": str(folder / loader_script.NAME)}
    exec(loader_script.program_script(preprocessing, 2, "model.pt2"), script)
    return script


@pytest.mark.parametrize(("name", "deepest"), [("deep.png", 2**16), ("deep.tif", 2**16), ("flat.png", 2**8)])
def test_of_16_bits_per_channel_the_upper_8_are_taken(name: str, deepest: int, tmp_path: Path) -> None:
    script = executed(PLAIN, tmp_path)
    kind = np.uint16 if deepest > 2**8 else np.uint8
    grey = np.random.default_rng(0).integers(0, deepest, (8, 8), kind)
    Image.fromarray(grey).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(pillow.to_rgb(image))
    with Image.open(tmp_path / name) as image:
        found = script["preprocess"](image)
    assert np.array_equal(np.rint(255 * found[0]), expected.transpose(2, 0, 1))
    assert expected.std() > 10


@pytest.mark.parametrize("file", ["model.pt2", "model.onnx"])
def test_images_beside_an_unreadable_one_are_classified(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Session:
        def __init__(self, path: Path) -> None:
            pass

        def run(self, names: list[str], inputs: dict[str, Any]) -> tuple[Any]:
            return (np.array([[0.0, 1.0]]),)

    library = ModuleType("onnxruntime")
    library.__dict__["InferenceSession"] = Session
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    program = SimpleNamespace(module=lambda: lambda images: torch.tensor([[0.0, 1.0]]))
    monkeypatch.setattr(torch.export, "load", lambda path: program)
    names = [str(tmp_path / name) for name in ("good.jpg", "cut.jpg", "text.png", "none.jpg", "also.jpg")]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name in (names[0], names[1], names[4]):
        noise.save(name)
    Path(names[1]).write_bytes(Path(names[0]).read_bytes()[:900])
    Path(names[2]).write_text("no image")
    (tmp_path / "config.json").write_text('{"label_names": ["a", "b"]}')
    script = tmp_path / "load.py"
    script.write_text(loader_script.program_script(PLAIN, 2, file))
    monkeypatch.setattr(sys, "argv", [str(script), *names])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 1
    out, err = capsys.readouterr()
    assert out == "".join(f"{name}: b 73.1%, a 26.9%\n" for name in (names[0], names[4]))
    for line, name in zip(err.splitlines(), names[1:4], strict=True):
        assert line.startswith(f"{name}: unreadable: ")


@pytest.mark.parametrize("size", [5, 8, 11, 13])
def test_the_square_is_where_validation_has_it(size: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (8, 13, 3), np.uint8)
    script = executed(replace(PLAIN, size=size), tmp_path)
    found = np.rint(255 * script["preprocess"](Image.fromarray(pixels))[0]).transpose(1, 2, 0)
    out = torch.empty(1, 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
    crop = CenterCrop(size, 8)(13, 8, random.Random(0))
    left, upper, right, lower = crop.source
    apply_crop(torch.from_numpy(pixels[upper:lower, left:right].copy()).permute(2, 0, 1)[None], crop, out)
    assert np.array_equal(found, out[0].permute(1, 2, 0).numpy())
