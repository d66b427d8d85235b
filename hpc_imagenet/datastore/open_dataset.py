"""Open a version for reading on a node, directly or through copies on the node's own disk.

| backend | without cluster.scratch | with cluster.scratch |
|---|---|---|
| folder | read in place | copied to the node; shards not copied yet are read in place |
| S3 bucket | range requests | copied to the node; shards not copied yet are read by range requests |
| ssh host | refused | copied to the node; a read waits until its shard is copied |

A job of several tasks waits for all copies of all its nodes where its first read would wait
(`stages/work/node_copies.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.datastore.backends.storage_backend import SupportsRangeReads
from hpc_imagenet.datastore.index import open_index
from hpc_imagenet.datastore.manifest import Manifest
from hpc_imagenet.datastore.node_cache.cache import NodeCache, ShardCopier
from hpc_imagenet.datastore.node_cache.copy_process import CopyProcess
from hpc_imagenet.datastore.node_cache.staging import INTERVALS, StagedShards, StagingIntervals
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, folder_shards
from hpc_imagenet.datastore.reader.shard_reader import ShardReader
from hpc_imagenet.datastore.versions import Version, check_readable
from hpc_imagenet.io.tempdir import NodeTempDir


@contextlib.contextmanager
def open_dataset(
    version: Version,
    cluster: Cluster,
    stages: bool,
    copier: ShardCopier | None = None,
    intervals: StagingIntervals = INTERVALS,
    splits: Sequence[str] | None = None,
) -> Iterator[DatasetReader]:
    """Open a version for reading.

    Args:
        version: version to open.
        cluster: settings; `scratch` and `scratch_gb` decide whether and where shards are copied.
        stages: whether this process copies the shards; true for one process per node.
        copier: copies single shards; None: a new `CopyProcess`.
        intervals: times between checks and retries of shards that are copied.
        splits: the splits that are read, so that no other shard is copied; None: all.

    Raises:
        UserError: the version cannot be read from this node, or the scratch folder cannot be used.
    """
    backend, manifest = version.backend, version.manifest
    check_readable(backend, cluster.scratch, f"{version.name}@v{version.number}")
    with contextlib.ExitStack() as stack:
        source: ShardReader | None = None
        if version.folder is not None:
            folder = version.folder
            source = folder_shards(folder, manifest)
        else:
            temporary = NodeTempDir("indexes")
            stack.callback(temporary.close)
            folder = temporary.folder
            _fetch_indexes(version, folder)
            if isinstance(backend, SupportsRangeReads):
                source = backend.shards(version.path, manifest.shards)
        if not cluster.scratch:  # check_readable has refused a version without a source
            yield DatasetReader(folder, source)
            return
        limit = None if cluster.scratch_gb is None else int(cluster.scratch_gb * 1e9)
        cache = NodeCache(cluster.scratch, limit)
        if stages:
            copier = copier or CopyProcess(backend.url, version.path, cache.folder)
        selected = None if splits is None else shards_of(folder, manifest, splits)
        staged = StagedShards(source, cache, manifest.shards, copier if stages else None, intervals, selected)
        stack.callback(staged.close)
        yield DatasetReader(folder, staged)


def shards_of(folder: Path, manifest: Manifest, splits: Sequence[str]) -> list[int]:
    """Return the numbers of the shards with images of these splits, as far as the dataset has them."""
    numbers: set[int] = set()
    for split in manifest.splits.keys() & set(splits):
        numbers.update(np.unique(open_index(folder / manifest.splits[split].index.path)["shard"]).tolist())
    return sorted(numbers)


def _fetch_indexes(version: Version, folder: Path) -> None:
    """Copy the files that must be local, the indexes and the manifest, to `folder`."""
    for split in version.manifest.splits.values():
        path = folder / split.index.path
        path.parent.mkdir(parents=True, exist_ok=True)
        version.backend.fetch(f"{version.path}/{split.index.path}", split.index, path, lambda done: None)
    version.manifest.save(folder)
