"""Wheels of what is installed here, so that a real pip can install it elsewhere without a network."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_LARGE = 3e6  # bytes; of a larger package the wheel has only name and version


def write_wheels(folder: Path, requirements: Iterable[str]) -> dict[str, str]:
    """Write a wheel of each required distribution and of all that it needs; return versions by name."""
    folder.mkdir()
    written: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    open_ends = list(requirements)
    while open_ends:
        requirement = Requirement(open_ends.pop())
        name = canonicalize_name(requirement.name)
        found = importlib.metadata.distribution(name)
        if name not in written:
            _write_wheel(folder, name, found)
            written[name] = found.version
        open_ends += [line for line in _needs(found, requirement.extras) if (name, line) not in seen]
        seen |= {(name, line) for line in _needs(found, requirement.extras)}
    return written


def _needs(found: Distribution, extras: Iterable[str]) -> Iterator[str]:
    for line in found.requires or ():
        marker = Requirement(line).marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield line


def _write_wheel(folder: Path, name: str, found: Distribution) -> None:
    files = [file for file in found.files or () if ".." not in file.parts and "__pycache__" not in file.parts]
    sizes = [path.stat().st_size for file in files if (path := Path(str(found.locate_file(file)))).exists()]
    if sum(sizes) > _LARGE:
        files = [file for file in files if file.name in ("METADATA", "WHEEL") and "dist-info" in str(file)]
    # A file without a Tag is one that setuptools installed from source. Several: for Python 2 as well.
    tag = (re.findall(r"^Tag: (.*)$", found.read_text("WHEEL") or "", re.MULTILINE) or ["py3-none-any"])[-1]
    own = f"{name.replace('-', '_')}-{found.version}"
    record = []
    with zipfile.ZipFile(folder / f"{own}-{tag}.whl", "w") as wheel:
        for file in files:
            path = Path(str(found.locate_file(file)))
            if file.name in ("RECORD", "INSTALLER", "direct_url.json", "REQUESTED") or not path.is_file():
                continue
            parts = file.parts
            inner = "/".join((f"{own}.dist-info", *parts[1:]) if parts[0].endswith(".dist-info") else parts)
            content = path.read_bytes()
            wheel.writestr(inner, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{inner},sha256={digest},{len(content)}")
        record.append(f"{own}.dist-info/RECORD,,")
        wheel.writestr(f"{own}.dist-info/RECORD", "\n".join(record) + "\n")
