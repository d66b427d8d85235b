"""Development kit reader: the classes, their names and the labels of the val images.

The kit is `ILSVRC2012_devkit_t12.tar.gz`. It contains `data/meta.mat` (a MATLAB struct array `synsets`; the
leaves of the WordNet tree are the classes) and `data/ILSVRC2012_validation_ground_truth.txt` (one id per
line, for the val images in file name order). These ids are not the usual training labels, which are the
indices of the wnids in alphabetical order. Source: the kit's readme.txt, and torchvision.datasets.imagenet.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from hpc_imagenet.data.download.file_type import describe_content
from hpc_imagenet.data.ilsvrc.labels_file import LabelsFile, class_id, parse_labels
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.mat_file import read_mat
from hpc_imagenet.io.printable import escape_name

META = "data/meta.mat"
TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
# A wnid is also used as a folder name.
WNID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_ID = re.compile(r"[0-9]{1,9}")

# bytes of an unpacked kit, and of one of its files: ILSVRC2012's have 10 MB and 0.3 MB. A gzip file can hold
# a thousand times its size in zeros.
MAX_UNPACKED, _MAX_FILE = 256 << 20, 16 << 20


@dataclass(frozen=True)
class Devkit:
    """Contents of a development kit.

    Attributes:
        names: wnid → names of the class, in alphabetical order of the wnids (of a labels.json: in its order),
            so that the index of a class is its label.
        val_wnids: wnid of every val image, in file name order.
        test_wnids: the same of the test images; only in a labels.json.
        labels: the labels.json of archives that are made of labelled images; None for ILSVRC's kit.
    """

    names: dict[str, tuple[str, ...]]
    val_wnids: list[str]
    test_wnids: list[str] = field(default_factory=list)
    labels: LabelsFile | None = None


def read_devkit(path: Path) -> Devkit:
    """Read a development kit, or a labels.json: its classes are in label order, each with one name.

    Raises:
        UserError: not a development kit, damaged, or inconsistent.
    """
    if path.is_file():
        with path.open("rb") as file:
            if (first := file.read(1)) == b"{":
                return _from_labels(parse_labels(first + file.read(), path))
    meta, truth = _unpack(path)
    names, wnid_of = _classes(meta, path)
    val_wnids = []
    for number, line in enumerate(truth.decode("ascii", "replace").split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        if not _ID.fullmatch(line) or int(line) not in wnid_of:
            text = f"{line!r:.60}"
            raise UserError(
                f"{path}: {TRUTH} line {number} is {text}, which is not the id of a class in {META}"
            )
        val_wnids.append(wnid_of[int(line)])
    return Devkit(names, val_wnids)


def _from_labels(labels: LabelsFile) -> Devkit:
    wnids = [class_id(name) for name in labels.classes]
    return Devkit(
        {wnid: (escape_name(name),) for wnid, name in zip(wnids, labels.classes, strict=True)},
        [wnids[label] for label in labels.val],
        [wnids[label] for label in labels.test],
        labels,
    )


def _unpack(path: Path) -> tuple[bytes, bytes]:
    found: dict[str, bytes] = {}
    try:
        with (
            gzip.open(path) as unpacked,
            tarfile.open(fileobj=cast("IO[bytes]", _Limited(unpacked)), mode="r|") as archive,
        ):
            for member in archive:
                for name in (META, TRUTH):
                    if member.isreg() and f"/{member.name}".endswith(f"/{name}"):
                        if member.size > _MAX_FILE:
                            raise tarfile.TarError(f"{name} has {member.size} bytes")
                        file = archive.extractfile(member)
                        found[name] = file.read() if file else b""
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; submit +stage=download to fetch it") from None
    except PermissionError:
        raise
    # tarfile raises ValueError and its subclasses for some damaged headers.
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        with path.open("rb") as raw:
            content = describe_content(raw.read(512))
        problem = f"damaged ({error})" if content == "a gzip file" else content
        raise UserError(f"{path}: not a development kit (.tar.gz) but {problem}") from None
    for name in (META, TRUTH):
        if name not in found:
            raise UserError(
                f"{path} does not contain {name}; is it the ILSVRC2012 development kit for tasks 1 and 2?"
            )
    return found[META], found[TRUTH]


class _Limited(io.RawIOBase):
    """The start of an unpacked kit.

    Raises:
        tarfile.TarError: from a read beyond `MAX_UNPACKED` bytes.
    """

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file, self._left = file, MAX_UNPACKED

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        data = self._file.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.TarError(f"more than {MAX_UNPACKED >> 20} MiB when it is unpacked")
        return data


def _classes(meta: bytes, path: Path) -> tuple[dict[str, tuple[str, ...]], dict[int, str]]:
    try:
        # By position, as torchvision reads them: ILSVRC2012_ID, WNID, words, gloss, num_children.
        rows: Any = [list(row.values()) for row in read_mat(meta, META)["synsets"]]
        leaves = [(int(row[0]), str(row[1]), str(row[2])) for row in rows if int(row[4]) == 0]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: {META} has no readable table `synsets` ({error!r})") from None
    if not leaves:
        raise UserError(f"{path}: {META} has no class: every synset has children")
    wnid_of = {number: wnid for number, wnid, _ in leaves}
    names = {wnid: tuple(words.split(", ")) for _, wnid, words in sorted(leaves, key=lambda leaf: leaf[1])}
    if not len(leaves) == len(wnid_of) == len(names):
        raise UserError(f"{path}: an id or a wnid occurs twice in {META}")
    for wnid in names:
        if not WNID.fullmatch(wnid):
            raise UserError(
                f"{path}: {META} has a class with the invalid wnid {wnid!r}; a valid one is n01440764"
            )
    return names, wnid_of
