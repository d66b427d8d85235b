"""The process stage: from verified archives to a dataset that training opens, in `datasets/<dataset>/`.

By default no image is copied: the index holds the address of each in the archives as they lie.
`process.layout=shards` writes new tars, `process.layout=folders` class folders besides; both may be cut into
parts, jobs that run side by side, and one more job that puts together what they made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from hpc_imagenet import __version__
from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.ilsvrc import meta_bin
from hpc_imagenet.data.ilsvrc.scanned_archives import (
    ScannedArchives,
    load_or_scan,
    prepare_folder,
    remove_shared_scan,
)
from hpc_imagenet.data.prepare import certificate, class_folder_writer, shard_writer
from hpc_imagenet.data.tar.tar_scan import Array
from hpc_imagenet.datastore.index import Index, write_index
from hpc_imagenet.datastore.manifest import FILE, ClassNames, File, Manifest, Split
from hpc_imagenet.io import disk
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.launch.dist_env import DistEnv, available_cpus
from hpc_imagenet.runs.store import Progress, Run, now

_SHARDS = ("train", "val")  # of an index over the archives, in the order of their numbers


@dataclass(frozen=True)
class _Images:
    """What the dataset's index shall hold, and of which shards."""

    shards: tuple[File, ...]
    splits: dict[str, Index]
    facts: dict[str, Array]
    names: dict[str, Array]
    skipped: list[str]
    tools: dict[str, str]


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Make the dataset of `config.dataset` from its archives in the workspace, or one part of it.

    Returns:
        `images` in all, of `train` and of `val`, the number of `classes` and of images `skipped` as corrupt;
        of a part: the number of its `images`.

    Raises:
        UserError: the archives are missing, damaged, or do not belong to each other; an image is corrupt;
            no room; parts are missing.
    """
    if not dist_env.is_rank_zero:
        return {}
    workspace, stage = Path(config.workspace), config.stage
    folder = workspace / "datasets" / config.dataset.name
    workers = config.process.workers or available_cpus(dist_env)
    progress = Progress(run)
    with disk.explain_disk_full(folder):
        seen = load_or_scan(
            config,
            folder,
            stage.parts > 1,
            workers,
            lambda done, total: progress(done, total, "archives", "index"),
        )
        prepare_folder(folder)

        def tell(done: int, total: int) -> None:
            progress(done, total, "images", config.process.layout)

        if stage.part is not None:
            return {"images": _part(config, folder, seen, stage.part, stage.parts, workers, tell)}
        if stage.parts == 1:
            _part(config, folder, seen, 0, 1, workers, tell)
        return _commit(config, folder, seen)


def _part(
    config: Config,
    folder: Path,
    seen: ScannedArchives,
    part: int,
    parts: int,
    workers: int,
    tell: Callable[[int, int], None],
) -> int:
    """Do one part's share of what takes time; return its images."""
    if config.process.layout == "shards":
        plan = shard_writer.plan_shards(folder, seen, config.process)
        # Neighbours, so that a part reads one stretch of the archive.
        begin, end = (len(plan.shards) * n // parts for n in (part, part + 1))
        return shard_writer.write_shards(plan, plan.shards[begin:end], workers, tell)
    if config.process.layout == "folders":
        return class_folder_writer.write_class_folders(
            folder, seen, _identity(config, seen), part, parts, workers, tell
        )
    return 0


def _identity(config: Config, seen: ScannedArchives) -> dict[str, Any]:
    """Return whose images class folders hold."""
    return {"archives": seen.md5s(), **config.process.identity()}


def _commit(config: Config, folder: Path, seen: ScannedArchives) -> dict[str, Any]:
    """Make a dataset of what is there: indexes, meta.bin, certificate, and last the manifest."""
    images = _images(config, folder, seen)
    meta = meta_bin.encode_meta_bin(seen.devkit.names, seen.devkit.val_wnids)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # one at a time, or it is whole of neither
        # From here to the end it is not a dataset: what is bad about the archives was found before.
        (folder / FILE).unlink(missing_ok=True)
        for draft in folder.glob(".*.tmp"):  # of a try that was killed
            draft.unlink()
        splits = {split: _write_split(folder, split, of) for split, of in images.splits.items()}
        files = [_write(folder / meta_bin.FILE, meta)]
        if config.process.layout == "folders":
            class_folder_writer.finalize_class_folders(folder, seen, _identity(config, seen), meta)
        manifest = _manifest(config, seen, images, splits, files, folder)
        files += _certify(folder, manifest, images)
        seen.require_unchanged()
        remove_shared_scan(folder)
        _manifest(config, seen, images, splits, files, folder).save(folder)
    counts = {split: of.images for split, of in splits.items()}
    return {
        "images": sum(counts.values()),
        **counts,
        "classes": len(seen.devkit.names),
        "skipped": len(images.skipped),
    }


def _images(config: Config, folder: Path, seen: ScannedArchives) -> _Images:
    found = seen.scan
    if config.process.layout == "shards":
        plan = shard_writer.plan_shards(folder, seen, config.process)
        whole = shard_writer.combine_receipts(plan)
        return _Images(
            whole.shards, whole.splits, whole.facts, whole.names, seen.skipped + whole.skipped, plan.tools
        )
    archives = tuple(
        File(
            _relative(seen.archives[split], folder),
            seen.receipts[split].bytes,
            f"md5:{seen.receipts[split].md5}",
        )
        for split in _SHARDS
    )
    return _Images(archives, found.splits, found.facts, found.names, seen.skipped, {})


def _write_split(folder: Path, split: str, entries: Index) -> Split:
    path = folder / f"{split}.npy"
    write_index(path, entries)
    return Split(_file(path, path.read_bytes()), len(entries))


def _write(path: Path, data: bytes) -> File:
    with atomic_write(path) as file:
        file.write(data)
    return _file(path, data)


def _certify(folder: Path, manifest: Manifest, images: _Images) -> list[File]:
    """Write the certificate of what the manifest lists."""
    described = certificate.build_certificate(
        name=manifest.name,
        content=manifest.content,
        classes=manifest.classes,
        splits=images.splits,
        facts=images.facts,
        names=images.names,
        files=manifest.all_files(),
        skipped=images.skipped,
        provenance=manifest.provenance,
        tools=images.tools,
    )
    page = certificate.render_page(described, manifest.classes)
    return [
        _write(folder / certificate.JSON, (json.dumps(described, indent=1) + "\n").encode()),
        _write(folder / certificate.PAGE, page.encode("utf-8", "backslashreplace")),
    ]


def _manifest(
    config: Config,
    seen: ScannedArchives,
    images: _Images,
    splits: dict[str, Split],
    files: Sequence[File],
    folder: Path,
) -> Manifest:
    md5s = {seen.archives[split].name: got.md5 for split, got in seen.receipts.items()}
    fallback = hashlib.sha256(" ".join([*md5s.values(), *_words(config)]).encode()).hexdigest()[:12]
    return Manifest(
        name=config.dataset.name,
        content=config.datastore.content or fallback,
        created=now(),
        classes=tuple(ClassNames(wnid, names) for wnid, names in seen.devkit.names.items()),
        shards=images.shards,
        splits=splits,
        files=tuple(files),
        provenance={
            "source": seen.receipts["train"].source,
            "archives": md5s,
            "layout": config.process.layout,
            "process": config.process.identity(),
            "version": __version__,
        },
    )


def _words(config: Config) -> list[str]:
    changed = config.process.image_identity()
    return [json.dumps(changed, sort_keys=True)] if changed else []


def _file(path: Path, data: bytes) -> File:
    return File(path.name, len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")


def _relative(path: Path, folder: Path) -> str:
    # Through real paths: `..` behind a symbolic link leads elsewhere. The archive itself may be a link.
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())
