"""Stage `train`: train a backbone on a datastore; see `hpc_imagenet.training.fit`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.datastore.open_dataset import open_dataset
from hpc_imagenet.datastore.versions import open_version
from hpc_imagenet.runs.checkpoints import INITIAL
from hpc_imagenet.runs.store import Run


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Train, or resume a training, and return its metrics: top1, images_per_second and more.

    Raises:
        UserError: bad input.
        Preempted: a stop signal arrived; a checkpoint is saved.
        PeerLost: another task of the job has ended.
    """
    # Spinning OpenMP threads make a CPU training many times slower on a machine that is also used otherwise.
    # torch reads the variable when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hpc_imagenet.training.fit import fit

    version = open_version(config.datastore)
    cluster, stages = cluster_for(config, "train"), dist_env.local_rank == 0
    with open_dataset(version, cluster, stages, splits=("train", "val")) as store:
        return fit(_with_initial_weights(config, run), store, run, dist_env)


def _with_initial_weights(config: Config, run: Run) -> Config:
    """Return the config with the run's own link to the checkpoint of a warm start."""
    kept = run.folder / INITIAL
    if config.model.weights_run is None or not kept.exists():
        return config
    return replace(config, model=replace(config.model, weights=str(kept)))
