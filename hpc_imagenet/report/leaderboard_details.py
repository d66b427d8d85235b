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
from hpc_imagenet.report.durations import seconds_between
from hpc_imagenet.report.published import PublishedAccuracy, published_for
from hpc_imagenet.report.show.attempt_times import intervals, running_hours
from hpc_imagenet.report.show.resources import energies_of, gpus_of, needs_slurm, requested_resources
from hpc_imagenet.report.show.validations import validation_settings
from hpc_imagenet.runs.attempt import PRUNED, RUNNING, instant
from hpc_imagenet.runs.ended_cache import EndedRunCache
from hpc_imagenet.runs.store import Run, RunStore

_LATE = 600.0  # s after the end within which other tasks of the job may still record their energy


class Details(NamedTuple):
    """What the records and the frozen config of a training or an evaluation say; None where they do not.

    Attributes:
        datastore: name of the dataset in the datastore, with its version if that is known: `name@vN`.
        content: hash of its images.
        split: of an evaluation.
        training: id of the run whose checkpoint an evaluation has judged.
        checkpoint: file name of that checkpoint.
        val_size: px, side of the centre crop of validation.
        val_resize: px, short side before that crop; None where a crop fraction replaces it.
        val_flip: whether an image and its mirror image are evaluated.
        gpu_hours: of all attempts; 0 without GPUs.
        hours: in which its attempts were running.
        kwh: of all attempts; None also if not `measured`.
        energy_of: `GPUs` or `nodes`; empty if `kwh` is unknown.
        measured: whether `kwh` is final; else `energies_of` finds it, since Slurm may know the energy.
        published: the published training that is closest.
        same_protocol: whether that is of the same protocol; never for a training that a search has pruned.
    """

    datastore: Any
    content: str | None
    seed: Any
    split: Any
    training: str | None
    checkpoint: str | None
    val_size: float | None
    val_resize: float | None
    val_flip: bool | None
    gpu_hours: float
    hours: float
    kwh: float | None
    energy_of: str
    measured: bool
    published: PublishedAccuracy | None
    same_protocol: bool | None


def read_details(run: Run, running: bool) -> Details:
    """Read the details of a training or an evaluation; Slurm is not queried.

    Args:
        run: the run.
        running: whether its newest attempt is running.

    Raises:
        PermissionError: this user may not read it.
    """
    frozen: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # a damaged config
        frozen = run.frozen()  # not config(), which takes 50 ms and may fail for old runs
    is_training = run.info.get("stage") == "train"
    attempts = run.attempts()
    requested = requested_resources(frozen)
    newest = RUNNING if running else ""
    hours = [running_hours(intervals(each, newest if each is attempts[-1] else "")) for each in attempts]
    gpus = [gpus_of(attempt, requested) for attempt in attempts]
    published, same_protocol = None, None
    # A config of another version may have other values.
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, UserError):
        published, same_protocol = (published_for(frozen) if is_training else None) or (None, None)
    if published and attempts and (outcome := attempts[-1].outcome) and outcome.state == PRUNED:
        same_protocol = False  # it was trained for fewer epochs than its config has
    measured = not any(map(needs_slurm, attempts))
    kwh, energy_of = energies_of([run])[run.id] if measured else (None, "")
    name, version = (_get(frozen, "datastore", key) for key in ("name", "version"))
    checkpoint = None if is_training else _text(frozen, "evaluate", "checkpoint")
    return Details(
        datastore=f"{str(name).partition('@')[0]}@v{version}" if name and version else name,
        content=_text(frozen, "datastore", "content"),
        seed=frozen.get("seed"),
        split="val" if is_training else _get(frozen, "evaluate", "split"),
        training=None if is_training else _text(frozen, "evaluate", "run"),
        checkpoint=checkpoint.rpartition("/")[2] if checkpoint else None,
        **validation_settings(frozen),
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
        running: ids of the runs whose newest attempt is running.
    """

    file = "leaderboard.cache"
    version = f"5 {__version__}"  # raised when `Details` or its values change; the package: what is published

    def __init__(self, store: RunStore, running: Collection[str]) -> None:
        super().__init__(store)
        self._running = running

    def read_run(self, run: Run) -> tuple[Details, bool]:
        """Read the details of a run."""
        outcome = run.attempt.outcome if run.attempt else None
        ago = seconds_between(instant(outcome.time), None) if outcome else None
        return read_details(run, run.id in self._running), (ago or 0) > _LATE

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


def _text(values: dict[str, Any], group: str, name: str) -> str | None:
    found = _get(values, group, name)
    return found if isinstance(found, str) else None
