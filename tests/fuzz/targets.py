"""What is fuzzed: one function per reader, which may raise UserError only, and its seeds.

A target is called with any bytes. It returns if the reader accepts or refuses them; every other exception, a
call of more than a second and more than 2 GB of memory are defects.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import sample_images
from sample_dataset import make_dataset
from sample_folders import cars

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.expected import parse_sums
from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.devkit import META, TRUTH, read_devkit
from hpc_imagenet.data.ilsvrc.labels_file import LabelsFile, parse_labels
from hpc_imagenet.data.images import image_header, jpeg_header
from hpc_imagenet.data.images.orientation import read_orientation
from hpc_imagenet.data.layouts.label_table import read_table
from hpc_imagenet.data.prepare.verify import verify_dataset
from hpc_imagenet.data.tar import tar_scan
from hpc_imagenet.data.tar.tar_reader import members
from hpc_imagenet.datastore.index import open_index
from hpc_imagenet.datastore.manifest import parse_manifest
from hpc_imagenet.errors import Superseded, UserError
from hpc_imagenet.io.tar_header import BLOCK, CHECKSUM, ZERO_BLOCK, member_size
from hpc_imagenet.launch.executor import State
from hpc_imagenet.report import jobs_table
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.attempt import RUNNING, outcome_from, read_record
from hpc_imagenet.runs.run_records import RecordCache
from hpc_imagenet.runs.store import Run, RunStore

_TEMPORARY = tempfile.TemporaryDirectory(  # removed when this process ends
    prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
)
_FOLDER = Path(_TEMPORARY.name)


@dataclass(frozen=True)
class Target:
    """One reader, and inputs that it accepts, to begin with."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def read_tar(data: bytes) -> None:
    """Read a tar with the reader, and with both scans, which must agree."""
    if data[-1:] != b"!":  # else the checksums stay as they are
        data = _with_checksums(data)
    descriptor = os.memfd_create("tar")
    try:
        os.write(descriptor, data)
        with contextlib.suppress(UserError):
            list(members(descriptor, 0, len(data), "x.tar"))
        fast = _scanned(descriptor, len(data))
        with mock.patch.object(tar_scan, "_scan_fast", return_value=None):
            assert fast == _scanned(descriptor, len(data)), "the two scans differ"
    finally:
        os.close(descriptor)


def _with_checksums(data: bytes) -> bytes:
    """Return a tar with valid checksums, which random bytes never have."""
    fixed, position = bytearray(data), 0
    while position + BLOCK <= len(fixed):
        block = bytes(fixed[position : position + BLOCK])
        if block == ZERO_BLOCK:
            break
        plain = block[: CHECKSUM.start] + b" " * 8 + block[CHECKSUM.stop :]
        fixed[position + CHECKSUM.start : position + CHECKSUM.stop] = b"%06o\0 " % sum(plain)
        try:
            length = member_size(block)
        except ValueError:
            break
        position += BLOCK + length + -length % BLOCK
    return bytes(fixed)


def _scanned(descriptor: int, size: int) -> object:
    try:
        found = tar_scan.find_images(descriptor, 0, size, "x.tar", any_extension=True)
    except UserError as error:
        return str(error)
    return [column.tolist() for column in found]


def tar_seeds() -> list[bytes]:
    """Return small tars of every format."""
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for names in (
            ("a.JPEG", "b.JPEG"),
            ("é" * (40 if form == tarfile.USTAR_FORMAT else 70) + ".JPEG", "d/./b.JPEG"),
        ):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
                for name in names:
                    header = tarfile.TarInfo(name)
                    header.size = 5
                    archive.addfile(header, io.BytesIO(b"\xff\xd8\xff\xd9x"))
            found.append(buffer.getvalue()[: -8 * 512])
    return found


def read_jpeg_header(data: bytes) -> None:
    """Read a JPEG's header one by one and many at once, which must agree where both are conclusive."""
    jpeg_header.read_header(data)
    with contextlib.suppress(IndexError):  # documented: the data ends inside a segment
        list(jpeg_header.segments(data + b"\0\0"))
    one = image_header.peek(data[: image_header.HEAD], data)
    if data.startswith(jpeg_header.SOI) and jpeg_header.has_end_marker(data):
        padded = np.frombuffer(data[: image_header.HEAD] + bytes(16), np.uint8)
        lengths = np.array([min(len(data), image_header.HEAD)])
        (many,) = image_header.peek_many(padded, np.array([0]), lengths).tolist()
        assert many[0] == 0 or image_header.ImageInfo(*many) == one, f"{many} and {one}"
    path = _FOLDER / "x.jpg"
    path.write_bytes(data)
    assert read_orientation(path) in range(1, 9)


def jpeg_seeds() -> list[bytes]:
    """Return JPEGs of many kinds."""
    encoded = sample_images.encoded
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    kinds = [{}, {"mode": "L"}, {"mode": "CMYK"}, {"progressive": True}, {"exif": exif}, {"quality": 5}]
    return [encoded("JPEG", **kind) for kind in kinds]


