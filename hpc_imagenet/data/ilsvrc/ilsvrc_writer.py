"""Write archives of the exact ILSVRC2012 shape: a tar of class tars, a flat val tar, the development kit.

Who has images of another origin (`digits.py`) gives them as bytes; the same images always make the same
archives, byte for byte.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.data.download.expected import MD5SUMS_FILE, md5_of_file
from hpc_imagenet.data.ilsvrc.devkit import META, TRUTH

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_COLUMNS = (
    "ILSVRC2012_ID",
    "WNID",
    "words",
    "gloss",
    "num_children",
    "children",
    "wordnet_height",
    "num_train_images",
)


@dataclass(frozen=True)
class Synset:
    """A row of the development kit's table; one without `children` is a class.

    `id` is the kit's own number. In the real kit the ids are not in the order of the wnids either.
    """

    id: int
    wnid: str
    words: str
    children: tuple[int, ...] = ()
    train_images: int = 0


def write_train(path: Path, classes: Iterable[tuple[str, Sequence[bytes]]]) -> None:
    """Write the train archive: for each (wnid, images) one inner tar of `<wnid>_<i>.JPEG`."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as outer:
        for wnid, images in classes:
            buffer = io.BytesIO()
            named = ((f"{wnid}_{i}.JPEG", image) for i, image in enumerate(images))
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as inner:
                _add(inner, named)
            _add(outer, [(f"{wnid}.tar", buffer.getvalue())])


def write_val(path: Path, images: Iterable[bytes]) -> None:
    """Write the val archive: `ILSVRC2012_val_00000001.JPEG` and so on."""
    named = ((f"ILSVRC2012_val_{i:08d}.JPEG", image) for i, image in enumerate(images, 1))
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        _add(archive, named)


def write_devkit(path: Path, synsets: Sequence[Synset], truth: Sequence[int]) -> None:
    """Write the development kit; `truth` holds the id of every val image, in the order of their names."""
    root = "ILSVRC2012_devkit_t12"
    text = "".join(f"{number}\n" for number in truth).encode()
    with (
        path.open("wb") as raw,
        # No name and no time in the gzip header: the same input makes the same bytes.
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        _add(archive, [(f"{root}/{META}", _meta_mat(synsets)), (f"{root}/{TRUTH}", text)])


def write_md5sums(folder: Path, files: Sequence[str] = (TRAIN, VAL, DEVKIT)) -> None:
    """Write `md5sums` beside the archives, as the command md5sum does."""
    lines = (f"{md5_of_file(folder / file, lambda done: None)}  {file}\n" for file in files)
    (folder / MD5SUMS_FILE).write_text("".join(lines))


def _meta_mat(synsets: Sequence[Synset]) -> bytes:
    import numpy as np
    from scipy.io import savemat

    rows = np.zeros((len(synsets), 1), [(column, object) for column in _COLUMNS])
    height = {synset.id: 1 if synset.children else 0 for synset in synsets}
    for row, synset in zip(rows[:, 0], synsets, strict=True):
        for column, value in zip(
            _COLUMNS,
            (
                float(synset.id),
                synset.wnid,
                synset.words,
                f"the class {synset.words}",
                float(len(synset.children)),
                np.array(synset.children, float).reshape(1, -1),
                float(height[synset.id]),
                float(synset.train_images),
            ),
            strict=True,
        ):
            row[column] = value
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": rows})
    # The first 116 bytes are free text, where scipy notes the time.
    return b"MATLAB 5.0 MAT-file".ljust(116) + buffer.getvalue()[116:]


def _add(archive: tarfile.TarFile, files: Iterable[tuple[str, bytes]]) -> None:
    for name, data in files:
        header = tarfile.TarInfo(name)  # no owner and no time but zero
        header.size = len(data)
        archive.addfile(header, io.BytesIO(data))
