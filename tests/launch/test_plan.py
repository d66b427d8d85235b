"""Plans and signatures: jobs of a pipeline and a sweep, and the settings that a signature covers."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import replace

import pytest

from hpc_imagenet.config import schema
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config, Datastore
from hpc_imagenet.launch.executors import EXECUTORS
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.runs.job import Job, content_hash
from hpc_imagenet.stages import STAGES


def no_version(_: Datastore) -> None:
    return None


@functools.cache
def jobs(*overrides: str) -> list[Job]:
    return make_plan(compose(overrides, multirun=True), no_version)


def only_job(*overrides: str) -> Job:
    (job,) = jobs(*overrides)
    return job


def only_config(*overrides: str) -> Config:
    (config,) = compose(overrides)
    return config


@pytest.mark.slow
def test_pipeline_of_a_sweep_shares_data_stages() -> None:
    plan = jobs("+stage=pipeline", "dataset=digits", "model=resnet18,resnet50", "seed=0,1")
    assert [job.stage for job in plan] == ["download", "process", "upload", *["train"] * 4]
    assert [job.needs for job in plan[1:3]] == [(plan[0].run_id,), (plan[1].run_id,)]
    assert {job.needs for job in plan[3:]} == {(plan[2].run_id,)}
    assert len({job.run_id for job in plan}) == 7


def test_every_stage_and_executor_of_the_schema_is_in_its_table() -> None:
    assert {*STAGES, "pipeline"} == set(schema.STAGES)
    assert set(EXECUTORS) == set(schema.EXECUTORS)
    assert all(name == stage.name for name, stage in STAGES.items())


@pytest.mark.slow
def test_planning_imports_no_heavy_package() -> None:
    program = (
        "import sys; import hpc_imagenet.cli.submit; "
        "heavy = {'torch', 'pytorch_lightning', 'numpy', 'boto3', 'pyarrow', 'submitit', 'jupyter_server'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_duplicate_configs_are_one_job() -> None:
    assert len(jobs("dataset=digits", "model=resnet18,resnet18")) == 1


@pytest.mark.slow
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
def test_signature_covers_settings_that_determine_the_result(change: str) -> None:
    assert only_job("dataset=digits", change).signature != only_job("dataset=digits").signature


@pytest.mark.slow
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
def test_signature_ignores_cluster_paths_and_progress_settings(change: str) -> None:
    assert only_job("dataset=digits", change).run_id == only_job("dataset=digits").run_id


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["download", "process", "upload", "train"])
def test_signature_is_independent_of_the_workspace_path(stage: str) -> None:
    words = (f"+stage={stage}", "dataset=digits")
    assert only_job(*words, "workspace=/a").run_id == only_job(*words, "workspace=/b").run_id


@pytest.mark.slow
def test_upload_signature_covers_datastore_url_and_name() -> None:
    words = ("+stage=upload", "dataset=digits")
    assert only_job(*words).run_id != only_job(*words, "datastore.url=/other").run_id
    assert only_job(*words).run_id != only_job(*words, "datastore.name=copy").run_id


@pytest.mark.slow
def test_pinned_md5s_make_the_content_hash_independent_of_the_source() -> None:
    pins = [
        f"dataset.archives.{split}.md5={md5}"
        for split, md5 in (("train", "a"), ("val", "b"), ("devkit", "c"))
    ]
    words = ("dataset=ilsvrc", "dataset.name=x")
    first = only_config(*words, "dataset.source=/first").dataset
    second = only_config(*words, "dataset.source=/second").dataset
    assert content_hash(first) != content_hash(second)
    pinned = [
        only_config(*words, f"dataset.source={source}", *pins).dataset for source in ("/first", "/second")
    ]
    assert content_hash(pinned[0]) == content_hash(pinned[1]) != content_hash(first)


@pytest.mark.slow
def test_training_on_a_stored_version_has_the_run_id_of_the_pipelines_training() -> None:
    (config,) = compose(["dataset=digits"])
    images = content_hash(config.dataset)
    (alone,) = make_plan([config], lambda store: replace(store, version=3, content=images))
    train = jobs("+stage=pipeline", "dataset=digits")[-1]
    assert alone.run_id == train.run_id
    assert alone.config.datastore.version == 3
    assert train.config.datastore.version is None
    assert train.config.datastore.content == images


@pytest.mark.slow
def test_training_signature_covers_the_datastore_content() -> None:
    (config,) = compose(["dataset=digits"])
    found = [
        make_plan([config], lambda store, c=c: replace(store, version=1, content=c))[0].run_id
        for c in ("a", "b")
    ]
    assert found[0] != found[1]


@pytest.mark.slow
def test_process_tasks_run_in_parallel_and_one_job_merges_them() -> None:
    words = ("+stage=pipeline", "dataset=digits", "process.layout=shards")
    whole, cut = jobs(*words), jobs(*words, "process.tasks=3")
    *parts, last = [job for job in cut if job.stage == "process"]
    assert [job.config.stage.part for job in parts] == [0, 1, 2]
    assert {job.needs for job in parts} == {(cut[0].run_id,)}
    assert last.needs == tuple(job.run_id for job in parts)
    assert last.config.stage.part is None
    assert {job.config.stage.parts for job in (*parts, last)} == {3}
    # The dataset is the same for any number of tasks, and the jobs that need it depend on the last one.
    assert last.run_id == next(job.run_id for job in whole if job.stage == "process")
    assert [job.run_id for job in cut if job.stage in ("upload", "train")] == [
        job.run_id for job in whole[2:]
    ]
    assert len({job.run_id for job in cut}) == len(cut)


@pytest.mark.slow
def test_upload_tasks_are_all_needed_by_the_final_upload() -> None:
    words = ["+stage=pipeline", "dataset=digits"]
    whole, cut = jobs(*words), jobs(*words, "upload.tasks=2")
    *parts, last = [job for job in cut if job.stage == "upload"]
    assert [(job.config.stage.part, job.config.stage.parts) for job in parts] == [(0, 2), (1, 2)]
    assert last.needs == tuple(job.run_id for job in parts)
    assert (last.run_id, last.config.stage.part) == (whole[2].run_id, None)
    assert cut[-1].needs == (last.run_id,)


@pytest.mark.slow
def test_decoding_every_image_is_another_process_run_of_the_same_images() -> None:
    words = ("+stage=pipeline", "dataset=digits")
    header, decode = jobs(*words), jobs(*words, "process.check=decode")
    assert header[1].run_id != decode[1].run_id
    assert [job.run_id for job in header[2:]] == [job.run_id for job in decode[2:]]
    assert [job.run_id for job in jobs(*words, "process.check=header")] == [job.run_id for job in header]
