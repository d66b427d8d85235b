"""The whole plan against the world, before anything is written: one bad job, and nothing is submitted."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from importlib.util import find_spec
from pathlib import Path

from hpc_imagenet.config.backbones import BACKBONES
from hpc_imagenet.config.recipe import is_weights_name
from hpc_imagenet.config.schema import Config, Datastore, cluster_for
from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.manifest import Manifest, load_manifest
from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.launch.states import states
from hpc_imagenet.runs.plan import Job
from hpc_imagenet.runs.store import Run, RunStore


def check_executor(name: str) -> str:
    """Return `name`, one of config.EXECUTORS, if this machine has it.

    Raises:
        UserError: Slurm is asked for where there is none.
    """
    for command in ("sbatch", "srun") if name == "slurm" else ():
        if not shutil.which(command):
            raise UserError(
                f"cluster.executor=slurm, but no {command} is on the PATH: cluster=local, or a login node"
            )
    return name


def prepare_workspace(path: Path) -> None:
    """Make the workspace's folder of runs, and refuse a place that cannot be written."""
    runs = path / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "make room, or choose another" if full else "choose another"
        raise UserError(f"workspace={path} cannot be written ({error.strerror}): {mend}") from None


def version_finder() -> Callable[[Datastore], Datastore | None]:
    """Return a look-up for `plan.plan`: a datastore's newest (or pinned) version, each once."""
    known: dict[tuple[str, str, int | None], Datastore | None] = {}

    def found(datastore: Datastore) -> Datastore | None:
        key = (datastore.url, datastore.name, datastore.version)
        if key not in known:
            name, _ = versions.parse_reference(datastore.name)
            known[key] = None
            if versions.complete_versions(datastore.url, name):
                version = versions.open_version(datastore)
                known[key] = replace(datastore, version=version.number, content=version.manifest.content)
        return known[key]

    return found


def validate_jobs(plan: Sequence[Job], store: RunStore) -> None:
    """Refuse a plan with a job that cannot run: an unknown model, an input that nobody makes.

    Raises:
        UserError: the first job's trouble, and the setting or the stage that mends it.
    """
    planned = {job.run_id for job in plan}
    busy = _busy(store) if any(job.processing_run for job in plan) else []
    told = states(map(store.run, planned.union(*(job.needs for job in plan))))

    def stays(job: Job) -> bool:
        was = told[job.run_id]
        return was.active or (was.finished and output_exists(job))

    _one_processing_run(plan)
    answered = set()  # of a sweep's trainings; a place elsewhere is not asked again for each
    for job in plan:
        _model(job)
        _shape(job)
        if (other := _conflicting_run(job.stage, job.processing_run, busy)) and not stays(job):
            _raise_conflict(job.run_id, other)
        for need in job.needs:
            if job.cluster.executor == "slurm" and told[need].active and not stays(job):
                _on_slurm(job.run_id, store.run(need))
        question = (astuple(job.config.datastore), job.cluster.scratch, job.config.recipe.global_batch)
        if job.stage == "train":
            if question in answered:
                continue
            answered.add(question)
        _readable(job)
        _pinned_version(job)
        if any(need in planned or told[need].active for need in job.needs):
            _enough(job)
        else:
            _INPUTS[job.stage](job.config)


def check_no_conflict(runs: Sequence[Run], store: RunStore) -> None:
    """Refuse to take up runs whose dataset another run makes or reads with other settings.

    Raises:
        UserError: which run does.
    """
    busy = _busy(store) if any("processing_run" in run.info for run in runs) else []
    for run in runs:
        if other := _conflicting_run(run.info["stage"], run.info.get("processing_run"), busy):
            _raise_conflict(run.id, other)


def output_exists(job: Job) -> bool:
    """Whether what a finished job made is still there, so that it need not run again."""
    try:
        _OUTPUTS[job.stage](job.config)
    except UserError:
        return False
    return True


