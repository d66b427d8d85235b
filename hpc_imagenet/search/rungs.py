"""Rungs of a search: the epochs at which trials are compared, and which of them go on.

Every rung has `REDUCTION` times the epochs of the one before. The first one comes after the warm-up, and not
after one epoch: there accuracies say little (benchmarks/results/search.txt).
"""

from __future__ import annotations

from collections.abc import Iterator

from hpc_imagenet.config.search import REDUCTION
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.search.study_files import TrialRecord


def first_rung(epochs: int, warmup: float) -> int:
    """Return the epochs of the first rung: those of the schedule, divided as often as the warm-up allows.

    Args:
        epochs: of the schedule.
        warmup: epochs of the warm-up; less than one counts as one.
    """
    rung = epochs
    while rung // REDUCTION > max(warmup, 1):
        rung //= REDUCTION
    return rung


def rung_epochs(epochs: int, warmup: float) -> list[int]:
    """Return the epochs of each rung, the last one with those of the schedule."""
    rungs = [first_rung(epochs, warmup)]
    while rungs[-1] * REDUCTION <= epochs:
        rungs.append(rungs[-1] * REDUCTION)
    return [*rungs[:-1], epochs]


def promotable(records: list[TrialRecord], rungs: int) -> Iterator[tuple[int, int]]:
    """Yield trial and rung of each training that may begin: those among the best third of the rung below.

    This is asynchronous successive halving: a rung does not wait until the one below is complete. The highest
    rung is served first.

    Args:
        records: the trials of a `halving` search.
        rungs: number of rungs.
    """
    for rung in reversed(range(rungs - 1)):
        below = [each for each in records if each.rung == rung and each.state == FINISHED]
        below.sort(key=lambda each: (-(each.top1 or 0), each.trial))
        begun = {each.trial for each in records if each.rung == rung + 1}
        for record in below[: len(below) // REDUCTION]:
            if record.trial not in begun:
                yield record.trial, rung + 1
