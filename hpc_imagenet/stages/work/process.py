"""Process stage: make a dataset that training can open, `datasets/<dataset>/`, from verified archives.

By default no image is copied: the index stores the byte offset of each image in the archives.
`process.layout=shards` writes new tars, and `process.layout=folders` also writes class folders. Both can be
split into parts, which run as parallel jobs, and a final job that combines their output.
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
from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus
from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.ilsvrc import meta_bin
from hpc_imagenet.data.ilsvrc.labels_file import LabelsFile
from hpc_imagenet.data.ilsvrc.scanned_archives import (
    ScannedArchives,
    load_or_scan,
    prepare_folder,
    remove_shared_scan,
    require_images,
)
from hpc_imagenet.data.prepare import certificate, class_folder_writer, shard_writer
from hpc_imagenet.data.tar.tar_scan import Array
from hpc_imagenet.datastore.file_hash import NEW_HASH, hash_bytes, hash_file
from hpc_imagenet.datastore.index import Index, write_index
from hpc_imagenet.datastore.manifest import FILE, ClassNames, File, Manifest, Split
from hpc_imagenet.io import disk
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.runs.attempt import now
from hpc_imagenet.runs.store import Progress, Run


@dataclass(frozen=True)
class _Images:
    """The images of the dataset by split, and the shards that contain them."""

    shards: tuple[File, ...]
    splits: dict[str, Index]
    facts: dict[str, Array]
    names: dict[str, Array]
    skipped: list[str]
    tools: dict[str, str]


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Make the dataset of `config.dataset`, or one part of it, from its archives in the workspace.

    Returns:
        numbers of images: `images` in total, in each split (`train`, `val` …) and `skipped` as corrupt; and
        `classes`. For a part: only the number of its `images`.

    Raises:
        UserError: an archive is missing or damaged, or the archives do not match each other; an image is
            corrupt, or all of a class or of a split; not enough free space; parts are missing.
    """
    if not dist_env.is_rank_zero:
        return {}
    workspace, stage = Path(config.workspace), config.stage
    folder = workspace / "datasets" / config.dataset.name
    workers = config.process.workers or available_cpus(dist_env)
    progress = Progress(run)
    with disk.explain_disk_full(folder):
        scanned = load_or_scan(
            config,
            folder,
            stage.parts > 1,
            workers,
            lambda done, total: progress(done, total, "archives", "index"),
        )
        prepare_folder(folder)

        def report_images(done: int, total: int) -> None:
            progress(done, total, "images", config.process.layout)

        if stage.part is not None:
            images = _run_part(config, folder, scanned, stage.part, stage.parts, workers, report_images)
            return {"images": images}
        if stage.parts == 1:
            _run_part(config, folder, scanned, 0, 1, workers, report_images)
        return _commit(config, folder, scanned)


