"""How the settings of trainings differ: the value that most of them have, and what each has instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hpc_imagenet.report.show.config_leaves import config_leaves

# Settings of other stages, and settings that decide nothing about a training.
_LEFT_OUT = (
    *(
        "workspace",
        "wait",
        "dry_run",
        "price",
        "sweep",
        "stage.",
        "download.",
        "process.",
        "upload.",
        "session.",
        "search.",
    ),
    *("dataset.archives", "dataset.make", "dataset.hint", "datastore.version", "datastore.content"),
)


def flatten(frozen: dict[str, Any]) -> dict[str, str]:
    """Return the settings of a frozen config that concern a training: full name and value as text."""
    return {name: value for name, value in config_leaves(frozen) if not name.startswith(_LEFT_OUT)}


def split_shared(configs: Sequence[dict[str, str]]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the most frequent value of each setting, and for each config the values that differ from it.

    A setting that a config does not have, since another version of this package wrote it, is "not set" there.
    """
    names = sorted({name for config in configs for name in config})
    shared = {}
    for name in names:
        counts = Counter(config.get(name, "not set") for config in configs)
        shared[name] = counts.most_common(1)[0][0]
    differences = [
        {name: value for name in names if (value := config.get(name, "not set")) != shared[name]}
        for config in configs
    ]
    return shared, differences
