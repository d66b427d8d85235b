from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config, Datastore
from hpc_imagenet.runs.plan import Job, content_hash, make_plan


def nowhere(_: Datastore) -> None:
    return None


@functools.cache
def jobs(*overrides: str) -> list[Job]:
    return make_plan(compose(overrides, multirun=True), nowhere)


def only(*overrides: str) -> Job:
    (job,) = jobs(*overrides)
    return job


def one(*overrides: str) -> Config:
    (config,) = compose(overrides)
    return config


def test_a_pipeline_with_a_sweep_shares_its_beginning() -> None:
    plan = jobs("+stage=pipeline", "dataset=digits", "model=resnet18,resnet50", "seed=0,1")
    assert [job.stage for job in plan] == ["download", "process", "upload", *["train"] * 4]
    assert [job.needs for job in plan[1:3]] == [(plan[0].run_id,), (plan[1].run_id,)]
    assert {job.needs for job in plan[3:]} == {(plan[2].run_id,)}
    assert len({job.run_id for job in plan}) == 7


def test_the_same_asked_twice_is_one_job() -> None:
    assert len(jobs("dataset=digits", "model=resnet18,resnet18")) == 1


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "recipe.epochs=9",
        "model=resnet34",
        "model.stem=standard",
        "dataset.revision=2",
        "recipe=standard90",
        "loader.decode=gpu",
    ],
)
def test_what_decides_a_result_changes_the_signature(change: str) -> None:
    assert only("dataset=digits", change).signature != only("dataset=digits").signature


@pytest.mark.parametrize(
    "change",
    [
        "cluster=slurm",
        "workspace=/elsewhere",
        "wait=true",
        "loader.workers=3",
        "loader.on_corrupt=skip",
        "train.checkpoint_every_minutes=1",
        "datastore.url=/other",
        "dataset.source=http://127.0.0.1:1",
        "download.retries=1",
    ],
)
def test_what_does_not_decide_a_result_leaves_the_signature(change: str) -> None:
    assert only("dataset=digits", change).run_id == only("dataset=digits").run_id


@pytest.mark.parametrize("stage", ["download", "process", "upload", "train"])
def test_a_moved_workspace_holds_the_same_runs(stage: str) -> None:
    words = (f"+stage={stage}", "dataset=digits")
    assert only(*words, "workspace=/a").run_id == only(*words, "workspace=/b").run_id


def test_an_upload_elsewhere_is_another_run() -> None:
    words = ("+stage=upload", "dataset=digits")
    assert only(*words).run_id != only(*words, "datastore.url=/other").run_id
    assert only(*words).run_id != only(*words, "datastore.name=copy").run_id


def test_pinned_archives_are_the_same_wherever_they_come_from() -> None:
    pins = [
        f"dataset.archives.{split}.md5={md5}"
        for split, md5 in (("train", "a"), ("val", "b"), ("devkit", "c"))
    ]
    words = ("dataset=ilsvrc", "dataset.name=x")
    here = one(*words, "dataset.source=/here").dataset
    there = one(*words, "dataset.source=/there").dataset
    assert content_hash(here) != content_hash(there)
    pinned = [one(*words, f"dataset.source={place}", *pins).dataset for place in ("/here", "/there")]
    assert content_hash(pinned[0]) == content_hash(pinned[1]) != content_hash(here)


def test_a_training_on_a_stored_version_is_the_training_of_the_pipeline() -> None:
    (config,) = compose(["dataset=digits"])
    images = content_hash(config.dataset)
    (alone,) = make_plan([config], lambda store: replace(store, version=3, content=images))
    train = jobs("+stage=pipeline", "dataset=digits")[-1]
    assert alone.run_id == train.run_id
    assert alone.config.datastore.version == 3
    assert train.config.datastore.version is None
    assert train.config.datastore.content == images


def test_other_content_under_the_same_name_is_another_training() -> None:
    (config,) = compose(["dataset=digits"])
    found = [
        make_plan([config], lambda store, c=c: replace(store, version=1, content=c))[0].run_id
        for c in ("a", "b")
    ]
    assert found[0] != found[1]


def test_parts_run_side_by_side_and_one_job_puts_them_together() -> None:
    words = ("+stage=pipeline", "dataset=digits", "process.layout=shards")
    whole, cut = jobs(*words), jobs(*words, "process.tasks=3")
    *parts, last = [job for job in cut if job.stage == "process"]
    assert [job.config.stage.part for job in parts] == [0, 1, 2]
    assert {job.needs for job in parts} == {(cut[0].run_id,)}
    assert last.needs == tuple(job.run_id for job in parts)
    assert last.config.stage.part is None
    assert {job.config.stage.parts for job in (*parts, last)} == {3}
    # However many made it, it is the same dataset, and what needs it waits for the last.
    assert last.run_id == next(job.run_id for job in whole if job.stage == "process")
    assert [job.run_id for job in cut if job.stage in ("upload", "train")] == [
        job.run_id for job in whole[2:]
    ]
    assert len({job.run_id for job in cut}) == len(cut)


def test_an_upload_in_parts_needs_them_all() -> None:
    words = ["+stage=pipeline", "dataset=digits"]
    whole, cut = jobs(*words), jobs(*words, "upload.tasks=2")
    *parts, last = [job for job in cut if job.stage == "upload"]
    assert [(job.config.stage.part, job.config.stage.parts) for job in parts] == [(0, 2), (1, 2)]
    assert last.needs == tuple(job.run_id for job in parts)
    assert (last.run_id, last.config.stage.part) == (whole[2].run_id, None)
    assert cut[-1].needs == (last.run_id,)
