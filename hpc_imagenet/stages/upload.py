"""Upload: a processed dataset becomes the next version of a datastore.

Shards, indexes and further files first, the manifest last: a version is seen when it is whole. The same
content is never uploaded twice, and what was cut off goes on where it was. `upload.tasks` jobs share the
files, and one more sees that all are there and writes the manifest.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hpc_imagenet import __version__
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore import hardlink_check, versions
from hpc_imagenet.datastore.backends import storage_backend
from hpc_imagenet.datastore.manifest import FILE, File, Manifest, Split, load_manifest
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.runs import store
from hpc_imagenet.runs.store import Run


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Bring `workspace/datasets/<dataset.name>/`, or one part of it, into the datastore.

    Returns:
        version: the number; datastore: `name@vN`; images and bytes of the version, of a part only its bytes;
        copied (or sent), linked, reused and kept: bytes that were written, that are shared with the archives
        by hard links, that an older version had, and that were there already. Only the first process of a
        job does this; the others return nothing.

    Raises:
        UserError: the input is missing or has changed, the version is taken, there is no room, or the place
            cannot be reached.
    """
    if not dist_env.is_rank_zero:
        return {}
    source = Path(config.workspace) / "datasets" / config.dataset.name
    manifest, written = _processed(source, config)
    progress = store.Progress(run)
    place = versions.open_backend(config.datastore.url, config.upload.connections)
    with storage_backend.explain_os_errors("datastore.url", place.url):
        note = {"run": run.id, "host": socket.gethostname(), "time": store.now()}
        claim = versions.claim_version(place, config.datastore, manifest.content, note)
        sent, part = storage_backend.UploadStats(), config.stage.part
        if not claim.complete:
            with place.lock(
                f"{claim.path}/{_lock(config)}",
                lambda: progress(0, None, note="another upload of the same images is at work"),
            ):
                sent = _fill(claim, source, manifest, written, config, run, progress)
        result = {"version": claim.number, "datastore": f"{claim.name}@v{claim.number}"}
        if part is not None:
            return {**result, "bytes": sent.total, **_by(sent)}
        claim.settle()
        done = claim.manifest()
    progress(done.bytes, done.bytes, "bytes")
    sent.kept = done.bytes - sent.copied - sent.linked - sent.reused
    return {**result, "images": done.images, "bytes": done.bytes, **_by(sent)}


def _by(sent: storage_backend.UploadStats) -> dict[str, int]:
    return dataclasses.asdict(sent)


def _lock(config: Config) -> str:
    """Return the file by which uploads of the same files take turns; parts have no file in common."""
    if config.stage.part is None:
        return versions.LOCK
    return f"upload-{config.stage.part}-of-{config.stage.parts}.lock"


def _processed(source: Path, config: Config) -> tuple[Manifest, float]:
    """Return the manifest and when it was written, s since 1970."""
    try:
        written = (source / FILE).stat().st_mtime
        manifest = load_manifest(source)
    except FileNotFoundError:
        raise UserError(f"{source} holds no processed dataset: +stage=process makes it") from None
    wanted = config.datastore.content
    if wanted not in (None, manifest.content):
        raise UserError(
            f"{source} holds content {manifest.content}, but datastore.content={wanted} is asked for: "
            "+stage=process makes it"
        )
    return manifest, written


def _fill(
    claim: versions.VersionClaim,
    source: Path,
    manifest: Manifest,
    written: float,
    config: Config,
    run: Run,
    progress: store.Progress,
) -> storage_backend.UploadStats:
    if claim.complete:  # by whoever had the turn before
        return storage_backend.UploadStats()
    target, stage = placed(manifest), config.stage
    pieces = [
        storage_backend.UploadFile(source / old.path, new, link=number < len(manifest.shards))
        for number, (old, new) in enumerate(zip(manifest.all_files(), target.all_files(), strict=True))
    ]
    proved = claim.vouched()
    vouched = [file.path for file in target.all_files() if proved.get(file.path) == file.hash]
    known = storage_backend.Reusable(
        written, versions.existing_files(claim.backend, claim.name), frozenset(vouched)
    )
    if stage.part is not None:
        pieces = part_of(pieces, stage.part, stage.parts)
    total = sum(piece.file.bytes for piece in pieces)
    sent = claim.backend.send(
        pieces, claim.path, known, lambda done, note: progress(done, total, "bytes", note)
    )
    if stage.part is not None:
        claim.vouch(f"{stage.part}-of-{stage.parts}", {piece.file.path: piece.file for piece in pieces})
        progress(total, total, "bytes")
        return sent
    details: dict[str, Any] = {
        "version": claim.number,
        "time": store.now(),
        "run": run.id,
        "dataset": config.dataset.name,
        "package": __version__,
    }
    if claim.backend.folder is not None:
        details[hardlink_check.STAMPS] = hardlink_check.link_times(
            claim.backend.folder / claim.path, target.shards
        )
    claim.commit(
        dataclasses.replace(
            target,
            name=claim.name,
            created=store.now(),
            provenance={**manifest.provenance, "upload": details},
        )
    )
    return sent


def part_of(
    pieces: Sequence[storage_backend.UploadFile], part: int, parts: int
) -> list[storage_backend.UploadFile]:
    """Return the pieces of one part: all parts have about as many bytes, and each piece is of one part."""
    loads = [0] * parts
    mine = []
    for piece in sorted(pieces, key=lambda piece: -piece.file.bytes):
        least = loads.index(min(loads))
        loads[least] += piece.file.bytes
        if least == part:
            mine.append(piece)
    return mine


def placed(manifest: Manifest) -> Manifest:
    """Return the manifest with every file at its place in a datastore's version.

    Shards go to `shards/` by their file names, numbered in front where two have the same; the rest keeps its
    place in the folder. Hashes, sizes and the order of the shards, which the index counts on, stay.
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
        splits={name: Split(_inside(split.index), split.images) for name, split in manifest.splits.items()},
        files=tuple(_inside(file) for file in manifest.files),
    )


def _inside(file: File) -> File:
    path = PurePosixPath(file.path)
    inside = not path.is_absolute() and ".." not in path.parts
    return file if inside else dataclasses.replace(file, path=path.name)
