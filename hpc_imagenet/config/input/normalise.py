"""Convert settings in other notations, such as Slurm's, to the values that jobs and records use.

A config is converted once, when it is composed: a frozen config has minutes, GiB and numbers of GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from hpc_imagenet.config.input.slurm_values import gpu_type
from hpc_imagenet.config.schema import Cluster, Config
from hpc_imagenet.config.setting import parse_value, settings_of


def normalise(config: Config) -> None:
    """Convert the settings of a config that have a `parse`, in cluster.stage as well.

    Raises:
        UserError: names the first setting that cannot be converted, and the valid notations.
    """
    _set_gpu_types(config)
    for name, entry, value in settings_of(config):
        if entry.metadata.get("parse"):
            *groups, last = name.split(".")
            node: Any = config
            for group in groups:
                node = getattr(node, group)
            setattr(node, last, parse_value(name, entry, value))
    entries = {entry.name: entry for entry in fields(Cluster)}
    for stage, values in config.cluster.stage.items():
        for key in values.keys() & entries.keys():
            values[key] = parse_value(f"cluster.stage.{stage}.{key}", entries[key], values[key])
    for options in _sbatch_options(config):
        for name, value in options.items():
            if isinstance(value, list):
                options[name] = ",".join(map(str, value))


def _set_gpu_types(config: Config) -> None:
    """Set gpu_type where a number of GPUs names it. A stage that sets only a number keeps the general one."""
    cluster = config.cluster
    cluster.gpu_type = gpu_type(cluster.gpus_per_node) or cluster.gpu_type
    for values in cluster.stage.values():
        if kind := gpu_type(values.get("gpus_per_node")):
            values["gpu_type"] = kind
    if kind := gpu_type(config.session.gpus):
        cluster.stage["session"] = {**cluster.stage.get("session", {}), "gpu_type": kind}


def _sbatch_options(config: Config) -> Iterator[dict[str, Any]]:
    yield config.cluster.sbatch
    for values in config.cluster.stage.values():
        if isinstance(options := values.get("sbatch"), dict):
            yield options
