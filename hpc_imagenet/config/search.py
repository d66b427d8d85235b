"""Settings of a search: which trials it draws, how many, and when it stops; `+search=asha` selects one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpc_imagenet.config.setting import setting

# Settings that decide nothing about results, so they are not in the names of sweeps and studies.
ASIDE = ("cluster", "workspace", "wait", "dry_run", "price", "hydra")
ALGORITHMS = ("asha", "median", "tpe", "halving")
REDUCTION = 3  # one trial in three goes on at a rung, to three times the epochs


@dataclass
class Search:
    """A search over the values that a command line gives in Hydra's sweep grammar.

    `worker`, `space` and `choices` are filled by `search_space.py`.
    """

    algorithm: str | None = setting(None, "how trials are drawn and pruned; +search=NAME", choices=ALGORITHMS)
    name: str | None = setting(None, "name of the study; null: made from the algorithm and its settings")
    trials: int = setting(32, "trials of the study; the same command with more continues it", minimum=1)
    parallel: int = setting(4, "workers, each of which trains one trial after another", minimum=1)
    seed: int = setting(0, "seed of what is drawn", minimum=0, maximum=2**32 - 1)
    budget: float | None = setting(
        None,
        "GPU-hours after which no trial begins (without GPUs: process-hours); null: that of the study, or "
        "unlimited",
        above=0,
    )
    worker: int = setting(0, "number of the worker, from 1; set by composition")
    space: dict[str, dict[str, Any]] = setting(factory=dict, meaning="what is drawn; set by composition")
    choices: dict[str, str] = setting(
        factory=dict, meaning="model and recipe by the drawn files of conf/, as JSON; set by composition"
    )