def read_image(data: bytes) -> None:
    """Inspect an image and decode it, unless it is large."""
    info = image_header.inspect(data)
    if info.width * info.height < 1 << 20:
        image_header.decode_error(data)
        from hpc_imagenet.training.loading.decode import EncodedImage

        with contextlib.suppress(ValueError):  # documented: the image cannot be decoded
            image = EncodedImage(data)
            image.pixels((0, 0, min(image.width, 9), min(image.height, 9)))


def image_seeds() -> list[bytes]:
    """Return images of many formats."""
    encoded = sample_images.encoded
    others = [encoded(kind) for kind in ("PNG", "BMP", "WEBP", "GIF", "PPM", "TIFF")]
    return [*jpeg_seeds(), *others, encoded("PNG", "P"), encoded("PNG", "LA")]


def read_kit(data: bytes) -> None:
    """Read a development kit. First byte 0: a whole file; 1: an unpacked tar; 2: its ids; 3: labels.json."""
    kind, data = data[:1], data[1:]
    path = _FOLDER / "kit.tar.gz"
    if kind == b"\1":
        path.write_bytes(gzip.compress(data, 0))
    elif kind == b"\2":
        path.write_bytes(_kit(_kit_parts()[0], data))
    elif kind == b"\3":
        with contextlib.suppress(UserError):
            parse_labels(data, path)
        return
    else:
        path.write_bytes(data)
    # MATLAB files are read by scipy in a process of its own: not what is fuzzed here.
    parts = {1: ("n1",), 2: ("n2",)}, {1: "n1", 2: "n2"}
    with (
        contextlib.suppress(UserError),
        mock.patch("hpc_imagenet.data.ilsvrc.devkit._classes", return_value=parts),
    ):
        read_devkit(path)


def _kit(meta: bytes, truth: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=0) as archive:
        for name, content in ((META, meta), (TRUTH, truth)):
            header = tarfile.TarInfo(f"kit/{name}")
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def _kit_parts() -> tuple[bytes, bytes]:
    path = _FOLDER / "seed.tar.gz"
    synsets = [ilsvrc_writer.Synset(1, "n1", "a, b"), ilsvrc_writer.Synset(2, "n2", "c")]
    ilsvrc_writer.write_devkit(path, synsets, [1, 2])
    with tarfile.open(path) as archive:
        found = {member.name: archive.extractfile(member) for member in archive if member.isreg()}
        meta, truth = (
            file.read()
            for name in (META, TRUTH)
            for key, file in found.items()
            if file and key.endswith(name)
        )
    return meta, truth


def kit_seeds() -> list[bytes]:
    """Return kits in the four forms."""
    meta, truth = _kit_parts()
    whole = _kit(meta, truth)
    labels = LabelsFile(("cat", "dog"), (0, 1), (1,), "class folders", {"empty": 1}, 0, ("a.jpg",)).encode()
    return [b"\0" + whole, b"\1" + gzip.decompress(whole), b"\2" + truth, b"\3" + labels]


def read_index(data: bytes) -> None:
    """Read an index alone, and with the dataset to which it belongs."""
    path = _FOLDER / "x.npy"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        open_index(path)
    folder = _dataset()
    (folder / "train.npy").write_bytes(data)
    assert isinstance(verify_dataset(folder, quick=True, workers=1).problems, list)


def index_seeds() -> list[bytes]:
    """Return an index."""
    return [(_dataset() / "val.npy").read_bytes()]


def read_manifest(data: bytes) -> None:
    """Parse a manifest, and use what it accepts as commands do."""
    with contextlib.suppress(UserError):
        manifest = parse_manifest(data, "manifest.json")
        assert manifest.bytes >= 0
        assert manifest.images >= 0
        assert manifest.encode()
        assert all(isinstance(file.path, str) for file in manifest.all_files())
        folder = _dataset()
        (folder / "manifest.json").write_bytes(data)
        verify_dataset(folder, quick=True, workers=1)


def manifest_seeds() -> list[bytes]:
    """Return a manifest."""
    return [make_dataset(_FOLDER / "seed", images=2, image_bytes=9).encode()]


def _dataset() -> Path:
    folder = _FOLDER / "datasets" / "digits"
    if not (_FOLDER / "whole").exists():
        make_dataset(_FOLDER, images=2, image_bytes=9)
        shutil.copytree(folder, _FOLDER / "whole")
    for file in (_FOLDER / "whole").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def read_journal(data: bytes) -> None:
    """Open a partial download with this state file: it is continued or begun anew, never wrong."""
    target = _FOLDER / "a.tar"
    target.with_name("a.tar.part").write_bytes(b"x" * 1000)
    target.with_name("a.tar.part.json").write_bytes(data)
    with PartialFile(target) as part:
        gaps: list[tuple[int, int]] = []
        with part.changed:
            gaps += part.gaps()
        assert 0 <= part.contiguous_size <= 1000
        assert 0 <= part.size <= 1000
        assert all(0 <= begin <= end for begin, end in gaps), gaps
        assert isinstance(part.complete, bool)
        if part.origin:
            assert isinstance(part.origin.resumable, bool)
            part.write(0, b"y")
    with contextlib.suppress(UserError):
        parse_sums(data.decode("utf-8", "replace"), "x")
    target.write_bytes(b"x")
    target.with_name("a.tar.receipt.json").write_bytes(data)
    receipt.load_receipt(target)