def _run_part(
    config: Config,
    folder: Path,
    scanned: ScannedArchives,
    part: int,
    parts: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> int:
    """Write the shards or class folders of one part; return its number of images."""
    if config.process.layout == "shards":
        plan = shard_writer.plan_shards(folder, scanned, config.process)
        # Consecutive shards, so that a part reads one contiguous range of the archive.
        begin, end = (len(plan.shards) * n // parts for n in (part, part + 1))
        return shard_writer.write_shards(plan, plan.shards[begin:end], workers, progress)
    if config.process.layout == "folders":
        return class_folder_writer.write_class_folders(
            folder, scanned, _identity(config, scanned), part, parts, workers, progress
        )
    return 0


def _identity(config: Config, scanned: ScannedArchives) -> dict[str, Any]:
    """Return the JSON value that identifies the images of the class folders."""
    return {"archives": scanned.md5s(), **config.process.identity()}


def _commit(config: Config, folder: Path, scanned: ScannedArchives) -> dict[str, Any]:
    """Write the indexes, meta.bin, the certificate and finally the manifest."""
    images = _images(config, folder, scanned)
    wnids = list(scanned.devkit.names)
    require_images(scanned.archives["train"].parent, scanned.scan.splits, images.splits, wnids)
    meta = meta_bin.encode_meta_bin(scanned.devkit.names, _val_wnids(scanned, images))
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # two jobs at once would mix their files
        # Without a manifest it is not a dataset. Errors in the archives were found before this point.
        (folder / FILE).unlink(missing_ok=True)
        for leftover in folder.glob(".*.tmp"):  # of a killed attempt
            leftover.unlink()
        splits = {split: _write_split(folder, split, entries) for split, entries in images.splits.items()}
        files = [_write(folder / meta_bin.FILE, meta)]
        if config.process.layout == "folders":
            class_folder_writer.finalize_class_folders(folder, scanned, _identity(config, scanned), meta)
        elif old := class_folder_writer.splits_of_other_archives(folder, scanned.md5s().values()):
            print(
                f"warning: {', '.join(old)} in {folder} are class folders of earlier archives; remove "
                "them, or make them again with process.layout=folders",
                flush=True,
            )
        manifest = _build_manifest(config, scanned, images, splits, files, folder)
        files += _write_certificate(folder, manifest, images, scanned.devkit.labels)
        scanned.require_unchanged()
        remove_shared_scan(folder)
        _build_manifest(config, scanned, images, splits, files, folder).save(folder)
    counts = {split: split_info.images for split, split_info in splits.items()}
    return {
        "images": sum(counts.values()),
        **counts,
        "classes": len(scanned.devkit.names),
        "skipped": len(images.skipped),
    }


def _images(config: Config, folder: Path, scanned: ScannedArchives) -> _Images:
    found = scanned.scan
    if config.process.layout == "shards":
        plan = shard_writer.plan_shards(folder, scanned, config.process)
        contents = shard_writer.combine_receipts(plan)
        return _Images(
            contents.shards,
            contents.splits,
            contents.facts,
            contents.names,
            scanned.skipped + contents.skipped,
            plan.tools,
        )
    archives = tuple(
        File(
            _relative(scanned.archives[split], folder),
            scanned.receipts[split].bytes,
            f"md5:{scanned.receipts[split].md5}",
        )
        for split in found.splits  # in the order of their shard numbers
    )
    return _Images(archives, found.splits, found.facts, found.names, scanned.skipped, {})


def _val_wnids(scanned: ScannedArchives, images: _Images) -> list[str]:
    """Return the wnid of each val image of the dataset, in file name order."""
    if not images.skipped:
        return scanned.devkit.val_wnids
    wnids = list(scanned.devkit.names)
    names, entries = images.names.get("val"), images.splits.get("val")
    if names is None or entries is None:
        return []
    return [wnids[label] for _, label in sorted(zip(names.tolist(), entries["label"].tolist(), strict=True))]


def _write_split(folder: Path, split: str, entries: Index) -> Split:
    path = folder / f"{split}.npy"
    write_index(path, entries)
    size = path.stat().st_size
    written = File(path.name, size, hash_file(path, File(path.name, size, NEW_HASH), lambda done: None))
    return Split(written, len(entries))


def _write(path: Path, data: bytes) -> File:
    with atomic_write(path) as file:
        file.write(data)
    return _file(path, data)


def _write_certificate(
    folder: Path, manifest: Manifest, images: _Images, labels: LabelsFile | None
) -> list[File]:
    """Write the certificate of the files that the manifest lists."""
    content = certificate.build_certificate(
        name=manifest.name,
        content=manifest.content,
        classes=manifest.classes,
        splits=images.splits,
        facts=images.facts,
        names=images.names,
        files=manifest.all_files(),
        skipped=images.skipped,
        provenance={**manifest.provenance, **({"folder": labels.describe()} if labels else {})},
        tools=images.tools,
    )
    page = certificate.render_page(content, manifest.classes)
    return [
        _write(folder / certificate.JSON, (json.dumps(content, indent=1) + "\n").encode()),
        _write(folder / certificate.PAGE, page.encode("utf-8", "backslashreplace")),
    ]


def _build_manifest(
    config: Config,
    scanned: ScannedArchives,
    images: _Images,
    splits: dict[str, Split],
    files: Sequence[File],
    folder: Path,
) -> Manifest:
    md5s = {scanned.archives[split].name: receipt.md5 for split, receipt in scanned.receipts.items()}
    fallback = hashlib.sha256(" ".join([*md5s.values(), *_image_settings(config)]).encode()).hexdigest()[:12]
    return Manifest(
        name=config.dataset.name,
        content=config.datastore.content or fallback,
        created=now(),
        classes=tuple(ClassNames(wnid, names) for wnid, names in scanned.devkit.names.items()),
        shards=images.shards,
        splits=splits,
        files=tuple(files),
        provenance={
            "source": scanned.receipts["train"].source,
            "archives": md5s,
            "layout": config.process.layout,
            "process": config.process.identity(),
            "check": config.process.check,
            "version": __version__,
        },
    )


def _image_settings(config: Config) -> list[str]:
    changed = config.process.image_identity()
    return [json.dumps(changed, sort_keys=True)] if changed else []


def _file(path: Path, data: bytes) -> File:
    return File(path.name, len(data), hash_bytes(data))


def _relative(path: Path, folder: Path) -> str:
    # Resolve the folders: `..` after a symbolic link leads elsewhere. The archive itself may be a link.
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())
