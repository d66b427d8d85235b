"""The study in its journal: what is drawn, pruned, and kept when the disk is full or a writer is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from optuna.storages.journal import JournalFileOpenLock

from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.search.rungs import first_rung, promotable, rung_epochs
from hpc_imagenet.search.study import SearchStudy
from hpc_imagenet.search.study_files import StudyFiles, TrialRecord

SPACE = {
    "recipe.learning_rate": {"low": 0.01, "high": 1.0, "log": True, "whole": False},
    "recipe.warmup_epochs": {"low": 0, "high": 5, "log": False, "whole": True},
    "model": {"choices": ["resnet18", "resnet50"]},
}


def make_files(workspace: Path, algorithm: str = "asha", **more: Any) -> StudyFiles:
    files = StudyFiles(RunStore(workspace), "study")
    about = {"algorithm": algorithm, "seed": 0, "space": SPACE, "epochs": 9, "warmup": 1, **more}
    files.create(about, 8, None)
    return files


@pytest.mark.slow
def test_drawn_values_depend_on_seed_number_and_results_alone(tmp_path: Path) -> None:
    sequences = []
    for name in ("first", "second"):
        files, drawn = make_files(tmp_path / name), []
        for trial in range(14):
            study = SearchStudy(files)  # as after a restart of the worker
            number, values = study.draw(trial)
            study.end(number, -abs(values["recipe.learning_rate"] - 0.1))
            drawn.append(values)
        sequences.append(drawn)
    assert sequences[0] == sequences[1]
    rates = [values["recipe.learning_rate"] for values in sequences[0]]
    assert len(set(rates)) == 14
    assert all(0.01 <= rate <= 1 for rate in rates)
    assert {type(values["recipe.warmup_epochs"]) for values in sequences[0]} == {int}
    study = SearchStudy(make_files(tmp_path / "third", seed=1))
    assert study.draw(0)[1] != sequences[0][0]


def pruned_by_asha(
    tmp_path: Path, epochs: int, qualities: Sequence[Callable[[int], float]]
) -> dict[int, list[int]]:
    """Train trials one after the other; return the epochs after which they are pruned."""
    study = SearchStudy(make_files(tmp_path, epochs=epochs))
    pruned: dict[int, list[int]] = {}
    for trial, quality_after in enumerate(qualities):
        number, _ = study.draw(trial)
        for epoch in range(1, epochs):
            quality = quality_after(epoch)
            if study.report(number, epoch, quality):
                pruned.setdefault(trial, []).append(epoch)
                study.end(number, quality, pruned=True)
                break
        else:
            study.end(number, quality)
    return pruned


def test_asha_prunes_at_rungs_alone(tmp_path: Path) -> None:
    qualities = [lambda _, value=value: value for value in (0.9, 0.1, 0.2, 0.95, 0.3, 0.4)]
    assert pruned_by_asha(tmp_path, 9, qualities) == {1: [3], 2: [3], 4: [3], 5: [3]}


def test_asha_prunes_nothing_shortly_before_the_end(tmp_path: Path) -> None:
    # The rungs are [5, 16]. Three times the first one is 15, when the second trial is not the best any more.
    qualities = [lambda epoch: 0.5, lambda epoch: 0.6 if epoch < 10 else 0.1, lambda epoch: 0.1]
    assert pruned_by_asha(tmp_path, 16, qualities) == {2: [5]}


def test_median_prunes_at_the_first_rung_once_five_trials_have_accuracies_there(tmp_path: Path) -> None:
    study = SearchStudy(make_files(tmp_path, "median"))  # the rungs are [3, 9]
    for trial, quality in enumerate((0.9, 0.5, 0.5, 0.5, 0.5, 0.1)):
        number, _ = study.draw(trial)
        for epoch in range(1, 9) if trial else ():  # the first one is a run that the workspace had already
            assert not study.report(number, epoch, quality)
        study.end(number, quality)
    number, _ = study.draw(6)
    assert [study.report(number, epoch, 0.05) for epoch in (1, 2, 3)] == [False, False, True]


def test_report_is_repeated_after_a_restart(tmp_path: Path) -> None:
    files = make_files(tmp_path, "median")
    number, _ = SearchStudy(files).draw(0)
    assert SearchStudy(files).report(number, 1, 0.5) is False
    assert SearchStudy(files).report(number, 1, 0.5) is False
    SearchStudy(files).end(number, 0.5)
    SearchStudy(files).end(number, 0.5)
    assert SearchStudy(files).draw(1)[0] == 1


def draw_many(files: StudyFiles, begin: int) -> None:
    study = SearchStudy(files)
    for trial in range(begin, begin + 10):
        number, values = study.draw(trial)
        study.report(number, 1, values["recipe.learning_rate"])
        study.end(number, values["recipe.learning_rate"])


@pytest.mark.slow
def test_many_processes_write_one_journal(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=draw_many, args=(files, 10 * i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    numbers = sorted(trial.number for trial in SearchStudy(files)._study.trials)
    assert numbers == list(range(30))
    for line in (files.folder / "journal.log").read_text().splitlines():
        json.loads(line)
    assert set(SearchStudy(files).importance()) == set(SPACE)


def test_line_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    study = SearchStudy(files)
    study.draw(0)
    journal = files.folder / "journal.log"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "half')
    number, _ = SearchStudy(files).draw(1)
    assert number == 1
    assert [trial.number for trial in SearchStudy(files)._study.trials] == [0, 1]
    assert b"half" not in journal.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
def test_clocks_that_are_apart_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers whose clocks, like those of their files, are days apart, one of which dies with the lock."""
    lock = partial(JournalFileOpenLock, grace_period=1)
    monkeypatch.setattr("hpc_imagenet.search.study.JournalFileOpenLock", lock)
    real, sequences = time.time, []
    for days in ((0, 0, 0, 0), (2, -3, 1, -1)):
        files, drawn = make_files(tmp_path / str(days)), []
        for trial, shift in enumerate(days):
            monkeypatch.setattr("time.time", lambda shift=shift: real() + 86_400 * shift)
            assert files.claim(trial, 0, 0, f"worker{trial}")
            assert not files.claim(trial, 0, 0, "late")
            if any(days):
                (files.folder / "journal.log.lock").touch()
                for path in files.folder.rglob("*"):
                    os.utime(path, (time.time(), time.time()))
            study = SearchStudy(files)
            number, values = study.draw(trial)
            study.report(number, 1, 0.5)
            study.end(number, 0.5)
            drawn.append(values)
        sequences.append(drawn)
    assert sequences[0] == sequences[1]
    assert [claim.worker for claim in files.claims()] == [f"worker{trial}" for trial in range(4)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_full_disk_leaves_the_journal_whole(small_disk: Path) -> None:
    files = make_files(small_disk)
    study = SearchStudy(files)
    number, _ = study.draw(0)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:  # noqa: PT012
        while True:
            file.write(bytes(512))
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012
        for epoch in range(1, 999):
            study.report(number, epoch, 0.5)
    filler.unlink()
    study = SearchStudy(files)
    reported = len(study._study.trials[number].intermediate_values)
    study.report(number, 999, 0.75)
    study.end(number, 0.75)
    assert len(SearchStudy(files)._study.trials[number].intermediate_values) == reported + 1
    for line in (files.folder / "journal.log").read_text().splitlines():
        json.loads(line)


def test_rungs() -> None:
    assert rung_epochs(90, 5) == [10, 30, 90]
    assert rung_epochs(16, 2) == [5, 16]
    assert rung_epochs(8, 1) == [2, 8]
    assert rung_epochs(1, 0) == [1]
    assert first_rung(100, 0) == first_rung(100, 1) == 3


def test_promotion_takes_the_best_third_of_the_highest_rung_first() -> None:
    def record(trial: int, rung: int, top1: float, state: str = "finished") -> TrialRecord:
        return TrialRecord(trial, rung, state=state, top1=top1)

    low = [record(trial, 0, trial / 10) for trial in range(6)]
    assert list(promotable(low[:2], 3)) == []
    assert list(promotable(low, 3)) == [(5, 1), (4, 1)]
    assert list(promotable([*low, record(5, 1, 0.5, "running")], 3)) == [(4, 1)]
    high = [record(trial, 1, trial / 10) for trial in (3, 4, 5)]
    assert list(promotable([*low, *high], 3)) == [(5, 2)]
    assert list(promotable([*low, record(9, 0, 0.9, "failed")], 3)) == [(5, 1), (4, 1)]


def test_claims_are_exclusive(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    assert files.claim(0, 0, 0, "a")
    assert files.claim(0, 0, 0, "b") is None
    assert files.claim(0, 0, 1, "b")
    (claim,) = files.claims()
    assert (claim.owner, claim.worker) == (1, "b")
    files.create({}, 5, 2.0)
    assert (files.target, files.budget, files.definition["algorithm"]) == (8, 2.0, "asha")
    files.create({}, 50, None)  # of a command without search.budget
    assert (files.target, files.budget) == (50, 2.0)


@pytest.mark.parametrize("damaged", ["NaN", "Infinity", "true", '"2"', "1" + 400 * "0"])
def test_what_is_no_number_in_a_record_counts_nothing(tmp_path: Path, damaged: str) -> None:
    files = make_files(tmp_path)
    (files.folder / "trials").mkdir(exist_ok=True)
    text = (
        f'{{"trial": 0, "hours": {damaged}, "top1": {damaged}, "accuracies": {{"1": {damaged}, "2": 0.5}}}}'
    )
    (files.folder / "trials/0.0.json").write_text(text)
    (record,) = files.records()
    assert (record.hours, record.top1, record.accuracies) == (0, None, {"2": 0.5})
