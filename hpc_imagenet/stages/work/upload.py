"""The upload stage: store a processed dataset as the next version of a datastore.

Shards, indexes and further files are written first, the manifest last: only complete versions are visible.
The same content is never uploaded twice, and an interrupted upload is resumed. With `upload.tasks` several
jobs share the files, and one more job checks that all are stored and writes the manifest.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hpc_imagenet import __version__
from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore import hardlink_check, stored_files, versions
from hpc_imagenet.datastore.backends import storage_backend
from hpc_imagenet.datastore.manifest import FILE, File, Manifest, Split, load_manifest
from hpc_imagenet.datastore.unreadable import hidden_links, warn_once
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.attempt import now
from hpc_imagenet.runs.store import Progress, Run


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Upload `workspace/datasets/<dataset.name>/`, or one part of it, to the datastore.

    Returns:
        version: the number; datastore: `name@vN`; images and bytes of the version (of a part only its bytes);
        copied, linked, reused and kept: bytes transferred, hard-linked to the archives, taken from an older
        version, and already stored. Only rank 0 uploads; other ranks return an empty dict.

    Raises:
        UserError: the input is missing or has changed, the version has other content, there is not enough
            space, or the storage cannot be reached.
    """
    if not dist_env.is_rank_zero:
        return {}
    source = Path(config.workspace) / "datasets" / config.dataset.name
    manifest, manifest_time = _load_dataset(source, config)
    progress = Progress(run)
    backend = versions.open_backend(config.datastore.url, config.upload.connections)
    with storage_backend.explain_os_errors("datastore.url", backend.url):
        owner = {"run": run.id, "host": socket.gethostname(), "time": now()}
        claim = versions.claim_version(backend, config.datastore, manifest.content, owner)
        stats, part = storage_backend.UploadStats(), config.stage.part
        if not claim.complete:
            with backend.lock(
                f"{claim.path}/{_lock_name(config)}",
                lambda: progress(0, None, note="waiting for another upload of the same images"),
            ):
                stats = _upload(claim, source, manifest, manifest_time, config, run, progress)
        result = {"version": claim.number, "datastore": f"{claim.name}@v{claim.number}"}
        if part is not None:
            return {**result, "bytes": stats.total, **dataclasses.asdict(stats)}
        claim.remove_upload_files()
        uploaded = claim.manifest()
        _require_same_images(uploaded, manifest, f"{claim.name}@v{claim.number}", config)
    progress(uploaded.bytes, uploaded.bytes, "bytes")
    stats.kept = uploaded.bytes - stats.copied - stats.linked - stats.reused
    return {**result, "images": uploaded.images, "bytes": uploaded.bytes, **dataclasses.asdict(stats)}


def _lock_name(config: Config) -> str:
    """Return the lock file shared by uploads of the same files; different parts have no file in common."""
    if config.stage.part is None:
        return versions.LOCK
    return f"upload-{config.stage.part}-of-{config.stage.parts}.lock"


def _load_dataset(source: Path, config: Config) -> tuple[Manifest, float]:
    """Return the manifest and its modification time, s since 1970."""
    try:
        manifest_time = (source / FILE).stat().st_mtime
        manifest = load_manifest(source)
    except FileNotFoundError:
        raise UserError(f"{source} has no processed dataset: run +stage=process to create it") from None
    expected = config.datastore.content
    if expected not in (None, manifest.content):
        raise UserError(
            f"{source} has content {manifest.content}, but datastore.content={expected}: "
            "run +stage=process to create it"
        )
    return manifest, manifest_time


def _require_same_images(uploaded: Manifest, manifest: Manifest, reference: str, config: Config) -> None:
    """Raise if a version with the content of this dataset was made of other archives.

    Without MD5s in the settings, the content is a hash of the settings alone.
    """
    theirs, ours = (each.provenance.get("archives") or {} for each in (uploaded, manifest))
    if any(theirs.get(file, md5) != md5 for file, md5 in ours.items()):
        archives = Path(config.workspace) / "archives" / config.dataset.name
        raise UserError(
            f"{reference} was made with the same settings, but of other images: remove {archives} and set "
            "dataset.revision=NAME, a new name, to upload these as another version"
        )