def _busy(store: RunStore) -> list[Run]:
    """Return the runs that make or read datasets of the workspace, or will by themselves."""
    runs = [run for run in store.all() if "processing_run" in run.info]
    told = states(runs)
    return [run for run in runs if told[run.id].active]


def _one_processing_run(plan: Sequence[Job]) -> None:
    """Refuse a plan that would make one dataset in two ways: they would write the same folder."""
    processing_runs = {job.processing_run for job in plan if job.stage == "process" and job.processing_run}
    names = [_dataset_of(processing_run) for processing_run in processing_runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"dataset.name={name} would be processed in two ways, into one folder: give each a "
                "dataset.name of its own, or ask for one when the other has ended"
            )


def _conflicting_run(stage: str, processing_run: str | None, busy: Sequence[Run]) -> Run | None:
    """Return the run that makes or reads the same dataset with other settings; two that read it may."""
    for run in busy:
        info = run.info
        other = info["processing_run"]
        same = processing_run is not None and _dataset_of(other) == _dataset_of(processing_run)
        if same and other != processing_run and "process" in (stage, info["stage"]):
            return run
    return None


def _dataset_of(processing_run: str) -> str:
    return processing_run.partition("-process-")[2]


def _raise_conflict(run: str, other: Run) -> None:
    raise UserError(
        f"{run} needs the folder of {other.id}, which treats the dataset in another way: wait for that or "
        "cancel it, or give this one a dataset.name of its own"
    )


def _on_slurm(run: str, need: Run) -> None:
    """Refuse what would wait on Slurm for a run that is none of its jobs."""
    attempt = need.attempt
    if attempt and attempt.submitted.get("executor") != "slurm":
        raise UserError(f"{run} needs {need.id}, which runs on this machine: wait for it, then ask again")


def _model(job: Job) -> None:
    if job.stage == "train" and job.config.model.name not in BACKBONES:
        raise UserError(
            f"model.name={job.config.model.name} is unknown{did_you_mean(job.config.model.name, BACKBONES)}"
        )
    weights = job.config.model.weights
    if job.stage == "train" and job.config.recipe.freeze and not weights:
        raise UserError(
            "recipe.freeze=true trains the classifier alone: on what? model.weights=IMAGENET1K_V1, or a file"
        )
    if job.stage == "train" and weights and not is_weights_name(weights) and not Path(weights).is_file():
        raise UserError(
            f"model.weights={weights}: no such file; a name of torchvision's is like IMAGENET1K_V1"
        )


