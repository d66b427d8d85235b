"""The run store: one folder per run, the only folder that both the command line and the jobs write.

    runs/<signature>-<label>/
        config.yaml        frozen at submission
        run.json           format, created, sweeps; stage, model, label, needs, processing_run (job.Job);
                           part, shares_loader
        attempts/<n>/      submitted.json, process.json (local), started.json, outcome.json, logs;
                           waiting.json while Slurm takes no more jobs of this user
        lease.json         which start of the job may write here (lease.py)
        progress.json      progress of the stage; replaced at most once a second
        …                  metrics and checkpoints of a training

The folder of a run can be written by its owner alone, whatever the umask allows: a job executes its frozen
config. In a group's workspace the others read it. `.user-<uid>/` holds what belongs to one user: the local
queue, folders of job arrays, submissions, a cache, a lock. `.search-<uid>/` has the studies of their
searches, and `.times-<uid>/` the times from which prices are computed; the others may read both.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from hpc_imagenet.config.schema import Cluster, Config, cluster_from, from_dict
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write, write_json
from hpc_imagenet.io.ownership import is_own, make_own_folder, owner_name, read_own
from hpc_imagenet.runs.attempt import Attempt, now, read_record
from hpc_imagenet.runs.lease import Lease

FORMAT = 2  # of a run folder; raised when names of its files, of their keys or of pickled classes change


Judge = Callable[[int, float], bool]
"""Takes the epochs trained and the top-1 accuracy (0 to 1); returns whether the training is to stop there."""


class Run:
    """One run and its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name
        self.lease: Lease | None = None  # held if this process runs the job
        self.judge: Judge | None = None  # of a trial of a search, if this process runs it
        self.follows = False  # whether this process has trained another trial before

    @property
    def info(self) -> dict[str, Any]:
        """The content of run.json, whose keys are above; empty if there is none, or if it is damaged."""
        return read_record(self.folder / "run.json")

    @property
    def is_mine(self) -> bool:
        """Whether this user made the run, or it does not exist yet."""
        return is_own(self.folder)

    @property
    def owner(self) -> str:
        """The name of the user who made the run."""
        return owner_name(self.folder)

    def is_readable(self) -> bool:
        """Whether this user may read its config and the records of its newest attempt."""
        try:
            attempt = self.attempt
            paths = [self.folder / "config.yaml", self.folder / "progress.json"]
            paths += [attempt.folder / f"{name}.json" for name in ("submitted", "outcome")] if attempt else []
            return all(os.access(path, os.R_OK, effective_ids=True) or not path.exists() for path in paths)
        except PermissionError:
            return False

    def check_mine(self, action: str, instead: str) -> None:
        """Raise if another user made the run, whose folder only that user can write.

        Args:
            action: such as `cancel it`, for the error.
            instead: what to do or type, for the error.

        Raises:
            UserError: names the owner.
        """
        if not self.is_mine:
            raise UserError(
                f"{self.id} belongs to {self.owner}, and only {self.owner} can {action}: {instead}"
            )

    def check_format(self) -> None:
        """Raise if another version of this package created the run, or run.json is damaged.

        Such a run must not be continued.

        Raises:
            UserError: names the run and its folder.
        """
        path = self.folder / "run.json"
        if not path.exists():
            return
        if not (info := self.info):
            raise UserError(
                f"{path} is damaged: move the folder {self.folder} away, then submit the run again, which "
                "begins anew"
            )
        if info.get("format") != FORMAT:
            raise UserError(
                f"{self.id} was made by another version of this package, so it cannot be continued: "
                f"delete the folder {self.folder}, or use another workspace="
            )

    def join_sweep(self, name: str) -> None:
        """Add the run to a sweep; it stays in those that it belongs to already, or is added to meanwhile."""
        if name in self.info.get("sweeps", ()):
            return
        with RunStore(self.folder.parents[1]).locked():
            info = self.info
            write_json(self.folder / "run.json", {**info, "sweeps": [*info.get("sweeps", ()), name]})

    def config(self) -> Config:
        """Return the frozen config."""
        return from_dict(self.frozen())

    def own_config(self) -> Config:
        """Return the frozen config, which is about to be executed.

        Raises:
            UserError: another user could have written it.
        """
        return from_dict(self._own())

    def own_cluster(self) -> Cluster:
        """Return the cluster settings of the run's stage, which are about to be executed; as `own_config`."""
        frozen = self._own()
        return cluster_from(frozen, frozen["stage"]["name"])

    def _own(self) -> dict[str, Any]:
        content = read_own(self.folder / "config.yaml", self.folder, f"{self.id} is not executed")
        return self._parse(content)

    def cluster(self) -> Cluster:
        """Return the cluster settings of the run's stage; much faster than `config`."""
        frozen = self.frozen()
        return cluster_from(frozen, frozen["stage"]["name"])

    def executor(self) -> str:
        """Return cluster.executor of the frozen config, which another version may have written.

        Raises:
            UserError: the config is missing or damaged.
        """
        try:
            return str(self.frozen()["cluster"]["executor"])
        except (TypeError, KeyError):
            raise self._damaged_config() from None

    def frozen(self) -> dict[str, Any]:
        """Return the frozen config as plain values; another version of the package may have written it.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            return self._parse((self.folder / "config.yaml").read_bytes())
        except PermissionError:
            raise
        except OSError:
            raise self._damaged_config() from None

    def readable_config(self) -> dict[str, Any]:
        """Return the frozen config as plain values; empty if it is missing or damaged."""
        with contextlib.suppress(OSError, UserError):
            return self.frozen()
        return {}

    def _parse(self, content: bytes) -> dict[str, Any]:
        try:
            values = yaml.load(content, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise self._damaged_config() from None
        if not isinstance(values, dict):
            raise self._damaged_config()
        return values

    def _damaged_config(self) -> UserError:
        return UserError(
            f"{self.id}: {self.folder / 'config.yaml'} is missing or damaged: submit the run again, which "
            "writes it anew"
        )

    def attempts(self) -> list[Attempt]:
        """Return all attempts, oldest first."""
        try:
            found = list((self.folder / "attempts").iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        numbered = [folder for folder in found if folder.name.isdigit()]  # skip files such as .nfs*
        return [Attempt(folder) for folder in sorted(numbered, key=lambda folder: int(folder.name))]

    @property
    def attempt(self) -> Attempt | None:
        """The newest attempt, whose state is the run's state, or None."""
        attempts = self.attempts()
        return attempts[-1] if attempts else None

    def new_attempt(self) -> Attempt:
        """Create the next attempt; concurrent callers get different numbers."""
        last = self.attempt
        number = last.number + 1 if last else 1
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        make_own_folder(self.folder)
        make_own_folder(self.folder / "attempts")
        while True:
            folder = self.folder / "attempts" / str(number)
            try:
                make_own_folder(folder, exist_ok=False)
            except FileExistsError:
                number += 1
            else:
                return Attempt(folder)

    @property
    def progress(self) -> dict[str, Any]:
        """The content of progress.json: done, total, unit, rate (per s), note, time, top1. Empty at first."""
        return read_record(self.folder / "progress.json")


