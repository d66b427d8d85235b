"""The process stage: from verified archives to a dataset that training opens, in `datasets/<dataset>/`.

By default no image is copied: the index holds the address of each in the archives as they lie.
`process.layout=folders` writes class folders besides.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from hpc_imagenet import __version__
from hpc_imagenet.archives import folders, receipt, space
from hpc_imagenet.archives.devkit import Devkit, read_devkit
from hpc_imagenet.archives.ilsvrc import Scan, scan
from hpc_imagenet.archives.receipt import Receipt
from hpc_imagenet.archives.wanted import archive_folder
from hpc_imagenet.config import Config
from hpc_imagenet.datastore.index import write_index
from hpc_imagenet.datastore.manifest import FILE, Category, File, Manifest, Split
from hpc_imagenet.durable import replacing
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs import Progress, Run, now
from hpc_imagenet.world import World

SHARDS = ("train", "val")  # in the order of their numbers in the index
META = "meta.bin"


def run(config: Config, run: Run, world: World) -> dict[str, Any]:
    """Make the dataset of `config.dataset` from its archives in the workspace.

    Returns:
        `images` in all, of `train` and of `val`, and the number of `classes`.

    Raises:
        UserError: the archives are missing, damaged, or do not belong to each other; no room.
    """
    if not world.main:
        return {}
    workspace = Path(config.workspace)
    source = archive_folder(workspace, config.dataset)
    archives = {split: source / archive.file for split, archive in config.dataset.archives.items()}
    receipts = _receipts(archives)
    progress = Progress(run.folder)
    devkit = read_devkit(archives["devkit"])
    found = scan(
        archives["train"],
        archives["val"],
        devkit,
        lambda done, total: progress(done, total, "archives", "index"),
    )
    folder = workspace / "datasets" / config.dataset.name
    with space.telling_full(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except PermissionError as error:
            raise UserError(f"workspace={config.workspace} cannot be written: {error}") from None
        # From here to the end it is not a dataset: what is bad about the archives was found before.
        (folder / FILE).unlink(missing_ok=True)
        for draft in folder.glob(".*.tmp"):  # of a try that was killed
            draft.unlink()
        splits = {split: _write_split(folder, split, found) for split in SHARDS}
        meta = _write_meta(folder, devkit)
        if config.process.layout == "folders":
            folders.write(
                folder,
                archives,
                devkit,
                found,
                meta,
                {split: got.md5 for split, got in receipts.items()},
                lambda done, total, split: progress(done, total, "images", f"folders: {split}"),
            )
        if _receipts(archives) != receipts:
            raise UserError(f"{source}: an archive changed while it was read; ask again")
        _manifest(config, folder, archives, receipts, devkit, splits, meta).save(folder)
    images = {split: of.images for split, of in splits.items()}
    return {"images": sum(images.values()), **images, "classes": len(devkit.names)}


def _receipts(archives: dict[str, Path]) -> dict[str, Receipt]:
    found = {split: receipt.load(path) for split, path in archives.items()}
    for split, path in archives.items():
        if found[split] is None:
            why = "changed since it was verified" if path.exists() else "is missing"
            raise UserError(f"{path} {why}; +stage=download makes it whole")
    return {split: got for split, got in found.items() if got is not None}


def _write_split(folder: Path, split: str, found: Scan) -> Split:
    path = folder / f"{split}.npy"
    write_index(path, found.splits[split])
    return Split(_file(path, path.read_bytes()), len(found.splits[split]))


def _write_meta(folder: Path, devkit: Devkit) -> bytes:
    # torch takes a second to import: not before the rest has proved good.
    from hpc_imagenet.training import meta_bin

    meta = meta_bin.encode(devkit.names, devkit.val_wnids)
    with replacing(folder / META) as file:
        file.write(meta)
    return meta


def _manifest(
    config: Config,
    folder: Path,
    archives: dict[str, Path],
    receipts: dict[str, Receipt],
    devkit: Devkit,
    splits: dict[str, Split],
    meta: bytes,
) -> Manifest:
    md5s = {archives[split].name: got.md5 for split, got in receipts.items()}
    fallback = hashlib.sha256(" ".join(md5s.values()).encode()).hexdigest()[:12]
    return Manifest(
        name=config.dataset.name,
        content=config.datastore.content or fallback,
        created=now(),
        classes=tuple(Category(wnid, names) for wnid, names in devkit.names.items()),
        shards=tuple(
            File(_relative(archives[split], folder), receipts[split].bytes, f"md5:{receipts[split].md5}")
            for split in SHARDS
        ),
        splits=splits,
        files=(_file(folder / META, meta),),
        provenance={
            "source": receipts["train"].source,
            "archives": md5s,
            "layout": config.process.layout,
            "version": __version__,
        },
    )


def _file(path: Path, data: bytes) -> File:
    return File(path.name, len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")


def _relative(path: Path, folder: Path) -> str:
    # Through real paths: `..` behind a symbolic link leads elsewhere. The archive itself may be a link.
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())
