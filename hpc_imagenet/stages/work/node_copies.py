"""Wait until every node of a job has copied a version that can be read from copies only, as over ssh.

The tasks of a training wait for each other in each step, at most for `COLLECTIVE_TIMEOUT` of
`training/distributed.py`. One node may need hours longer for its copies than another, so all of them are made
before the first step. A version in a folder or a bucket is read there meanwhile, and nothing waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.datastore.node_cache.staging import StagedShards
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import Preempted
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.runs.checkpoints import list_checkpoints
from hpc_imagenet.runs.lease import restart_count
from hpc_imagenet.runs.store import Progress, Run

FOLDER = "copied"  # in the folder of an attempt: an empty file for each node that has its copies
INTERVAL = 5.0  # s between two looks at the folder, which is on the shared file system


def wait_for_copies(store: DatasetReader, run: Run, dist_env: DistEnv) -> None:
    """Return once all nodes of a job with several tasks have their copies; every task calls this.

    Args:
        store: the dataset, opened by this task.
        run: the run; progress and the files of the nodes are in its folder.
        dist_env: rank and size of this task.

    Raises:
        UserError: this node cannot copy a shard.
        Preempted: a stop signal arrived.
        Superseded: a later start of this job holds the run's lease.
    """
    shards = store.shards
    if dist_env.size == 1 or not isinstance(shards, StagedShards) or shards.has_source:
        return
    # A resumed training keeps its progress: it says how many epochs are done, and the best accuracy.
    progress = Progress(run) if dist_env.is_rank_zero and not list_checkpoints(run.folder) else None
    total, begin = sum(shard.bytes for shard in store.manifest.shards), time.monotonic()
    with StopSignal() as stop:

        def pause(seconds: float, note: str = "copying images to this node") -> None:
            if progress:
                progress(shards.copied_bytes(), total, "B", note)
            if received := stop.wait(seconds):
                raise Preempted(f"stopped by {received.name} while images were copied to the nodes")

        shards.wait_until_complete(pause)
        if dist_env.nodes > 1:
            _wait_for_nodes(run, dist_env, pause)
        pause(0)  # a signal may have come since the last one
    run.waited = time.monotonic() - begin


def _wait_for_nodes(run: Run, dist_env: DistEnv, pause: Callable[[float, str], None]) -> None:
    folder = (run.attempt.folder if run.attempt else run.folder) / FOLDER
    folder.mkdir(exist_ok=True)
    # Files of an earlier start stay. A local job that starts again has another port; a requeued worker of a
    # search may train this trial at the port of another one before.
    start = f"{dist_env.port}.{restart_count()}-"
    if dist_env.local_rank == 0:
        (folder / f"{start}{dist_env.node}").touch()
    while missing := dist_env.nodes - len(list(folder.glob(f"{start}*"))):
        pause(INTERVAL, f"waiting for the copies of {missing} of {dist_env.nodes} nodes")
