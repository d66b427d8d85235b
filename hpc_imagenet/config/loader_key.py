"""Which trainings can share a loader: those with the same images in the same order, and the same crops.

Everything else may differ: the model, and what the recipe does behind the loader (optimizer, learning rate,
weight decay, EMA, MixUp, erasing, precision …). The number of epochs may differ too: a shorter training ends
earlier.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from hpc_imagenet.config.names.backbones import timm_name
from hpc_imagenet.config.schema import Cluster, Config
from hpc_imagenet.errors import UserError

# Settings of the recipe that the loader takes.
RECIPE = (
    *("global_batch", "size", "start_size", "grow_from", "grow_to", "crop_scale", "flip"),
    *("val_resize", "val_size", "shuffle_window"),
)
PREPROCESSING = ("interpolation", "crop_pct", "crop_mode")  # of model.preprocessing; the device normalises


def loader_key(config: Config, cluster: Cluster) -> str:
    """Return a text that is equal for two trainings if they can share a loader, and a job.

    Args:
        config: config of a training.
        cluster: cluster settings of the stage.
    """
    values: dict[str, Any] = {
        "workspace": config.workspace,
        "seed": config.seed,
        "recipe": {name: getattr(config.recipe, name) for name in RECIPE},
        "accumulate": config.train.accumulate,
        "share": [config.train.share_runs, config.train.share_wait_seconds],
        "preprocessing": _preprocessing(config),
        "datastore": asdict(config.datastore),
        "loader": asdict(config.loader),
        "cluster": asdict(cluster),
    }
    return json.dumps(values, sort_keys=True)


def _preprocessing(config: Config) -> dict[str, Any]:
    """Return the filter and the crop of a model; of a timm network its name, unless all of them are set."""
    given = {name: config.model.preprocessing.get(name) for name in PREPROCESSING}
    if timm_name(config.model.name) and None in given.values():
        given["model"] = config.model.name
    return given


def check_shared_loader(config: Config, cluster: Cluster) -> None:
    """Check that a training can share its loader.

    Raises:
        UserError: it has several processes, or its images are decoded on the device.
    """
    if config.loader.decode == "gpu":
        raise UserError("train.share_loader=true decodes on CPUs, for all runs: set loader.decode=cpu")
    for name in ("nodes", "tasks_per_node"):
        value = getattr(cluster, name)
        if value is not None and value > 1:
            raise UserError(
                f"cluster.{name}={value}: with train.share_loader=true each run is one process on one node, "
                f"set cluster.{name}=1 or train.share_loader=false"
            )
