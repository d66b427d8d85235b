"""Opening a version where a job runs: as it lies, or with its shards coming to the node's own disk.

| where it lies | without cluster.scratch | with it |
|---|---|---|
| a folder | read from there | copied to the node; what has not come is read from there |
| a bucket | read from there, by ranges | the same |
| behind ssh | refused | copied to the node; reading waits |
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.datastore.backends.storage_backend import SupportsRangeReads
from hpc_imagenet.datastore.node_cache.cache import NodeCache
from hpc_imagenet.datastore.node_cache.copy_process import CopyProcess
from hpc_imagenet.datastore.node_cache.staging import ShardCopier, Staging
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, folder_shards
from hpc_imagenet.datastore.reader.shard_reader import ShardReader, StagedShards
from hpc_imagenet.datastore.versions import Version, check_readable
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.tempdir import NodeTempDir


@contextlib.contextmanager
def open_dataset(
    version: Version, cluster: Cluster, stages: bool, copies: ShardCopier | None = None
) -> Iterator[DatasetReader]:
    """Open a version for reading.

    Args:
        version: which one.
        cluster: its scratch and scratch_gb say whether and where copies are kept.
        stages: whether this process sees to the copies, as one of each node must.
        copies: who makes them; None: a process of its own.

    Raises:
        UserError: it cannot be read from here, or the scratch folder cannot be used.
    """
    place, manifest = version.backend, version.manifest
    check_readable(place, cluster.scratch, f"{version.name}@v{version.number}")
    with contextlib.ExitStack() as stack:
        source: ShardReader | None = None
        if version.folder is not None:
            folder = version.folder
            source = folder_shards(folder, manifest)
        else:
            temporary = NodeTempDir("indexes")
            stack.callback(temporary.close)
            folder = temporary.folder
            _indexes(version, folder)
            if isinstance(place, SupportsRangeReads):
                source = place.shards(version.path, manifest.shards)
        if not cluster.scratch:  # one that cannot be read was refused
            yield DatasetReader(folder, source)
            return
        cache = NodeCache(scratch_folder(cluster.scratch), _limit(cluster))
        staged = StagedShards(source, cache, manifest.shards)
        stack.callback(staged.close)
        if stages:
            copies = copies or CopyProcess(place.url, version.path, cache.folder)
            stack.enter_context(Staging(staged, cache, manifest.shards, copies, needed=source is None))
        yield DatasetReader(folder, staged)


def _indexes(version: Version, folder: Path) -> None:
    """Bring what is opened as files: the indexes, and the manifest."""
    for split in version.manifest.splits.values():
        path = folder / split.index.path
        path.parent.mkdir(parents=True, exist_ok=True)
        version.backend.fetch(f"{version.path}/{split.index.path}", split.index, path, lambda done: None)
    version.manifest.save(folder)


def scratch_folder(setting: str) -> Path:
    """Return the folder, with the node's own variables put in: $SLURM_TMPDIR differs from job to job."""
    path = os.path.expandvars(setting)
    if "$" in path:
        raise UserError(f"cluster.scratch={setting}: {platform.node()} has no such variable")
    return Path(path).expanduser()


def _limit(cluster: Cluster) -> int | None:
    return None if cluster.scratch_gb is None else int(cluster.scratch_gb * 1e9)
