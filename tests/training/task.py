"""One rank of a training, as a process: STORE RUN [rank, size, port, {what happens to it}]."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.strategies import DDPStrategy
from tiny_training import tiny_config

from hpc_imagenet.datastore.store import Store
from hpc_imagenet.errors import Interrupted, Lost
from hpc_imagenet.runs import Run
from hpc_imagenet.training import boundary
from hpc_imagenet.training.boundary import Boundary
from hpc_imagenet.training.fit import fit
from hpc_imagenet.world import World


def main(store: str, folder: str, place: str) -> None:
    rank, size, port, setting = json.loads(place)
    config = tiny_config()
    if "dropout" in setting:
        config.model.options = {"dropout": setting["dropout"]}
    if "model" in setting:
        config.model.name = setting["model"]
    for name, value in setting.get("recipe", {}).items():
        setattr(config.recipe, name, value)
    if "accumulate" in setting:
        config.train.accumulate = setting["accumulate"]
    if setting.get("save_every_step"):
        config.train.checkpoint_every_minutes = 1e-9
    original = Boundary.on_train_batch_end

    def eventful(self: Boundary, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == setting.get("signal_at") and rank == setting["signal_rank"]:
            os.kill(os.getpid(), signal.SIGUSR2)
        original(self, trainer, *rest)
        if trainer.global_step == setting.get("die_at") and rank == setting.get("die_rank", 0):
            os.kill(os.getpid(), signal.SIGKILL)

    Boundary.on_train_batch_end = eventful  # type: ignore[method-assign]
    if setting.get("stuck"):  # as where a GPU waits for a rank that is gone
        boundary.FAREWELL = 0.5
        DDPStrategy.teardown = lambda self: time.sleep(600)  # type: ignore[method-assign]
    try:
        result = fit(config, Store(Path(store)), Run(Path(folder)), World(rank, size, rank, size, port=port))
    except Interrupted as stopped:
        result = {"interrupted": int(str(stopped).split("step ")[1].split(",")[0])}
    except Lost as lost:
        result = {"lost": str(lost)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