def _upload(
    claim: versions.VersionClaim,
    source: Path,
    manifest: Manifest,
    manifest_time: float,
    config: Config,
    run: Run,
    progress: Progress,
) -> storage_backend.UploadStats:
    """Upload all files, or those of one part; without parts also commit the version."""
    if claim.complete:  # by the previous holder of the lock
        return storage_backend.UploadStats()
    target, stage = version_layout(manifest), config.stage
    items = [
        storage_backend.UploadFile(source / old.path, new, link=number < len(manifest.shards))
        for number, (old, new) in enumerate(zip(manifest.all_files(), target.all_files(), strict=True))
    ]
    hashes = stored_files.verified_hashes(claim.backend, claim.path)
    verified = [file.path for file in target.all_files() if hashes.get(file.path) == file.hash]
    reusable = storage_backend.Reusable(
        manifest_time, versions.existing_files(claim.backend, claim.name), frozenset(verified)
    )
    if stage.part is not None:
        items = select_part(items, stage.part, stage.parts)
    total = sum(item.file.bytes for item in items)
    stats = claim.backend.send(
        items, claim.path, reusable, lambda done, step: progress(done, total, "bytes", step)
    )
    if stage.part is not None:
        name, files = f"{stage.part}-of-{stage.parts}", {item.file.path: item.file for item in items}
        stored_files.record_verified(claim.backend, claim.path, name, files)
        progress(total, total, "bytes")
        return stats
    details: dict[str, Any] = {
        "version": claim.number,
        "time": now(),
        "run": run.id,
        "dataset": config.dataset.name,
        "package": __version__,
    }
    if claim.backend.folder is not None:
        details[hardlink_check.STAMPS] = hardlink_check.link_times(
            claim.backend.folder / claim.path, target.shards
        )
    provenance = {**manifest.provenance, "upload": details}
    uploaded = dataclasses.replace(target, name=claim.name, created=now(), provenance=provenance)
    claim.commit(uploaded)
    if claim.backend.folder and (warning := hidden_links(claim.backend.folder / claim.path, uploaded)):
        warn_once(warning)
    return stats


def select_part(
    items: Sequence[storage_backend.UploadFile], part: int, parts: int
) -> list[storage_backend.UploadFile]:
    """Return the files of one part: each file is in exactly one part, and all parts have similar sizes."""
    sizes = [0] * parts
    selected = []
    for item in sorted(items, key=lambda item: -item.file.bytes):
        smallest = sizes.index(min(sizes))
        sizes[smallest] += item.file.bytes
        if smallest == part:
            selected.append(item)
    return selected


def version_layout(manifest: Manifest) -> Manifest:
    """Return the manifest with the files' paths in a datastore version.

    Shards go to `shards/` under their file names, with a number in front if two have the same name; other
    files keep their paths. Hashes, sizes and the order of the shards, on which the index depends, are
    unchanged.
    """
    names = [PurePosixPath(shard.path).name for shard in manifest.shards]
    if len(set(names)) < len(names):
        names = [f"{number:05d}-{name}" for number, name in enumerate(names)]
    return dataclasses.replace(
        manifest,
        shards=tuple(
            dataclasses.replace(shard, path=f"shards/{name}")
            for shard, name in zip(manifest.shards, names, strict=True)
        ),
        splits={
            name: Split(_within_folder(split.index), split.images) for name, split in manifest.splits.items()
        },
        files=tuple(_within_folder(file) for file in manifest.files),
    )


def _within_folder(file: File) -> File:
    """Return the file with its path, or with its bare name if the path leads out of the folder."""
    path = PurePosixPath(file.path)
    inside = not path.is_absolute() and ".." not in path.parts
    return file if inside else dataclasses.replace(file, path=path.name)