class Progress:
    """Callback that writes the progress of a stage to progress.json, at most every `every` seconds.

    Raises:
        Superseded: from a call, if a later start of the job holds the run's lease.
    """

    def __init__(self, run: Run, every: float = 1.0) -> None:
        self._path = run.folder / "progress.json"
        self._lease = run.lease
        self._every = every
        self._last = float("-inf")
        self._begin = time.monotonic()
        self._first: float | None = None

    def __call__(
        self,
        done: float,
        total: float | None = None,
        unit: str = "",
        note: str = "",
        top1: float | None = None,
    ) -> None:
        """Record that `done` of `total` `unit` are done. The rate is the mean since the first call.

        `top1` is the best validation accuracy of a training so far, 0 to 1.
        """
        moment = time.monotonic()
        if self._first is None:
            self._first, self._begin = done, moment
        if moment - self._last < self._every and done != total:
            return
        self._last = moment
        if self._lease:
            self._lease.check()
        elapsed = moment - self._begin
        rate = (done - self._first) / elapsed if elapsed > 0 else None
        state = {"done": done, "total": total, "unit": unit, "rate": rate, "note": note, "time": now()}
        write_json(self._path, state | ({} if top1 is None else {"top1": top1}))


def attempt_of(run_folder: str, number: int) -> tuple[Run, Attempt]:
    """Return the run of a folder, and one of its attempts."""
    run = Run(Path(run_folder))
    return run, Attempt(run.folder / "attempts" / str(number))


