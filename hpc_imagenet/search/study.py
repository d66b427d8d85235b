"""The study of a search in Optuna: what is drawn next, and whether a trial is pruned.

All workers open the same journal, a file in the workspace that needs no server. Its lock is a file created
with O_EXCL, which is safe on NFS from version 3 on: JournalFileOpenLock in
https://optuna.readthedocs.io/en/stable/reference/storages.html. The lock of a process that has died is
released after 30 s on the waiting process's own clock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from hpc_imagenet.config.search import REDUCTION
from hpc_imagenet.search.rungs import rung_epochs
from hpc_imagenet.search.study_files import StudyFiles

_STARTUP = 10  # trials that are drawn at random, before the estimator draws near the best
_MEDIAN_STARTUP = 5  # trials that have trained to their end, before one is compared with their median

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class WholeLinesBackend(JournalFileBackend):  # type: ignore[misc] # mypy skips optuna
    """Optuna's journal file, from which a line that could not be written whole is removed.

    On a full disk a part of a line would stay and make every later one unreadable.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append the lines, all or none, and flush them to disk."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self._lock.acquire()
        try:
            with open(self._file_path, "r+b", buffering=0) as file:  # noqa: PTH123 - a str of Optuna's
                size = _whole_size(file)
                try:
                    file.seek(size)
                    if file.write(text) != len(text):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file_path)
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
        finally:
            self._lock.release()


def _whole_size(file: Any) -> int:
    """Return the size of a file up to its last line feed; a process may have been killed within a line."""
    size = int(file.seek(0, os.SEEK_END))
    end = size
    while end:
        begin = max(0, end - 4096)
        file.seek(begin)
        block = file.read(end - begin)
        if b"\n" in block:
            return int(begin + block.rindex(b"\n") + 1)
        end = begin
    return 0


class SearchStudy:
    """A study in its journal.

    Args:
        files: files of the study, which a command has created.
    """

    def __init__(self, files: StudyFiles) -> None:
        definition = files.definition
        self._files, self._seed = files, int(definition["seed"])
        self._space = {name: _distribution(each) for name, each in definition["space"].items()}
        journal = str(files.folder / "journal.log")
        storage = JournalStorage(WholeLinesBackend(journal, JournalFileOpenLock(journal)))
        rungs = rung_epochs(definition["epochs"], definition["warmup"])
        # Optuna's further rung would be after 15 of 16 epochs, where the rungs are [5, 16]: it is not used.
        is_asha = definition["algorithm"] == "asha"
        self._prune_before = rungs[0] * REDUCTION ** (len(rungs) - 1) if is_asha else rungs[-1]
        self._study = optuna.create_study(
            storage=storage,
            study_name=files.name,
            direction="maximize",
            pruner=pruner(definition["algorithm"], rungs[0]),
            load_if_exists=True,
        )

    def draw(self, trial: int) -> tuple[int, dict[str, Any]]:
        """Draw the values of a trial.

        Args:
            trial: its number in the search. With the seed and the trials so far it decides what is drawn,
                whichever worker draws.

        Returns:
            Number of the trial in Optuna's study, and the value of each dimension.
        """
        digest = hashlib.sha256(f"{self._seed}.{trial}".encode()).digest()
        self._study.sampler = optuna.samplers.TPESampler(
            seed=int.from_bytes(digest[:4], "big"), n_startup_trials=_STARTUP, constant_liar=True
        )
        drawn = self._study.ask(self._space)
        return drawn.number, drawn.params

    def report(self, number: int, epoch: int, top1: float) -> bool:
        """Report a validation; return whether the trial is to be pruned."""
        trial_id, recorded = self._recorded(number)
        trial = optuna.trial.Trial(self._study, trial_id)
        if epoch not in recorded.intermediate_values:
            trial.report(top1, epoch)
        return epoch < self._prune_before and bool(trial.should_prune())

    def end(self, number: int, top1: float | None, pruned: bool = False) -> None:
        """Record the end of a trial; without an accuracy it has failed. Nothing if it has ended before."""
        if self._recorded(number)[1].state.is_finished():
            return
        if top1 is None:
            self._study.tell(number, state=TrialState.FAIL)
        elif pruned:
            self._study.tell(number, state=TrialState.PRUNED)
        else:
            self._study.tell(number, top1)

    def importance(self) -> dict[str, float]:
        """Return the share of each setting in whether a trial is among the best, by PED-ANOVA; may be empty.

        https://arxiv.org/abs/2304.10255
        """
        done = [each for each in self._study.trials if each.state is TrialState.COMPLETE]
        if len(done) < 4 or len(self._space) < 2 or len({each.value for each in done}) < 2:
            return {}
        try:
            found = get_param_importances(self._study, evaluator=PedAnovaImportanceEvaluator())
        except (RuntimeError, ValueError):  # such as too few trials that differ
            return {}
        return {name: round(float(value), 4) for name, value in found.items() if value == value}

    def _recorded(self, number: int) -> tuple[int, optuna.trial.FrozenTrial]:
        storage = self._study._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
        return trial_id, storage.get_trial(trial_id)


def _distribution(dimension: dict[str, Any]) -> BaseDistribution:
    if "choices" in dimension:
        return CategoricalDistribution(dimension["choices"])
    kind = IntDistribution if dimension["whole"] else FloatDistribution
    return kind(dimension["low"], dimension["high"], log=dimension["log"])


def pruner(algorithm: str, rung: int) -> optuna.pruners.BasePruner:
    """Return what decides which trials of an algorithm are pruned, from the epochs of the first rung on."""
    if algorithm == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=rung, reduction_factor=REDUCTION)
    if algorithm == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=_MEDIAN_STARTUP, n_warmup_steps=rung, n_min_trials=_MEDIAN_STARTUP
        )
    return optuna.pruners.NopPruner()
