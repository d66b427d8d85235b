"""Writer of archives in the ILSVRC2012 layout: a tar of class tars, a flat val tar, the development kit.

Images from another source (such as `demo/digits.py`) are passed as bytes. The same images always give the
same archives, byte for byte.
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
from hpc_imagenet.io.tar_header import END, tar_member

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
    """A row of the development kit's table `synsets`; a synset without `children` is a class.

    `id` is the kit's own number; as in the real kit, the ids need not be in the order of the wnids.
    """

    id: int
    wnid: str
    words: str
    children: tuple[int, ...] = ()
    train_images: int = 0


def write_train(path: Path, classes: Iterable[tuple[str, Sequence[bytes]]]) -> None:
    """Write the train archive: one inner tar with `<wnid>_<i>.JPEG` for each (wnid, images)."""
    with path.open("wb") as file:
        _write_tar(file, ((f"{wnid}.tar", _class_tar(wnid, images)) for wnid, images in classes))


def write_val(path: Path, images: Iterable[bytes]) -> None:
    """Write the val archive: `ILSVRC2012_val_00000001.JPEG` and so on."""
    with path.open("wb") as file:
        _write_tar(file, ((f"ILSVRC2012_val_{i:08d}.JPEG", image) for i, image in enumerate(images, 1)))


def write_devkit(path: Path, synsets: Sequence[Synset], truth: Sequence[int]) -> None:
    """Write the development kit; see `encode_devkit`."""
    path.write_bytes(encode_devkit(synsets, truth))


def encode_devkit(synsets: Sequence[Synset], truth: Sequence[int]) -> bytes:
    """Return the bytes of a development kit.

    Args:
        synsets: rows of the table.
        truth: the id of every val image, in file name order.
    """
    root, buffer = "ILSVRC2012_devkit_t12", io.BytesIO()
    text = "".join(f"{number}\n" for number in truth).encode()
    # No name and no time in the gzip header: the same input gives the same bytes.
    with gzip.GzipFile("", "wb", fileobj=buffer, mtime=0) as packed:
        _write_tar(packed, [(f"{root}/{META}", _meta_mat(synsets)), (f"{root}/{TRUTH}", text)])
    return buffer.getvalue()


def write_md5sums(folder: Path) -> None:
    """Write the file `md5sums` next to the archives, in the format of the command md5sum."""
    lines = (f"{md5_of_file(folder / file, lambda done: None)}  {file}\n" for file in (TRAIN, VAL, DEVKIT))
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
    # The first 116 bytes are free text, in which scipy stores the current time.
    return b"MATLAB 5.0 MAT-file".ljust(116) + buffer.getvalue()[116:]


def _class_tar(wnid: str, images: Sequence[bytes]) -> bytes:
    buffer = io.BytesIO()
    _write_tar(buffer, ((f"{wnid}_{i}.JPEG", image) for i, image in enumerate(images)))
    return buffer.getvalue()


def _write_tar(file: io.BufferedIOBase, members: Iterable[tuple[str, bytes]]) -> None:
    for name, data in members:
        file.write(tar_member(name, data))
    file.write(END)
    file.write(bytes(-file.tell() % tarfile.RECORDSIZE))  # padded as by GNU tar
