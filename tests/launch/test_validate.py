"""Validation of a plan: jobs refused before submission, and the number of queries to a datastore."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from sample_dataset import make_dataset

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.config.schema import Config, Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch import validate
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.runs.attempt import CANCELLED, FINISHED, PRUNED
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.stages.work import upload

DIGITS = ("dataset=digits", "cluster=local")


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    """A folder with digits@v1 and digits@v2, of different images."""
    store = Datastore("digits", str(tmp_path / "stores"))
    for seed in ("1", "2"):
        make_dataset(tmp_path / seed)
        run = Run(tmp_path / f"upload-{seed}")
        run.folder.mkdir()
        path = tmp_path / seed / "datasets" / "digits" / "manifest.json"
        path.write_text(path.read_text().replace('"content": "', f'"content": "{seed}'))
        upload.run(
            Config(workspace=str(tmp_path / seed), dataset=Dataset("digits"), datastore=store), run, DistEnv()
        )
    return store


def test_sweep_over_datastore_versions_finds_each(store: Datastore) -> None:
    find_version = validate.version_finder()
    both = [find_version(replace(store, version=number)) for number in (1, 2)]
    assert [one and one.version for one in both] == [1, 2]
    assert len({one and one.content for one in both}) == 2


@pytest.mark.slow
def test_sweep_queries_a_datastore_once(
    store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, opened = versions.open_version, []

    def counted(datastore: Datastore) -> versions.Version:
        opened.append(datastore.version)
        return real(datastore)

    monkeypatch.setattr(versions, "open_version", counted)
    words = [*DIGITS, f"datastore.url={store.url}", "seed=range(20)", "recipe.global_batch=4,8"]
    sweep = make_plan(compose(words, multirun=True), validate.version_finder())
    validate.validate_jobs(sweep, RunStore(tmp_path / "runs"))
    assert len(sweep) == 40
    assert len(opened) == 1 + 2  # by the version finder; to compare images with each of two batch sizes
    words[-1] = "recipe.global_batch=8,64"
    sweep = make_plan(compose(words, multirun=True), validate.version_finder())
    with pytest.raises(UserError, match=r"recipe.global_batch=64 is more than the 24 images of train"):
        validate.validate_jobs(sweep, RunStore(tmp_path / "runs"))


def pipeline(tmp_path: Path, *overrides: str) -> list[Job]:
    words = with_defaults(["+stage=pipeline", *DIGITS, f"workspace={tmp_path}"], overrides)
    return make_plan(compose(words, multirun=True), lambda store: None)


def active_run(store: RunStore, job: Job) -> Run:
    """Return the run of a job, queued on another machine."""
    info = {"stage": job.stage, "label": job.label, "needs": []}
    info |= {"processing_run": job.processing_run} if job.processing_run else {}
    run = store.create(job.run_id, job.frozen(), info)
    run.new_attempt().submit("local", host="elsewhere")
    return run


@pytest.mark.slow
def test_plan_with_two_processings_of_one_dataset_is_refused(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with pytest.raises(UserError, match=r"dataset.name=digits would be processed into one folder with two"):
        validate.validate_jobs(
            pipeline(tmp_path, "process.layout=shards", "process.resize=null,short:24"), store
        )
    validate.validate_jobs(
        pipeline(tmp_path, "process.layout=shards", "process.tasks=2,3", "seed=0,1"), store
    )
    validate.validate_jobs(
        pipeline(tmp_path, "process.layout=shards,index", "dataset.name=${process.layout}"), store
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["process", "upload"])
def test_dataset_of_an_active_run_is_not_processed_with_other_settings(tmp_path: Path, stage: str) -> None:
    store = RunStore(tmp_path)
    plan, other = pipeline(tmp_path), pipeline(tmp_path, "process.layout=shards", "process.tasks=2")
    (job,) = (job for job in plan if job.stage == stage)
    run = active_run(store, job)
    with pytest.raises(UserError, match=rf"{run.id}, which processes the dataset with other settings: wait"):
        validate.validate_jobs(other, store)
    validate.validate_jobs(plan, store)
    validate.validate_jobs(pipeline(tmp_path, "process.layout=shards", "dataset.name=more"), store)
    retried = store.create(
        "0-process-digits", {}, {"stage": "process", "processing_run": other[-2].processing_run}
    )
    with pytest.raises(UserError, match=r"0-process-digits needs the folder of"):
        validate.check_no_conflict([retried], [run])
    assert run.attempt
    run.attempt.end(CANCELLED)
    validate.validate_jobs(other, store)
    validate.check_no_conflict([retried], [])


@pytest.mark.slow
def test_refusal_of_another_users_run_says_what_became_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (job, *_) = RunStore(tmp_path), pipeline(tmp_path)
    run = store.create(job.run_id, job.frozen(), {"stage": job.stage, "label": job.label, "needs": []})
    attempt, uid = run.new_attempt(), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    attempt.wait("waiting: limit of 4 submitted jobs")
    with pytest.raises(UserError, match=r"can continue it while it waits: have .* retry it, or submit with"):
        validate.validate_jobs([job], store)
    for state, words in ((PRUNED, "was pruned"), (FINISHED, "finished without its output")):
        run.new_attempt().end(state)
        with pytest.raises(UserError, match=f"can continue it after it {words}: have"):
            validate.validate_jobs([job], store)


@pytest.mark.slow
def test_dataset_is_not_processed_while_another_version_may_be_writing_it(tmp_path: Path) -> None:
    store, plan = RunStore(tmp_path), pipeline(tmp_path)
    old = store.create("0-process-digits", {}, {"stage": "process", "label": "process-digits"})
    old.new_attempt().submit("local", host="elsewhere")
    with pytest.raises(UserError, match=r"0-process-digits is running and was made by another version"):
        validate.validate_jobs(plan, store)
    validate.validate_jobs([job for job in plan if job.stage == "download"], store)
    assert old.attempt
    old.attempt.end(CANCELLED)
    validate.validate_jobs(plan, store)


@pytest.mark.slow
def test_slurm_job_cannot_depend_on_a_run_of_the_local_queue(tmp_path: Path) -> None:
    store, slurm = RunStore(tmp_path), pipeline(tmp_path, "cluster=slurm")
    runs = [active_run(store, job) for job in slurm[:3]]
    with pytest.raises(UserError, match=rf"needs {runs[-1].id}, which runs on this machine: wait for it"):
        validate.validate_jobs(slurm, store)
    validate.validate_jobs(pipeline(tmp_path), store)  # the local queue can wait for both
    validate.validate_jobs(slurm[:3], store)  # all are active, so nothing is submitted


@pytest.mark.slow
def test_global_batch_larger_than_the_processed_dataset_is_refused(tmp_path: Path) -> None:
    store, whole = RunStore(tmp_path), pipeline(tmp_path, "recipe.global_batch=64")
    validate.validate_jobs(whole, store)
    make_dataset(tmp_path)
    validate.validate_jobs(whole, store)  # the processed dataset has other content
    path = tmp_path / "datasets" / "digits" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"content": whole[-1].config.datastore.content}
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"recipe.global_batch=64 is more than the 24 images of train"):
        validate.validate_jobs(whole, store)
    validate.validate_jobs(pipeline(tmp_path, "recipe.global_batch=24"), store)


@pytest.mark.slow
def test_pipeline_into_a_datastore_that_trainings_cannot_read_is_refused(tmp_path: Path) -> None:
    words = ["+stage=pipeline", *DIGITS, "datastore.url=host:/data", "model=resnet18,resnet50"]
    sweep = make_plan(compose(words, multirun=True), lambda store: None)
    with pytest.raises(UserError, match=r"host:/data: set cluster.scratch"):
        validate.validate_jobs(sweep, RunStore(tmp_path / "runs"))
    readable = make_plan(compose([*words, "cluster.scratch=/scratch"], multirun=True), lambda store: None)
    validate.validate_jobs(readable, RunStore(tmp_path / "runs"))
