"""The files of a study, which its workers share; each is written once, or by the worker that has the trial.

    runs/.search-<uid>/<name>/      of one user; the others of a group's workspace read it
        study.json                  what is searched: algorithm, space, data; written once
        targets/<trials>.json       trials that a command has requested; the largest holds
        budget.json                 GPU-hours; that of the last command with one holds
        journal.log                 Optuna's journal (study.py)
        claims/<trial>.<rung>.<n>.json   the n-th worker that has the trial; written once
        trials/<trial>.<rung>.json  settings, run, accuracies and state of a trial (`TrialRecord`)
        importance.json             share of each setting in the accuracy

No clock decides anything: a claim is created with link(2), of which exactly one succeeds, and whether its
worker still exists is what the worker's own record or Slurm says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hpc_imagenet.io.atomic_files import read_json, write_json, write_json_once
from hpc_imagenet.io.ownership import make_own_folder
from hpc_imagenet.runs.attempt import FAILED, FINISHED, PRUNED, is_number, read_record
from hpc_imagenet.runs.store import RunStore, folder_of_user

EXECUTOR = "search"  # of the attempts of trials
RUNNING, SKIPPED = "running", "skipped"
ENDED = (FINISHED, PRUNED, FAILED, SKIPPED)
MOST_OWNERS = 3  # workers that may lose a trial before it counts as failed


@dataclass
class TrialRecord:
    """A trial: one drawn set of values, at one rung of a `halving` search (else 0).

    Attributes:
        trial: its number in the study, from 0.
        values: the drawn values as text, by setting.
        run: id of the run that trains it.
        state: running, finished, pruned, failed, or skipped (another job trains the same run).
        top1: last validation accuracy, 0 to 1.
        accuracies: accuracy after each epoch that was validated, by epoch.
        hours: GPU-hours of the search; without GPUs process-hours.
        number: number of the trial in Optuna's study; None for later rungs.
        pruned_at: epoch after which the study prunes it, from before its state is `pruned`; else None.
    """

    trial: int
    rung: int = 0
    values: dict[str, str] = field(default_factory=dict)
    run: str = ""
    state: str = RUNNING
    reason: str = ""
    top1: float | None = None
    epochs: int | None = None
    accuracies: dict[str, float] = field(default_factory=dict)
    hours: float = 0.0
    reused: bool = False
    worker: str = ""
    number: int | None = None
    pruned_at: int | None = None

    @property
    def ended(self) -> bool:
        """Whether no worker has to train it any more."""
        return self.state in ENDED


_KEYS = tuple(each.name for each in fields(TrialRecord))


@dataclass(frozen=True)
class Claim:
    """A trial that a worker has, or had."""

    trial: int
    rung: int
    owner: int  # how many workers had it before
    worker: str  # id of the worker's run


class StudyFiles:
    """The files of one study.

    Args:
        store: runs of the workspace.
        name: name of the study.
        folder: its folder; None: that of this user.
    """

    def __init__(self, store: RunStore, name: str, folder: Path | None = None) -> None:
        self.name = name
        self.folder = folder or folder_of_user(store.folder, "search") / name

    @property
    def definition(self) -> dict[str, Any]:
        """The content of study.json; empty if no command has created the study."""
        return read_record(self.folder / "study.json")

    def create(self, definition: dict[str, Any], trials: int, budget: float | None) -> None:
        """Create the study, or continue it with more trials and another budget, if there is one.

        Raises:
            UserError: another user could write the folder of this user's studies.
        """
        self.folder.parents[1].mkdir(parents=True, exist_ok=True)
        make_own_folder(self.folder.parent)
        for folder in ("targets", "claims", "trials"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        write_json_once(self.folder / "study.json", definition)
        write_json_once(self.folder / f"targets/{trials}.json", {})
        if budget is not None and budget != self.budget:
            write_json(self.folder / "budget.json", budget)

    @property
    def target(self) -> int:
        """Number of trials of the study: the most that a command has requested."""
        found = (self.folder / "targets").glob("*.json")
        return max((int(path.stem) for path in found if path.stem.isdigit()), default=0)

    @property
    def budget(self) -> float | None:
        """GPU-hours after which no trial begins; None: unlimited."""
        value = read_json(self.folder / "budget.json")
        return float(value) if isinstance(value, (int, float)) else None

    def budget_after(self, given: float | None) -> float | None:
        """Return the budget of the study after a command with this `search.budget`: without one it stays."""
        return self.budget if given is None else given

    @property
    def hours(self) -> float:
        """GPU-hours of all trials so far; without GPUs process-hours."""
        return sum(each.hours for each in self.records())

    def records(self) -> list[TrialRecord]:
        """Return all trials that have begun, by number and rung."""
        found = []
        for path in (self.folder / "trials").glob("*.json"):
            raw = read_record(path)
            if not all(isinstance(number, int) for number in (raw.get("trial"), raw.get("rung", 0))):
                continue  # damaged
            record = TrialRecord(**{key: raw[key] for key in _KEYS if key in raw})
            record.values, accuracies = _mapping(record.values), _mapping(record.accuracies)
            record.accuracies = {epoch: top1 for epoch, top1 in accuracies.items() if is_number(top1)}
            record.top1 = record.top1 if is_number(record.top1) else None
            record.hours = record.hours if is_number(record.hours) else 0.0
            found.append(record)
        return sorted(found, key=lambda record: (record.trial, record.rung))

    def record(self, trial: int, rung: int) -> TrialRecord | None:
        """Return one trial; None before it has begun."""
        return next((each for each in self.records() if (each.trial, each.rung) == (trial, rung)), None)

    def write(self, record: TrialRecord) -> None:
        """Write a trial."""
        write_json(self.folder / f"trials/{record.trial}.{record.rung}.json", asdict(record))

    def claim(self, trial: int, rung: int, owner: int, worker: str) -> Claim | None:
        """Claim a trial for a worker; None if another one was first."""
        path = self.folder / f"claims/{trial}.{rung}.{owner}.json"
        if path.exists() or not write_json_once(path, {"worker": worker}):
            return None
        return Claim(trial, rung, owner, worker)

    def claims(self) -> list[Claim]:
        """Return the newest claim of each trial, in their order."""
        newest: dict[tuple[int, int], int] = {}
        for path in (self.folder / "claims").glob("*.json"):
            trial, rung, owner = map(int, path.stem.split("."))
            newest[trial, rung] = max(owner, newest.get((trial, rung), 0))
        found = []
        for (trial, rung), owner in sorted(newest.items()):
            record = read_record(self.folder / f"claims/{trial}.{rung}.{owner}.json")
            found.append(Claim(trial, rung, owner, str(record.get("worker"))))
        return found

    @property
    def importance(self) -> dict[str, float]:
        """Share of each setting in the accuracy of the trials; empty before it is known."""
        return read_record(self.folder / "importance.json")

    def write_importance(self, importance: dict[str, float]) -> None:
        """Write the importance of the settings."""
        write_json(self.folder / "importance.json", importance)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def studies(store: RunStore) -> Iterator[StudyFiles]:
    """Yield the studies of a workspace, of all users, in the order of their names."""
    for path in sorted(store.folder.glob(".search-*/*/study.json"), key=lambda path: path.parent.name):
        yield StudyFiles(store, path.parent.name, path.parent)


def best(records: list[TrialRecord]) -> TrialRecord | None:
    """Return the trained trial of the highest accuracy, of the highest rung; None if there is none."""
    trained = [each for each in records if each.state == FINISHED and each.top1 is not None]
    return max(trained, key=lambda each: (each.rung, each.top1 or 0), default=None)