def journal_seeds() -> list[bytes]:
    """Return state files of partial downloads, a receipt and an md5sums."""
    origin = {"url": "http://x/a.tar", "etag": '"1"', "modified": None, "total": 2000, "ranges": True}
    record = {"bytes": 1, "md5": "0" * 32, "mtime_ns": 1, "source": "x", "verified": ""}
    states = ([[0, 10]], [[0, 10], [20, 30]])
    return [
        *(json.dumps({**origin, "spans": spans}).encode() for spans in states),
        json.dumps(record).encode(),
        b"0" * 32 + b"  a.tar\n",
    ]


def read_records(data: bytes) -> None:
    """Read one file as every record of a run."""
    folder = _FOLDER / "runs" / "abc-train"
    attempt = folder / "attempts" / "1"
    attempt.mkdir(parents=True, exist_ok=True)
    records = [folder / name for name in ("run.json", "progress.json", "lease.json", "config.yaml")]
    records += [attempt / name for name in ("submitted.json", "started.json", "outcome.json", "process.json")]
    for path in (*records, folder.parent / ".ended.cache"):
        path.write_bytes(data)
    run, store = Run(folder), RunStore(_FOLDER)
    assert isinstance(read_record(folder / "run.json"), dict)
    outcome_from(attempt / "outcome.json")
    with contextlib.suppress(UserError):
        run.executor()
    with contextlib.suppress(UserError):
        run.check_format()
    with contextlib.suppress(UserError):
        store.find("abc")
    # The executors are not queried: a record cannot start a program in this process.
    with mock.patch.object(
        jobs_table, "states", lambda runs, since: {run.id: State(RUNNING) for run in runs}
    ):
        rows = jobs_table.workspace_rows(store, RecordCache(store))
    jobs_table.table_lines(rows, 80)
    with contextlib.suppress(Superseded, UserError):
        lease.acquire(folder, 1).check()
    (folder / "lease.json").write_bytes(data)
    with contextlib.suppress(Superseded, UserError):
        lease.Lease(folder / "lease.json", "token").check()


def record_seeds() -> list[bytes]:
    """Return records of a run."""
    return [
        json.dumps(record).encode()
        for record in (
            {
                "format": 2,
                "stage": "train",
                "model": "resnet18",
                "label": "x",
                "created": "2020",
                "sweeps": ["a"],
            },
            {"attempt": 1, "restarts": 0, "host": "n1", "token": "0"},
            {"state": "finished", "reason": "", "result": {"top1": 0.5}, "time": "2020-01-01T00:00:00+00:00"},
            {"executor": "local", "job_id": "12", "time": "2020-01-01T00:00:00+00:00", "logs": "x"},
            {"done": 1, "total": 2, "unit": "images", "rate": 1.0, "note": "", "time": "2020-01-01T00:00:00"},
        )
    ] + [b"cluster:\n  executor: local\nstage: {name: train}\n"]


def read_label_table(data: bytes) -> None:
    """Read a table of labels in the format that the first byte selects."""
    endings = (".csv", ".txt", ".json", ".jsonl", ".tsv", ".lst")
    path = f"t{endings[(data[0] if data else 0) % len(endings)]}"
    (_FOLDER / path).write_bytes(data[1:])
    with contextlib.suppress(UserError):
        read_table(_FOLDER, path, lambda value: value.endswith(".jpg"))


def table_seeds() -> list[bytes]:
    """Return tables in every format."""
    return [
        b"\0file,label\na.jpg,cat\nb.jpg,dog\n",
        b"\1a.jpg cat\nb.jpg dog\n",
        b'\2{"images":[{"id":1,"file_name":"a.jpg"}],"annotations":[{"image_id":1,"category_id":2}],'
        b'"categories":[{"id":2,"name":"cat"}]}',
        b'\2{"cat": ["a.jpg"], "dog": ["b.jpg"]}',
        b'\3{"file": "a.jpg", "label": 1}\n{"file": "b.jpg", "label": 2}\n',
    ]


def mat_seeds() -> list[bytes]:
    """Return MATLAB files."""
    return [_kit_parts()[0], cars(("a.jpg", 1), ("b.jpg", 2))]


TARGETS = {
    "tar": Target(read_tar, tar_seeds),
    "jpeg": Target(read_jpeg_header, jpeg_seeds),
    "image": Target(read_image, image_seeds),
    "devkit": Target(read_kit, kit_seeds),
    "index": Target(read_index, index_seeds),
    "manifest": Target(read_manifest, manifest_seeds),
    "journal": Target(read_journal, journal_seeds),
    "records": Target(read_records, record_seeds),
    "table": Target(read_label_table, table_seeds),
}
