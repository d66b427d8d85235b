"""What the leaderboard shows of a run beside its row of the jobs table, and a cache of it for ended runs.

Most of it comes from the frozen config, which takes milliseconds to parse.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection
from dataclasses import asdict
from typing import Any, NamedTuple

from hpc_imagenet import __version__
from hpc_imagenet.errors import UserError
from hpc_imagenet.report.durations import instant, seconds_between
from hpc_imagenet.report.published import PublishedAccuracy, published_for
from hpc_imagenet.report.show.attempt_times import intervals, running_hours
from hpc_imagenet.report.show.resources import energies_of, gpus_of, needs_slurm, requested_resources
from hpc_imagenet.runs.attempt import PRUNED
from hpc_imagenet.runs.ended_cache import EndedRunCache
from hpc_imagenet.runs.store import Run, RunStore

_LATE = 600.0  # s after the end within which other tasks of the job may still record their energy


class Details(NamedTuple):
    """What the records and the frozen config of a training or an evaluation say; None where they do not.

    Attributes:
        datastore: name of the dataset in the datastore.
        split: of an evaluation.
        training: id of the run whose checkpoint an evaluation has judged.
        gpu_hours: of all attempts; 0 without GPUs.
        hours: in which its attempts were running.
        kwh: of all attempts; None also if not `measured`.
        energy_of: `GPUs` or `nodes`; empty if `kwh` is unknown.
        measured: whether `kwh` is final; else `energies_of` finds it, since Slurm may know the energy.
        published: the published training that is closest.
        same_protocol: whether that is of the same protocol; never for a training that a search has pruned.
    """

    datastore: Any
    seed: Any
    split: Any
    training: Any
    gpu_hours: float
    hours: float
    kwh: float | None
    energy_of: str
    measured: bool
    published: PublishedAccuracy | None
    same_protocol: bool | None


def read_details(run: Run, active: bool) -> Details:
    """Read the details of a training or an evaluation; Slurm is not queried.

    Args:
        run: the run.
        active: whether its newest attempt is queued or running.

    Raises:
        PermissionError: this user may not read it.
    """
    frozen: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # a damaged config
        frozen = run.frozen()  # not config(), which takes 50 ms and may fail for old runs
    is_training = run.info.get("stage") == "train"
    attempts = run.attempts()
    requested = requested_resources(frozen)
    hours = [running_hours(intervals(attempt, active and attempt is attempts[-1])) for attempt in attempts]
    gpus = [gpus_of(attempt, requested) for attempt in attempts]
    published, same_protocol = None, None
    # A config of another version may have other values.
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, UserError):
        published, same_protocol = (published_for(frozen) if is_training else None) or (None, None)
    if published and attempts and (outcome := attempts[-1].outcome) and outcome.state == PRUNED:
        same_protocol = False  # it was trained for fewer epochs than its config has
    measured = not any(map(needs_slurm, attempts))
    kwh, energy_of = energies_of([run])[run.id] if measured else (None, "")
    return Details(
        datastore=_get(frozen, "datastore", "name"),
        seed=frozen.get("seed"),
        split="val" if is_training else _get(frozen, "evaluate", "split"),
        training=None if is_training else _get(frozen, "evaluate", "run"),
        gpu_hours=round(sum(map(operator.mul, gpus, hours)), 4),
        hours=round(sum(hours), 4),
        kwh=kwh,
        energy_of=energy_of,
        measured=measured,
        published=published,
        same_protocol=same_protocol,
    )


class DetailsCache(EndedRunCache[Details]):
    """The details of a workspace's trainings and evaluations.

    Args:
        store: all runs of the workspace.
        active: ids of the runs whose newest attempt is queued or running.
    """

    file = "leaderboard.cache"
    # The number is raised when `Details` or its rules change; the package holds what is published.
    version = f"4 {__version__}"

    def __init__(self, store: RunStore, active: Collection[str]) -> None:
        super().__init__(store)
        self._active = active

    def read_run(self, run: Run) -> tuple[Details, bool]:
        """Read the details of a run."""
        outcome = run.attempt.outcome if run.attempt else None
        ago = seconds_between(instant(outcome.time), None) if outcome else None
        return read_details(run, run.id in self._active), (ago or 0) > _LATE

    def encode(self, value: Details) -> list[Any]:
        """Return the fields."""
        fields = value._asdict() | {"published": value.published and asdict(value.published)}
        return list(fields.values())

    def decode(self, encoded: list[Any]) -> Details:
        """Return the details of these fields."""
        details = Details(*encoded)
        published: Any = details.published
        return details._replace(published=PublishedAccuracy(**published)) if published else details


def _get(values: dict[str, Any], group: str, name: str) -> Any:
    inner = values.get(group)
    return inner.get(name) if isinstance(inner, dict) else None
