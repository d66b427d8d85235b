"""Entry point of one rank of a training in its own process."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy
from tiny_training import tiny_config

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.names import own_network
from hpc_imagenet.config.schema import Evaluate
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import PeerLost, Preempted
from hpc_imagenet.runs.checkpoints import LAST, fingerprint
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training.callbacks import checkpoint, checkpoint_file
from hpc_imagenet.training.callbacks.checkpoint import CheckpointCallback
from hpc_imagenet.training.fit import fit
from hpc_imagenet.training.score import score


def run_rank(store: Path, run: Run, dist_env: DistEnv, setting: dict[str, Any], logs: list[Path]) -> None:
    """Train, and print the result as JSON.

    Args:
        store: folder of the dataset.
        run: run of the training.
        dist_env: rank and size of this task.
        setting: changes to the config, and faults to inject.
        logs: files for stdout and stderr.
    """
    for descriptor, path in enumerate(logs, 1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    rank, config = dist_env.rank, tiny_config()
    if "dropout" in setting:
        config.model.options = {"dropout": setting["dropout"]}
    if "model" in setting:
        config.model.name = setting["model"]
        if ":" in config.model.name:
            own_network.freeze(config.model)
    for name, value in setting.get("recipe", {}).items():
        setattr(config.recipe, name, value)
    if "accumulate" in setting:
        config.train.accumulate = setting["accumulate"]
    if setting.get("save_every_step"):
        config.train.checkpoint_every_minutes = 1e-9
    original = CheckpointCallback.on_train_batch_end

    def inject_faults(self: CheckpointCallback, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == setting.get("signal_at") and rank == setting["signal_rank"]:
            os.kill(os.getpid(), signal.SIGUSR2)
        original(self, trainer, *rest)
        if trainer.global_step == setting.get("die_at") and rank == setting.get("die_rank", 0):
            os.kill(os.getpid(), signal.SIGKILL)

    CheckpointCallback.on_train_batch_end = inject_faults  # type: ignore[method-assign]
    if setting.get("stale_rank") == rank:  # as on a network file system just after another node has written
        read = checkpoint_file.read_checkpoint

        def read_stale(path: Path) -> checkpoint_file.Checkpoint:
            if path.name == LAST:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return read(path)

        checkpoint_file.read_checkpoint = read_stale
    if setting.get("stuck"):  # as if a GPU waited for a dead rank
        checkpoint.EXIT_TIMEOUT = 0.5
        DDPStrategy.teardown = lambda self: time.sleep(600)  # type: ignore[method-assign]
    try:
        if scored := setting.get("score"):
            config.evaluate = Evaluate(scored, fingerprint(Path(scored)), "val")
            result = score(config, DatasetReader(store), run, dist_env)
        else:
            result = fit(config, DatasetReader(store), run, dist_env)
    except Preempted as error:
        result = {"interrupted": int(str(error).split("step ")[1].split(",")[0])}
    except PeerLost as error:
        result = {"lost": str(error)}
    print(json.dumps(result))
