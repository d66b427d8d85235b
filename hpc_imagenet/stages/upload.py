"""Upload: a processed dataset becomes the next version of a datastore.

Shards, indexes and further files first, the manifest last: a version is seen when it is whole. The same
content is never uploaded twice, and what was cut off goes on where it was.
"""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path, PurePosixPath
from typing import Any

from hpc_imagenet import __version__, runs
from hpc_imagenet.config import Config
from hpc_imagenet.datastore import folder, versions
from hpc_imagenet.datastore.manifest import FILE, File, Manifest, Split, load_manifest
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs import Run
from hpc_imagenet.world import World


def run(config: Config, run: Run, world: World) -> dict[str, Any]:
    """Bring `workspace/datasets/<dataset.name>/` into the datastore, and return where it is.

    Returns:
        version: the number; datastore: `name@vN`; images and bytes of the version; copied, linked and kept:
        bytes that were written, that are shared with the archives by hard links, and that were there
        already. Only the first process of a job does this; the others return nothing.

    Raises:
        UserError: the input is missing or has changed, the version is taken, or there is no room.
    """
    if not world.main:
        return {}
    source = Path(config.workspace) / "datasets" / config.dataset.name
    manifest, written = _processed(source, config)
    progress = runs.Progress(run)
    home = versions.locate(config.datastore.url) / versions.parse(config.datastore.name)[0]
    with folder.told("datastore.url", home):
        note = {"run": run.id, "host": socket.gethostname(), "time": runs.now()}
        claim = versions.claim(config.datastore, manifest.content, note)
        sent = folder.Sent()
        if not claim.complete:
            with folder.turn(
                claim.lock, lambda: progress(0, None, note="another upload of the same images is at work")
            ):
                sent = _fill(claim, source, manifest, written, config, run, progress)
        claim.settle()
        done = load_manifest(claim.folder)
    progress(done.bytes, done.bytes, "bytes")
    return {
        "version": claim.number,
        "datastore": f"{claim.name}@v{claim.number}",
        "images": done.images,
        "bytes": done.bytes,
        "copied": sent.copied,
        "linked": sent.linked,
        "kept": done.bytes - sent.copied - sent.linked,
    }


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
    claim: versions.Claim,
    source: Path,
    manifest: Manifest,
    written: float,
    config: Config,
    run: Run,
    progress: runs.Progress,
) -> folder.Sent:
    if claim.complete:  # by whoever had the turn before
        return folder.Sent()
    target = placed(manifest)
    pieces = [
        folder.Piece(source / old.path, new, link=number < len(manifest.shards))
        for number, (old, new) in enumerate(zip(manifest.all_files(), target.all_files(), strict=True))
    ]
    sent = folder.send(
        pieces, claim.folder, written, lambda done, note: progress(done, manifest.bytes, "bytes", note)
    )
    details = {
        "version": claim.number,
        "time": runs.now(),
        "run": run.id,
        "dataset": config.dataset.name,
        "package": __version__,
    }
    dataclasses.replace(
        target, name=claim.name, created=runs.now(), provenance={**manifest.provenance, "upload": details}
    ).save(claim.folder)
    return sent


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
