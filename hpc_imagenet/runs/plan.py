"""Configs → jobs: what is to be run, after what, and under which signature. Pure: reads and writes nothing.

A signature is eight hex digits of the hash of what decides a job's result, and names the run's folder: the
same thing asked for twice is one run. For data it covers the archives' identity and how they are treated;
for a training the content of the data, the model, the recipe and the seed. The cluster, paths and
progress flags are not in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hpc_imagenet.config.schema import STAGES, Cluster, Config, Dataset, Datastore, Process, cluster_for

PIPELINE = ("download", "process", "upload", "train")

Found = Callable[[Datastore], Datastore | None]
"""Looks a datastore up: the same with version and content filled in, or None where there is none yet."""


@dataclass(frozen=True)
class Job:
    """One run to be made.

    `needs` are the run ids of the jobs that make this one's input, whether they are part of the plan or not.
    """

    stage: str
    label: str
    signature: str
    needs: tuple[str, ...]
    model: str | None
    cluster: Cluster  # for this stage
    config: Config  # frozen
    processing_run: str | None = (
        None  # of process and upload: the process run whose dataset it makes or reads
    )

    @property
    def run_id(self) -> str:
        """The run's id and the name of its folder."""
        return f"{self.signature}-{self.label}"

    def frozen(self) -> dict[str, Any]:
        """Return the config as plain values, as it is written to disk."""
        return asdict(self.config)


def make_plan(configs: Sequence[Config], found: Found) -> list[Job]:
    """Return the jobs of all configs, each before those that need it, duplicates dropped."""
    jobs: dict[str, Job] = {}
    for config in configs:
        whole = config.stage.name == "pipeline"
        for stage in PIPELINE if whole else (config.stage.name,):
            job = _job(stage, config, found if not whole else _nothing)
            for each in _parts(job):
                jobs.setdefault(each.run_id, each)
    return sorted(jobs.values(), key=lambda job: STAGES.index(job.stage))


def signature(*parts: Any) -> str:
    """Return eight hex digits that stand for `parts` (JSON values)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def content_hash(dataset: Dataset, process: Process | None = None) -> str:
    """Return the short hash of which images a dataset holds, as they lie in the archives or once processed.

    Pinned MD5s or a revision say it wherever the archives come from; without them the source is part of it.
    """
    pins = {split: archive.md5 for split, archive in dataset.archives.items()}
    pinned = dataset.revision or (all(pins.values()) and pins)
    changed = process.image_identity() if process else {}
    return signature("content", dataset.name, pinned or dataset.source, *([changed] if changed else []))


def _parts(job: Job) -> list[Job]:
    """Return the jobs that make a stage: its parts, which may run side by side, and last the job itself.

    With parts the job itself only puts together what they made; its signature is the same as without.
    """
    count = {"process": job.config.process.tasks, "upload": job.config.upload.tasks}.get(job.stage, 1)
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


def _nothing(_: Datastore) -> None:
    return None


def _session(config: Config, found: Found) -> Job:
    """Return the job of a session; its identity is its name alone, so that it may change its size."""
    asked, datastore = config.session, config.datastore
    if asked.datastore:
        datastore = replace(datastore, name=asked.datastore, version=None, content=None)
        datastore = found(datastore) or datastore
    frozen = replace(config, datastore=datastore, wait=False, dry_run=False)
    label = f"session-{asked.name}"
    return Job(
        "session", label, signature("session", asked.name), (), None, cluster_for(frozen, "session"), frozen
    )


def _job(stage: str, config: Config, found: Found) -> Job:
    if stage == "session":
        return _session(config, found)
    dataset, workspace = config.dataset, config.workspace
    archives, images = content_hash(dataset), content_hash(dataset, config.process)
    datastore = replace(config.datastore, content=images)
    # A folder in the workspace is named relative to it, so that a workspace can be moved.
    url = datastore.url.replace(workspace, "workspace:", 1)
    ids = {
        "download": f"{signature('download', archives)}-download-{dataset.name}",
        "process": f"{signature('process', archives, config.process.identity())}-process-{dataset.name}",
        "upload": f"{signature('upload', images, datastore.name, url)}-upload-{datastore.name}",
    }
    needs: tuple[str, ...] = ()
    model = None
    if stage == "train":
        datastore = found(config.datastore) or datastore
        model = config.model.name
        run = f"{signature('train', datastore.content, config.training_identity())}-{model}"
        needs = (ids["upload"],)
    else:
        run = ids[stage]
        needs = {"download": (), "process": (ids["download"],), "upload": (ids["process"],)}[stage]
    sign, _, label = run.partition("-")
    frozen = replace(
        config, stage=replace(config.stage, name=stage), datastore=datastore, wait=False, dry_run=False
    )
    processing_run = ids["process"] if stage in ("process", "upload") else None
    return Job(stage, label, sign, needs, model, cluster_for(config, stage), frozen, processing_run)
