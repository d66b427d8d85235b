"""A worker of a search: which trials it begins, and of which workers it takes over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from fake_slurm import queue_row, write_slurm
from sample_search import SETTINGS

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import PeerLost, Preempted, Superseded, UserError
from hpc_imagenet.runs.lease import acquire, revoke
from hpc_imagenet.runs.metrics_file import validation_rows
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.search.existing_runs import ended_workers, existing_end
from hpc_imagenet.search.study import SearchStudy
from hpc_imagenet.search.study_files import StudyFiles, TrialRecord
from hpc_imagenet.stages.search_stage import definition, is_complete
from hpc_imagenet.stages.train_stage import TrainStage
from hpc_imagenet.stages.work import search


def worker_of_study(folder: Path, *words: str, budget: float | None = None) -> tuple[Config, Run, StudyFiles]:
    """Return a worker of a new study of three trials, with its config."""
    space = ("recipe.learning_rate=interval(0.01,0.1)", "search.name=study", "search.parallel=1")
    (config,) = compose([*space, *with_defaults(SETTINGS, [*words, f"workspace={folder}"])])
    store = RunStore(folder)
    files = StudyFiles(store, "study")
    files.create(definition(config), trials=3, budget=budget)
    worker = store.create("0badcafe-search", {}, {"stage": "search"})
    attempt = worker.new_attempt()
    attempt.submit("foreground")
    attempt.start()
    return config, worker, files


@pytest.mark.slow
def test_no_trial_begins_after_the_budget_at_any_rung(tmp_path: Path) -> None:
    config, worker, files = worker_of_study(tmp_path, "+search=halving", "recipe.epochs=6", budget=2.0)
    for number in range(3):  # the best of the three would be trained for more epochs
        files.claim(number, 0, 0, "worker")
        files.write(TrialRecord(number, state="finished", top1=number / 3, hours=1.0, run=f"{number}-x"))
    assert is_complete(files, 3, 2.0)
    result = search.run(config, worker, DistEnv())
    assert (result["trials"], result["budget"]) == (0, 2.0)
    assert len(files.claims()) == 3
    files.claim(2, 1, 0, "worker")
    files.write(TrialRecord(2, 1, state="finished", top1=1.0, run="2-y"))
    assert "budget" not in search.run(config, worker, DistEnv())  # no trial is left


@pytest.mark.slow
@pytest.mark.parametrize("stop", [Preempted, PeerLost])
def test_hours_until_a_stop_within_an_epoch_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[Exception]
) -> None:
    def train(*_: object) -> NoReturn:
        raise stop

    monkeypatch.setattr(TrainStage, "run", train)
    monkeypatch.setattr(search.SearchWorker, "_hours", lambda *_: 1.5)
    config, worker, files = worker_of_study(tmp_path, "+search=tpe")
    for start in (1, 2):
        with pytest.raises(stop):
            search.run(config, worker, DistEnv())
        (record,) = files.records()
        assert record.hours == 1.5 * start


@pytest.mark.slow
@pytest.mark.parametrize("at_validation", [False, True])
@pytest.mark.parametrize("lost", ["worker", "trial"])
def test_worker_that_has_lost_a_lease_writes_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, at_validation: bool
) -> None:
    config, worker, files = worker_of_study(tmp_path, "+search=tpe")
    worker.lease = acquire(worker.folder, 1)

    def train(stage: TrainStage, config: Config, run: Run, dist_env: DistEnv) -> NoReturn:
        revoke(worker.folder if lost == "worker" else run.folder, 1)
        if at_validation and run.judge:
            run.judge(1, 0.5)
        raise Superseded

    monkeypatch.setattr(TrainStage, "run", train)
    monkeypatch.setattr(search.SearchWorker, "_hours", lambda *_: 1.5)
    with pytest.raises(Superseded):
        search.run(config, worker, DistEnv())
    (record,) = files.records()  # another process has the trial, and writes its record
    assert (record.hours, record.accuracies) == (0.0, {})


Train = Callable[[TrainStage, Config, Run, DistEnv], dict[str, Any]]


def train_from_metrics(trained: list[str], accuracy: float, stop: bool = False) -> Train:
    """Return a training of 9 epochs that goes on after those in metrics.csv."""

    def train(stage: TrainStage, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        trained.append(run.id)
        assert run.judge
        for epoch in range(1 + len(validation_rows(run.folder / "metrics.csv")), 9):
            if run.judge(epoch, accuracy / len(trained)):
                if stop:
                    raise Preempted
                return {"top1": accuracy, "epochs": epoch}
        return {"top1": accuracy, "epochs": 9}

    return train


@pytest.mark.slow
@pytest.mark.parametrize("study", ["study", "other"])
def test_earlier_validations_of_a_run_are_compared_at_their_rungs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: str
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(TrainStage, "run", train_from_metrics(trained, 0.5))
    words = ("+search=asha", "recipe.epochs=9")  # the rungs are [3, 9]
    config, worker, files = worker_of_study(tmp_path / "other", *words)
    search.run(config, worker, DistEnv())
    runs = [record.run for record in files.records()]  # another study with this seed draws them, too
    trained.clear()
    config, worker, files = worker_of_study(tmp_path, *words)
    for number, accuracies in ((1, [0.1, 0.2, 0.3, 0.4, 0.99]), (2, [0.4, 0.5, 0.6, 0.7, 0.8])):
        folder = RunStore(tmp_path).create(runs[number], {}, {"stage": "train"}).folder
        lines = [f"{22 * at + 22},{at},{accuracy},1,0.5" for at, accuracy in enumerate(accuracies)]
        (folder / "metrics.csv").write_text("\n".join(["step,epoch,val_top1,val_top5,val_loss", *lines, "7"]))
    # Its worker has ended for good, or is lost behind a network failure and still trains.
    lost = RunStore(tmp_path).create("c0ffee00-search", {}, {"stage": "search"})
    lost.new_attempt().end("cancelled")
    left = RunStore(tmp_path).run(runs[1]).new_attempt()
    left.submit("search", study=study, worker=lost.id)
    old_copy = acquire(left.folder.parents[1], left.number)
    search.run(config, worker, DistEnv())
    first, second, third = files.records()
    assert (first.state, third.state) == ("finished", "finished")
    assert (second.state, second.epochs, second.top1, second.hours) == ("pruned", 3, 0.3, 0)
    assert second.reason == "after epoch 3 of 9, by the search study"
    assert trained == [runs[0], runs[2]]
    outcome = left.outcome
    if study == "study":
        assert outcome
        assert (outcome.state, outcome.reason) == ("pruned", second.reason)
    else:
        assert outcome is None
    with pytest.raises(Superseded) if study == "study" else contextlib.nullcontext():
        old_copy.check()
    assert sorted(third.accuracies) == [str(epoch) for epoch in range(1, 9)]
    values = [each.system_attrs.get("completed_rung_0") for each in SearchStudy(files)._study.trials]
    assert values == [0.5, 0.3, 0.6]


@pytest.mark.slow
def test_run_that_another_worker_begins_during_the_reports_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun_meanwhile(run: Run, after: int) -> list[tuple[int, float]]:
        run.folder.mkdir(parents=True)
        other = RunStore(tmp_path).create("c0ffee00-search", {}, {"stage": "search"})
        other.new_attempt().submit("local")
        run.new_attempt().submit("search", study="study", worker=other.id)
        monkeypatch.setattr(search, "earlier_validations", lambda *_: [])
        return [(1, 0.25), (2, 0.5)]

    trained: list[str] = []
    monkeypatch.setattr(TrainStage, "run", train_from_metrics(trained, 0.5))
    monkeypatch.setattr(search, "earlier_validations", begun_meanwhile)
    config, worker, files = worker_of_study(tmp_path, "+search=tpe")
    search.run(config, worker, DistEnv())
    first, *others = files.records()
    assert (first.state, first.reason) == ("skipped", "another job trains the same run")
    assert first.accuracies == {"1": 0.25, "2": 0.5}
    assert trained == [each.run for each in others]
    attempt = RunStore(tmp_path).run(first.run).attempt
    assert attempt
    assert attempt.outcome is None


@pytest.mark.slow
def test_trial_that_is_pruned_when_its_worker_stops_is_trained_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(TrainStage, "run", train_from_metrics(trained, 0.5, stop=True))
    config, worker, files = worker_of_study(tmp_path, "+search=asha", "recipe.epochs=9")
    for _ in range(2):
        with pytest.raises(Preempted):
            search.run(config, worker, DistEnv())
    search.run(config, worker, DistEnv())
    records = files.records()
    assert [(each.state, each.epochs) for each in records] == [("finished", 9), ("pruned", 3), ("pruned", 3)]
    assert trained == [each.run for each in records]
    attempt = RunStore(tmp_path).run(records[1].run).attempt
    assert attempt
    assert attempt.outcome
    assert (attempt.outcome.state, attempt.outcome.result) == ("pruned", {"top1": 0.25, "epochs": 3})


@pytest.mark.parametrize(("study", "state"), [("study", "pruned"), ("other", None), (None, None)])
def test_trial_has_ended_as_its_own_search_has_pruned_it(
    tmp_path: Path, study: str | None, state: str | None
) -> None:
    store = RunStore(tmp_path)
    attempt = store.create("0badcafe-resnet18", {}, {"stage": "train"}).new_attempt()
    attempt.submit("search" if study else "local", **({"study": study} if study else {}))
    attempt.end("pruned", "after epoch 28 of 90")
    record = TrialRecord(0, run="0badcafe-resnet18", worker="0badcafe-search")
    end = existing_end(record, True, store, StudyFiles(store, "study"))
    assert (end.state if end else None) == state


def cuda_error(*_: object) -> NoReturn:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: misaligned address"), UserError("no decoder")])
def test_no_trial_begins_in_a_process_that_has_lost_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def train(stage: TrainStage, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        if run.follows:
            monkeypatch.setattr(torch.cuda, "synchronize", cuda_error)
            raise error
        return {"top1": 0.5, "epochs": 2}

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(TrainStage, "run", train)
    config, worker, files = worker_of_study(tmp_path, "+search=tpe")
    with pytest.raises(PeerLost, match="trial 1 failed, so the next one needs a new start"):
        search.run(config, worker, DistEnv())
    assert [each.state for each in files.records()] == ["finished", "failed"]
    assert len(files.claims()) == 2


@pytest.mark.slow
def test_failed_trials_leave_the_next_one_the_memory_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def train(*_: object) -> NoReturn:
        events.append("train")
        raise ValueError

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("free"))
    monkeypatch.setattr(TrainStage, "run", train)
    config, worker, _ = worker_of_study(tmp_path, "+search=tpe")
    with pytest.raises(UserError, match="all 3 trials of the search study failed"):
        search.run(config, worker, DistEnv())
    assert events == ["train", "free"] * 3


@pytest.mark.parametrize(
    ("squeue", "ended"),
    [
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
        (f"echo '{queue_row(77, 'RUNNING')}'", False),
        (f"echo '{queue_row(77, 'FAILED')}'", True),
        (None, False),  # no Slurm here
    ],
)
def test_worker_that_slurm_does_not_know_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str | None, ended: bool
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if squeue is not None:
        write_slurm(tmp_path)
        (tmp_path / "squeue").write_text(f"#!/bin/bash\n{squeue}\n")
    worker = RunStore(tmp_path).create("0badcafe-search", {}, {"stage": "search"})
    worker.new_attempt().submit("slurm", job_id="77")
    assert ended_workers([worker]) == ({worker.id} if ended else set())
