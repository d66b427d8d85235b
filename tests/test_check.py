"""The plan against the world: what is refused before anything is sent, and how often a place is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sample_dataset import make_dataset

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config, Dataset, Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch import validate
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.runs.plan import Job, make_plan
from hpc_imagenet.runs.store import CANCELLED, Run, RunStore
from hpc_imagenet.stages import upload

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


def test_a_sweep_over_versions_finds_each(store: Datastore) -> None:
    found = validate.version_finder()
    both = [found(replace(store, version=number)) for number in (1, 2)]
    assert [one and one.version for one in both] == [1, 2]
    assert len({one and one.content for one in both}) == 2


def test_a_sweep_asks_a_place_once(store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = versions.open_version, []

    def counted(datastore: Datastore) -> versions.Version:
        asked.append(datastore.version)
        return real(datastore)

    monkeypatch.setattr(versions, "open_version", counted)
    words = [*DIGITS, f"datastore.url={store.url}", "seed=range(20)", "recipe.global_batch=4,8"]
    sweep = make_plan(compose(words, multirun=True), validate.version_finder())
    validate.validate_jobs(sweep, RunStore(tmp_path / "runs"))
    assert len(sweep) == 40
    assert len(asked) == 1 + 2  # by the finder; for each batch, whether there are images enough
    words[-1] = "recipe.global_batch=8,64"
    sweep = make_plan(compose(words, multirun=True), validate.version_finder())
    with pytest.raises(UserError, match=r"recipe.global_batch=64 is more than the 24 images of train"):
        validate.validate_jobs(sweep, RunStore(tmp_path / "runs"))


def pipeline(tmp_path: Path, *overrides: str) -> list[Job]:
    words = ["+stage=pipeline", *DIGITS, f"workspace={tmp_path}", *overrides]
    return make_plan(compose(words, multirun=True), lambda store: None)


def under_way(store: RunStore, job: Job) -> Run:
    """Return a job's run that a queue of another machine has."""
    info = {"stage": job.stage, "label": job.label, "needs": []}
    info |= {"processing_run": job.processing_run} if job.processing_run else {}
    run = store.create(job.run_id, job.frozen(), info)
    run.new_attempt().submit("local", host="elsewhere")
    return run


def test_one_command_does_not_make_one_dataset_in_two_ways(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with pytest.raises(UserError, match=r"dataset.name=digits would be processed in two ways"):
        validate.validate_jobs(
            pipeline(tmp_path, "process.layout=shards", "process.resize=null,short:24"), store
        )
    validate.validate_jobs(
        pipeline(tmp_path, "process.layout=shards", "process.tasks=2,3", "seed=0,1"), store
    )
    validate.validate_jobs(
        pipeline(tmp_path, "process.layout=shards,index", "dataset.name=${process.layout}"), store
    )


@pytest.mark.parametrize("stage", ["process", "upload"])
def test_what_is_made_or_read_is_not_made_in_another_way_meanwhile(tmp_path: Path, stage: str) -> None:
    store = RunStore(tmp_path)
    this, other = pipeline(tmp_path), pipeline(tmp_path, "process.layout=shards", "process.tasks=2")
    (job,) = (job for job in this if job.stage == stage)
    run = under_way(store, job)
    with pytest.raises(UserError, match=rf"{run.id}, which treats the dataset in another way: wait"):
        validate.validate_jobs(other, store)
    validate.validate_jobs(this, store)
    validate.validate_jobs(pipeline(tmp_path, "process.layout=shards", "dataset.name=more"), store)
    retried = store.create(
        "0-process-digits", {}, {"stage": "process", "processing_run": other[-2].processing_run}
    )
    with pytest.raises(UserError, match=r"0-process-digits needs the folder of"):
        validate.check_no_conflict([retried], store)
    assert run.attempt
    run.attempt.end(CANCELLED)
    validate.validate_jobs(other, store)
    validate.check_no_conflict([retried], store)


def test_a_job_of_slurm_cannot_wait_for_a_run_of_this_machine(tmp_path: Path) -> None:
    store, slurm = RunStore(tmp_path), pipeline(tmp_path, "cluster=slurm")
    runs = [under_way(store, job) for job in slurm[:3]]
    with pytest.raises(UserError, match=rf"needs {runs[-1].id}, which runs on this machine: wait for it"):
        validate.validate_jobs(slurm, store)
    validate.validate_jobs(pipeline(tmp_path), store)  # this machine's queue waits for both
    validate.validate_jobs(slurm[:3], store)  # they are under way, and nothing is sent


def test_a_batch_of_more_images_than_the_processed_dataset_has(tmp_path: Path) -> None:
    store, whole = RunStore(tmp_path), pipeline(tmp_path, "recipe.global_batch=64")
    validate.validate_jobs(whole, store)
    make_dataset(tmp_path)
    validate.validate_jobs(whole, store)  # of other images
    path = tmp_path / "datasets" / "digits" / "manifest.json"
    told = json.loads(path.read_text()) | {"content": whole[-1].config.datastore.content}
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"recipe.global_batch=64 is more than the 24 images of train"):
        validate.validate_jobs(whole, store)
    validate.validate_jobs(pipeline(tmp_path, "recipe.global_batch=24"), store)


def test_a_place_that_the_trainings_of_a_pipeline_cannot_read(tmp_path: Path) -> None:
    words = ["+stage=pipeline", *DIGITS, "datastore.url=host:/data", "model=resnet18,resnet50"]
    sweep = make_plan(compose(words, multirun=True), lambda store: None)
    with pytest.raises(UserError, match=r"host:/data: give cluster.scratch"):
        validate.validate_jobs(sweep, RunStore(tmp_path / "runs"))
    readable = make_plan(compose([*words, "cluster.scratch=/scratch"], multirun=True), lambda store: None)
    validate.validate_jobs(readable, RunStore(tmp_path / "runs"))
