"""Writer of meta.bin, in which torchvision's ImageNet stores the class names and the val labels.

The content equals that of `torch.save`: a zip with a pickle and the format version. It contains no tensor, so
it can be written without torch, whose import would cost a process job several seconds and 450 MB of memory.
Source: torchvision.datasets.imagenet.parse_devkit_archive, and the notes on serialization in torch's manual.
"""

from __future__ import annotations

import io
import pickle
import zipfile

FILE = "meta.bin"

_PROTOCOL = 2  # pickle protocol of torch.save
_VERSION = b"3\n"  # version of torch's zip format


def encode_meta_bin(names: dict[str, tuple[str, ...]], val_wnids: list[str]) -> bytes:
    """Return the bytes of a meta.bin, equal in content to the one that torchvision makes from the devkit.

    It loads with `torch.load(…, weights_only=True)`.

    Args:
        names: wnid → names of the class.
        val_wnids: wnid of every val image, in file name order.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (
            ("data.pkl", pickle.dumps((names, val_wnids), _PROTOCOL)),
            ("byteorder", b"little"),
            ("version", _VERSION),
        ):
            # A ZipInfo is dated 1980, so that the same input gives the same bytes.
            archive.writestr(zipfile.ZipInfo(f"meta/{name}"), data)
    return buffer.getvalue()