def _shape(job: Job) -> None:
    cluster, batch = job.cluster, job.config.recipe.global_batch
    if job.cluster.executor == "slurm" and job.cluster.time is None:
        raise UserError(
            f"cluster.time is not set for {job.stage}: give its minutes, such as cluster.time=1440"
        )
    if job.stage != "train":
        return
    # Every process takes an equal share of a step, in so many parts.
    parts = (
        cluster.nodes * (cluster.tasks_per_node or cluster.gpus_per_node or 1) * job.config.train.accumulate
    )
    if job.config.loader.decode == "gpu" and cluster.gpus_per_node == 0:
        raise UserError("loader.decode=gpu, but cluster.gpus_per_node=0: set loader.decode=cpu")
    gpus, tasks = cluster.gpus_per_node, cluster.tasks_per_node
    if gpus and tasks and gpus != tasks:
        raise UserError(
            f"cluster.tasks_per_node={tasks} with cluster.gpus_per_node={gpus}: a training has one task "
            f"a GPU: leave cluster.tasks_per_node out, or set it to {gpus}"
        )
    if batch % parts:
        above = (batch // parts + 1) * parts
        raise UserError(
            f"recipe.global_batch={batch} does not divide by {parts} (processes times train.accumulate): "
            f"{' or '.join(str(n) for n in (above - parts, above) if n)} would"
        )


def _readable(job: Job) -> None:
    """Refuse a training that could not read where its datastore lies."""
    if job.stage == "train" and versions.is_remote(job.config.datastore.url):
        datastore = job.config.datastore
        versions.check_readable(versions.open_backend(datastore.url), job.cluster.scratch, datastore.name)


def _login(config: Config) -> None:
    """Read a login before a job waits hours in a queue for saying that it cannot."""
    if config.download.login is not None:
        HttpCredentials(config.dataset.source, config.download.login)


def _archives(config: Config) -> None:
    folder = Path(config.workspace) / "archives" / config.dataset.name
    files = [archive.file for archive in config.dataset.archives.values()]
    if absent := receipt.missing_receipts(folder, files):
        raise UserError(
            f"{folder} has no checked {', '.join(absent)}: +stage=download fetches or checks them first"
        )


def _dataset(config: Config) -> Manifest:
    folder = Path(config.workspace) / "datasets" / config.dataset.name
    try:
        manifest = load_manifest(folder)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no dataset: +stage=process makes it first") from None
    if manifest.content != config.datastore.content:
        raise UserError(
            f"{folder} was made from other archives or in another way: +stage=process makes it again"
        )
    return manifest


def _layout(config: Config) -> None:
    """Whatever its form, a dataset serves as an index; shards and class folders must be those asked for."""
    manifest, wanted = _dataset(config), config.process
    if wanted.layout != "index" and manifest.provenance.get("process") != wanted.identity():
        raise UserError(
            f"the {wanted.layout} are not those asked for: +stage=process process.layout={wanted.layout}"
        )


def _version(config: Config) -> None:
    versions.open_version(config.datastore)


def _images(config: Config) -> None:
    _fills_a_batch(versions.open_version(config.datastore).manifest, config)


def _enough(job: Job) -> None:
    """Refuse a training of what is still to be uploaded, where the dataset says already how much that is."""
    if job.stage == "train":
        try:
            manifest = _dataset(job.config)
        except UserError:  # still to be made
            return
        _fills_a_batch(manifest, job.config)


def _fills_a_batch(manifest: Manifest, config: Config) -> None:
    train, batch = manifest.splits.get("train"), config.recipe.global_batch
    if train and train.images < batch:
        raise UserError(f"recipe.global_batch={batch} is more than the {train.images} images of train")


def _pinned_version(job: Job) -> None:
    """Refuse an upload to a version that stands, and a datastore's name that is none."""
    datastore = job.config.datastore
    name, number = versions.parse_reference(datastore.name)
    if (
        job.stage != "upload"
        or number is None
        or number not in versions.complete_versions(datastore.url, name)
    ):
        return
    if versions.open_version(replace(datastore, content=None)).manifest.content != datastore.content:
        raise UserError(
            f"datastore {name}@v{number} exists; versions never change: datastore.name={name} makes the next"
        )


def _machine(config: Config) -> None:
    """Refuse a session without Jupyter, or with a datastore that is not there."""
    if not find_spec("jupyter_server") or not find_spec("jupyterlab"):
        raise UserError(
            "a session needs Jupyter: pip install -c constraints.txt -e '.[session]' in the checkout"
        )
    if not config.session.datastore:
        return
    version = versions.open_version(config.datastore)
    if version.folder is None and not cluster_for(config, "session").scratch:
        raise UserError(
            f"session.datastore={config.session.datastore} lies at {version.backend.url}, where no files "
            "can be linked: cluster.scratch=FOLDER brings it to the node"
        )


def _over(_: Config) -> None:
    raise UserError("a session that has ended makes nothing that stands: asked for again it goes on")


_INPUTS: dict[str, Callable[[Config], object]] = {
    "download": _login,
    "process": _archives,
    "upload": _dataset,
    "train": _images,
    "session": _machine,
}
_OUTPUTS: dict[str, Callable[[Config], object]] = {
    "download": _archives,
    "process": _layout,
    "upload": _version,
    "train": lambda config: None,
    "session": _over,
}
