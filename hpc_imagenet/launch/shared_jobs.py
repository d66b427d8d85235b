"""Divide submitted runs into jobs: one each, or one for the trainings that share a loader."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hpc_imagenet.config.schema import Config
from hpc_imagenet.runs.attempt import Attempt
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages import STAGES

Item = TypeVar("Item")


def group_attempts(attempts: Sequence[tuple[Run, Attempt]]) -> list[list[tuple[Run, Attempt]]]:
    """Return the attempts of each job, in the order of their first ones."""

    def settings(item: tuple[Run, Attempt]) -> tuple[Config | None, Sequence[str]]:
        info = item[0].info
        return (item[0].config() if info.get("shares_loader") else None), info.get("needs", ())

    return group_by_loader(attempts, settings)


def group_by_loader(
    items: Sequence[Item], settings: Callable[[Item], tuple[Config | None, Sequence[str]]]
) -> list[list[Item]]:
    """Return the items of each job: those that can share a loader, at most `train.share_runs`, evenly.

    Args:
        items: attempts or jobs.
        settings: returns the config of an item, None if it shares no loader, and the ids of runs it needs.
    """
    groups: dict[object, list[Item]] = {}
    most: dict[object, int] = {}
    for number, item in enumerate(items):
        config, needs = settings(item)
        loader = STAGES[config.stage.name].loader_key(config) if config else None
        key: object = number if loader is None else (loader, tuple(needs))
        groups.setdefault(key, []).append(item)
        most[key] = config.train.share_runs if config else 1
    return [part for key, group in groups.items() for part in _evenly(group, most[key])]


def shares_with(run_ids: Sequence[str], run_id: str) -> dict[str, Any]:
    """Return the other runs of a job for the submitted.json of one of them; empty for a job of one run."""
    others = [other for other in run_ids if other != run_id]
    return {"shares_with": others} if others else {}


def _evenly(group: list[Item], most: int) -> list[list[Item]]:
    """Divide a list into parts of at most `most` items, whose lengths differ by one at most."""
    count = -(-len(group) // most)
    ends = [len(group) * part // count for part in range(count + 1)]
    return [group[begin:end] for begin, end in itertools.pairwise(ends)]
