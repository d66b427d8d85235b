"""What an archive must be, and whether a file is it: MD5, size and form."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.config.schema import Dataset
from hpc_imagenet.data.download.file_type import describe_content, is_html
from hpc_imagenet.data.tar import tar_reader
from hpc_imagenet.datastore.backends.storage_backend import hash_file
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError

MD5SUMS_FILE = "md5sums"  # beside the archives, in the format of the command md5sum
CHUNK = 1 << 20

# `<32 hex digits>  <name>`, or ` *` before the name of a file that was read as binary.
_SUM = re.compile(r"([0-9a-fA-F]{32}) [ *](.+)")


@dataclass(frozen=True)
class ExpectedArchive:
    """One archive as it must be. `md5` and `bytes` are None where nobody says."""

    setting: str  # of this archive: dataset.archives.train
    file: str
    gzip: bool  # a .tar.gz; else an uncompressed tar
    bytes: int | None = None
    md5: str | None = None
    md5_source: str = ""  # where the MD5 stands: a setting's name or `md5sums`


def archive_folder(workspace: Path, dataset: Dataset) -> Path:
    """Return where the archives of a dataset lie in the workspace."""
    return workspace / "archives" / dataset.name


def expected_archives(dataset: Dataset, sums: dict[str, str]) -> list[ExpectedArchive]:
    """Return the archives of a dataset; an MD5 in its config counts before one in `sums`."""
    result = []
    for split, archive in dataset.archives.items():
        setting = f"dataset.archives.{split}"
        if "/" in archive.file or archive.file in ("", ".", "..", MD5SUMS_FILE):
            raise UserError(f"{setting}.file={archive.file} is not the name of a file in dataset.source")
        md5, vouched = archive.md5, f"{setting}.md5" if archive.md5 else ""
        if md5 is None and archive.file in sums:
            md5, vouched = sums[archive.file], MD5SUMS_FILE
        if md5 is not None and not re.fullmatch(r"[0-9a-fA-F]{32}", md5):
            raise UserError(f"{setting}.md5={md5} is not 32 hex digits")
        result.append(
            ExpectedArchive(
                setting, archive.file, split == "devkit", archive.bytes, md5.lower() if md5 else None, vouched
            )
        )
    return result


def parse_sums(text: str) -> dict[str, str]:
    """Read the output of `md5sum`: file name → hex digits; other lines are passed over."""
    found = (_SUM.fullmatch(line.strip()) for line in text.splitlines())
    return {match[2].rsplit("/", 1)[-1]: match[1].lower() for match in found if match}


def new_md5() -> hashlib._Hash:
    """Return an MD5 that also works where the system forbids it for security: this is none."""
    return hashlib.md5(usedforsecurity=False)


def md5_of_file(path: Path, progress: Callable[[int], None]) -> str:
    """Return the MD5 of a file in hex; `progress` is told how many bytes are read."""
    return hash_file(path, File(path.name, 0, "md5:"), progress).removeprefix("md5:")


def check_first_bytes(first: bytes, want: ExpectedArchive, where: str, hint: str = "") -> None:
    """Refuse a file by its first 512 bytes, before the other 148 GB are fetched.

    Raises:
        UserError: a web page, or not of the form that is wanted.
    """
    tail = f"; {hint}" if hint else ""
    if is_html(first):
        raise UserError(f"{where} is an HTML page, not an archive: a login or an error page?{tail}")
    if want.gzip:
        if not first.startswith(b"\x1f\x8b"):
            raise UserError(f"{where}: not a gzip file but {describe_content(first)}{tail}")
    else:
        tar_reader.check_first_block(first, where)


def check_complete(path: Path, want: ExpectedArchive, md5: str, where: str) -> None:
    """Refuse a file that is there in full and not what is wanted.

    Where nothing vouches for the bytes, the form has to: a tar must have its end mark, a gzip file its sum.

    Args:
        path: the file.
        want: what it must be.
        md5: of its bytes.
        where: what an error calls it.

    Raises:
        UserError: wrong MD5, size or form, or truncated.
    """
    size = path.stat().st_size
    if want.bytes is not None and size != want.bytes:
        raise UserError(f"{where}: {size} bytes, but {want.setting}.bytes is {want.bytes}")
    if want.md5 is not None and md5 != want.md5:
        raise UserError(f"{where}: its MD5 is {md5}, but {want.md5_source} says {want.md5}")
    with path.open("rb") as file:
        check_first_bytes(file.read(tar_reader.BLOCK), want, where)
        if want.md5 is None and want.gzip:
            try:
                with gzip.open(file.name) as plain:
                    while plain.read(CHUNK):
                        pass
            except (EOFError, zlib.error, OSError) as error:
                raise UserError(f"{where}: damaged or truncated ({error})") from None
        elif want.md5 is None:
            for _ in tar_reader.members(file.fileno(), 0, os.fstat(file.fileno()).st_size, where):
                pass


def quarantine(path: Path, target: Path, error: UserError) -> UserError:
    """Move a wrong file out of the way, as `<target>.bad`, and return the error that says so."""
    bad = target.with_name(target.name + ".bad")
    path.replace(bad)
    return UserError(f"{error}; kept aside as {bad}, ask again for another try")
