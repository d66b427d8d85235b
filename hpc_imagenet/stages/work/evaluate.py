"""Stage `evaluate`: top-1 and top-5 of a checkpoint on a split; see `hpc_imagenet.training.score`."""

from __future__ import annotations

from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.datastore.open_dataset import open_dataset
from hpc_imagenet.datastore.versions import open_version
from hpc_imagenet.runs.checkpoints import check_fingerprint
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.work.node_copies import wait_for_copies
from hpc_imagenet.training.torch_import import torch_import


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Evaluate `evaluate.checkpoint` on `evaluate.split`, and return its metrics: top1, top5 and more.

    Raises:
        UserError: bad input.
        Preempted: a stop signal arrived while images were copied to the nodes.
        PeerLost: another task of the job has ended.
    """
    check_fingerprint(config)  # before the data is fetched; `score` compares what it has read
    with torch_import():
        from hpc_imagenet.training.score import score

    version = open_version(config.datastore)
    cluster, stages = cluster_for(config, "evaluate"), dist_env.local_rank == 0
    splits = [config.evaluate.split or ""]
    with open_dataset(version, cluster, stages, splits=splits) as store:
        wait_for_copies(store, run, dist_env)
        result = score(config, store, run, dist_env)
    return {**result, "datastore": f"{version.name}@v{version.number}", "training": config.evaluate.run}
