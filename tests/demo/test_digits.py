from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hpc_imagenet.data.ilsvrc import ilsvrc_writer, scan
from hpc_imagenet.data.ilsvrc.devkit import TRUTH, read_devkit
from hpc_imagenet.demo import digits
from hpc_imagenet.errors import UserError


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "source"
    digits.write_digits(folder)
    return folder


@pytest.mark.slow
def test_digits_archives_have_the_ilsvrc_layout(archives: Path) -> None:
    assert sorted(path.name for path in archives.iterdir()) == [
        ilsvrc_writer.DEVKIT,
        ilsvrc_writer.TRAIN,
        ilsvrc_writer.VAL,
        "md5sums",
    ]
    assert [path.name for path in archives.parent.iterdir()] == ["source"], (
        "a temporary folder was left behind"
    )
    subprocess.run(["md5sum", "--check", "--quiet", "md5sums"], cwd=archives, check=True)
    devkit = read_devkit(archives / ilsvrc_writer.DEVKIT)
    assert [names[1] for names in devkit.names.values()] == [str(digit) for digit in range(10)]
    with tarfile.open(archives / ilsvrc_writer.DEVKIT) as kit:
        truth = kit.extractfile(f"ILSVRC2012_devkit_t12/{TRUTH}")
        assert truth
        wnid_of = dict(zip(map(int, truth.read().split()), devkit.val_wnids, strict=True))
    assert sorted(wnid_of) == list(range(1, 11))
    assert [wnid_of[i] for i in range(1, 11)] != list(devkit.names), "ids must not be in label order"


@pytest.mark.slow
def test_each_source_image_occurs_once_with_its_label(archives: Path) -> None:
    devkit = read_devkit(archives / ilsvrc_writer.DEVKIT)
    found = scan.scan(archives / ilsvrc_writer.TRAIN, archives / ilsvrc_writer.VAL, devkit)
    data = [(archives / name).read_bytes() for name in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL)]
    decoded: list[tuple[bytes, int]] = []
    counts = {}
    for split, entries in found.splits.items():
        counts[split] = len(entries)
        for offset, length, label, shard in entries.tolist():
            with Image.open(io.BytesIO(data[shard][offset : offset + length])) as image:
                assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "JPEG")
                small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), float) / 255 * 16
            decoded.append((small.round().astype(np.uint8).tobytes(), label))
        if split == "val":
            assert Counter(entries["label"].tolist()) == dict.fromkeys(range(10), 36)
    assert counts == {"train": 1437, "val": 360}
    source = load_digits()
    assert Counter(label for _, label in decoded) == Counter(source.target.tolist())
    # After enlarging, compressing and shrinking, the nearest source image is still the original.
    small = np.array([np.frombuffer(pixels, np.uint8) for pixels, _ in decoded], float)
    flat = source.data
    distance = (small**2).sum(1)[:, None] - 2 * small @ flat.T + (flat**2).sum(1)
    nearest = distance.argmin(1)
    assert (source.target[nearest] == [label for _, label in decoded]).mean() > 0.999
    assert len(set(nearest.tolist())) > 1780


@pytest.mark.slow
def test_digits_archives_are_reproducible(archives: Path, tmp_path: Path) -> None:
    digits.write_digits(tmp_path / "again")
    for path in archives.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_write_digits_rejects_a_non_empty_folder(archives: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in archives.iterdir()}
    with pytest.raises(UserError, match="cannot be written"):
        digits.write_digits(archives)
    assert {path: path.stat().st_mtime_ns for path in archives.iterdir()} == before
    assert [path.name for path in archives.parent.iterdir()] == ["source"]


@pytest.mark.slow
def test_a_folder_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x/y cannot be written: Not a directory"):
        digits.write_digits(tmp_path / "file/x/y")


def test_missing_scikit_learn_error_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install -c constraints\.txt -e '\.\[demo\]'"):
        digits.write_digits(tmp_path / "x")
    assert not list(tmp_path.iterdir())