def folder_of_user(runs: Path, kind: str) -> Path:
    """Return this user's folder of a kind (user, search, times) beside the runs: `runs/.<kind>-<uid>`."""
    return runs / f".{kind}-{os.geteuid()}"


class RunStore:
    """All runs of a workspace."""

    def __init__(self, workspace: Path) -> None:
        self.folder = workspace / "runs"
        self.left_out: dict[str, str] = {}  # owners of the runs met so far that this user may not read

    @property
    def own_folder(self) -> Path:
        """The folder of what belongs to this user alone: queue, job arrays, submissions, cache."""
        return folder_of_user(self.folder, "user")

    def make_own_folder(self, *parts: str, private: bool = False) -> Path:
        """Make `own_folder` and a folder below it, and return that.

        Raises:
            UserError: another user could write it.
        """
        folder = self.own_folder
        make_own_folder(folder)
        for part in parts:
            folder /= part
            make_own_folder(folder, private)
        return folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of this user's records that are read and written again, such as run.json."""
        from filelock import FileLock

        # In a private folder: who can open the file of a lock can hold it.
        with FileLock(self.make_own_folder("locks", private=True) / "records.lock"):
            yield

    def leave_out(self, run: Run) -> None:
        """Note that this user may not read a run."""
        try:
            self.left_out[run.id] = run.owner
        except OSError:
            self.left_out[run.id] = "another user"

    def run(self, run_id: str) -> Run:
        """Return the run of this id; its folder may not exist."""
        return Run(self.folder / run_id)

    def all(self) -> list[Run]:
        """Return all runs, oldest first, without those that this user may not read."""
        created = {}
        for run in self.unsorted():
            try:
                created[run] = str(run.info.get("created", ""))
            except PermissionError:
                self.leave_out(run)
        return sorted(created, key=lambda run: (created[run], run.id))

    def readable(self) -> list[Run]:
        """Return the runs of `all` whose config and newest records this user may read."""
        found = []
        for run in self.all():
            if run.is_readable():
                found.append(run)
            else:
                self.leave_out(run)
        return found

    def unsorted(self) -> list[Run]:
        """Return all runs in any order, without those that this user may not enter; reads no records."""
        if not self.folder.is_dir():
            return []
        names = [e.name for e in os.scandir(self.folder) if e.is_dir() and not e.name.startswith(".")]
        found = []
        for run in (Run(self.folder / name) for name in names):
            if os.access(run.folder, os.R_OK | os.X_OK, effective_ids=True) or not run.folder.exists():
                found.append(run)
            else:
                self.leave_out(run)
        return found

    def find(self, prefix: str) -> Run:
        """Return the one run whose id or label begins with `prefix`.

        Raises:
            UserError: no run or several runs match.
        """
        labels = {run: str(run.info.get("label", "")) for run in self.all()}
        found = [run for run, label in labels.items() if prefix in (run.id, label)] or [
            run for run, label in labels.items() if run.id.startswith(prefix) or label.startswith(prefix)
        ]
        if len(found) == 1:
            return found[0]
        if not found:
            raise UserError(f"no run {prefix} in {self.folder}: list them with python -m hpc_imagenet jobs")
        raise UserError(f"{prefix} matches {' and '.join(run.id for run in found)}: type more of the id")

    def create(self, run_id: str, config: dict[str, Any], info: dict[str, Any]) -> Run:
        """Create the run's folder, or replace the frozen config of an unfinished run.

        Raises:
            UserError: another user made it.
        """
        run = self.run(run_id)
        self.folder.mkdir(parents=True, exist_ok=True)
        make_own_folder(run.folder)
        with atomic_write(run.folder / "config.yaml") as file:
            file.write(yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode())
        with self.locked():
            kept = {key: value for key, value in run.info.items() if key in ("created", "sweeps")}
            write_json(run.folder / "run.json", {"format": FORMAT, **info, "created": now(), **kept})
        return run


# The C versions are several times faster; a sweep freezes a hundred configs.
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
