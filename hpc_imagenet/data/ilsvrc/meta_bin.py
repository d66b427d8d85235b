"""meta.bin: the file in which torchvision's ImageNet keeps the classes' names and the labels of val.

It is what `torch.save` would write of them, in content: a zip with a pickle and the format's version. It
holds no tensor, so torch is not needed to write it, and a process job is spared the seconds and the 450 MB
that importing torch takes.
Source: torchvision.datasets.imagenet.parse_devkit_archive, and the notes on serialization in torch's manual.
"""

from __future__ import annotations

import io
import pickle
import zipfile

FILE = "meta.bin"

_PROTOCOL = 2  # of pickle: the one that torch.save uses
_VERSION = b"3\n"  # of torch's zip format


def encode_meta_bin(names: dict[str, tuple[str, ...]], val_wnids: list[str]) -> bytes:
    """Return the bytes of a meta.bin, equal in content to what torchvision makes of the development kit.

    It loads with `torch.load(…, weights_only=True)`.

    Args:
        names: wnid → the words for that class.
        val_wnids: the class of every val image, in the order of the file names.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (
            ("data.pkl", pickle.dumps((names, val_wnids), _PROTOCOL)),
            ("byteorder", b"little"),
            ("version", _VERSION),
        ):
            archive.writestr(zipfile.ZipInfo(f"meta/{name}"), data)  # its time is 1980
    return buffer.getvalue()
