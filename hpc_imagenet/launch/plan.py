"""Make a plan: the jobs of configs with their dependencies and signatures. Pure: reads and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hpc_imagenet.config.schema import Config, Datastore, cluster_for
from hpc_imagenet.launch.split import merge_alternatives
from hpc_imagenet.runs.job import FindVersion, Job, signature
from hpc_imagenet.stages import STAGES
from hpc_imagenet.stages.search_stage import SEARCH
from hpc_imagenet.stages.stage import Stage
from hpc_imagenet.stages.train_stage import TRAIN


def make_plan(configs: Sequence[Config], find_version: FindVersion) -> list[Job]:
    """Return the jobs of all configs without duplicates, each before those that need it.

    Configs that differ only in cluster settings give one job, with alternatives.
    """
    jobs: list[Job] = []
    for config in configs:
        if config.stage.name in STAGES:
            stages, find = [STAGES[config.stage.name]], find_version
        else:  # the pipeline, whose data will be new
            stages, find = [stage for stage in STAGES.values() if stage.in_pipeline], _no_version
            if config.search.algorithm:  # its workers, in place of one training
                stages = [SEARCH if stage is TRAIN else stage for stage in stages]
        for stage in stages:
            job = _make_job(stage, config, find)
            jobs += _split_into_parts(job, stage.parts(config))
    order = list(STAGES)
    return sorted(merge_alternatives(jobs), key=lambda job: order.index(job.stage))


def _make_job(stage: Stage, config: Config, find_version: FindVersion) -> Job:
    """Return the job of one stage of a config."""
    named = replace(config.stage, name=stage.name)
    datastore = stage.datastore(config, find_version)
    config = replace(config, stage=named, datastore=datastore, wait=False, dry_run=False, price=False)
    return Job(
        stage=stage.name,
        label=stage.label(config),
        signature=stage.signature(config),
        needs=stage.needs(config),
        model=stage.model(config),
        cluster=cluster_for(config, stage.name),
        config=config,
        processing_run=stage.processing_run(config),
    )


def _split_into_parts(job: Job, count: int) -> list[Job]:
    """Return the jobs of a stage: its parts, which may run in parallel, then the job itself.

    With parts the job itself only merges their output; its signature is the same as without parts.
    """
    if count == 1:
        return [job]
    parts = [
        replace(
            job,
            label=f"{job.label}.{part + 1}-of-{count}",
            signature=signature(job.run_id, part, count),
            config=replace(job.config, stage=replace(job.config.stage, part=part, parts=count)),
        )
        for part in range(count)
    ]
    last = replace(job.config, stage=replace(job.config.stage, parts=count))
    return [*parts, replace(job, needs=tuple(part.run_id for part in parts), config=last)]


def _no_version(_: Datastore) -> None:
    return None
