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

from hpc_imagenet.archives import receipt
from hpc_imagenet.archives.login import Login
from hpc_imagenet.backbones import BACKBONES
from hpc_imagenet.config import Config, Datastore, cluster_for
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.manifest import Manifest, load_manifest
from hpc_imagenet.errors import UserError, near
from hpc_imagenet.experiment import names_weights
from hpc_imagenet.plan import Job
from hpc_imagenet.runs import Record
from hpc_imagenet.states import states


def executor(name: str) -> str:
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


def workspace(path: Path) -> None:
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


def finder() -> Callable[[Datastore], Datastore | None]:
    """Return a look-up for `plan.plan`: a datastore's newest (or pinned) version, each once."""
    known: dict[tuple[str, str, int | None], Datastore | None] = {}

    def found(datastore: Datastore) -> Datastore | None:
        key = (datastore.url, datastore.name, datastore.version)
        if key not in known:
            name, _ = versions.parse(datastore.name)
            known[key] = None
            if versions.complete(datastore.url, name):
                version = versions.open_version(datastore)
                known[key] = replace(datastore, version=version.number, content=version.manifest.content)
        return known[key]

    return found


def jobs(plan: Sequence[Job], record: Record) -> None:
    """Refuse a plan with a job that cannot run: an unknown model, an input that nobody makes.

    Raises:
        UserError: the first job's trouble, and the setting or the stage that mends it.
    """
    planned = {job.run for job in plan}
    answered = set()  # of a sweep's trainings; a place elsewhere is not asked again for each
    for job in plan:
        _model(job)
        _shape(job)
        question = (astuple(job.config.datastore), job.cluster.scratch, job.config.recipe.global_batch)
        if job.stage == "train":
            if question in answered:
                continue
            answered.add(question)
        _readable(job)
        _pinned_version(job)
        if any(need in planned for need in job.needs):
            continue
        told = states(record.run(need) for need in job.needs if record.run(need).attempt)
        if any(state.active for state in told.values()):
            continue
        _INPUTS[job.stage](job.config)


def stands(job: Job) -> bool:
    """Whether what a finished job made is still there, so that it need not run again."""
    try:
        _OUTPUTS[job.stage](job.config)
    except UserError:
        return False
    return True


def _model(job: Job) -> None:
    if job.stage == "train" and job.config.model.name not in BACKBONES:
        raise UserError(
            f"model.name={job.config.model.name} is unknown{near(job.config.model.name, BACKBONES)}"
        )
    weights = job.config.model.weights
    if job.stage == "train" and job.config.recipe.freeze and not weights:
        raise UserError(
            "recipe.freeze=true trains the classifier alone: on what? model.weights=IMAGENET1K_V1, or a file"
        )
    if job.stage == "train" and weights and not names_weights(weights) and not Path(weights).is_file():
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
    if job.stage == "train" and versions.remote(job.config.datastore.url):
        store = job.config.datastore
        versions.check_readable(versions.locate(store.url), job.cluster.scratch, store.name)


def _login(config: Config) -> None:
    """Read a login before a job waits hours in a queue for saying that it cannot."""
    if config.download.login is not None:
        Login(config.dataset.source, config.download.login)


def _archives(config: Config) -> None:
    folder = Path(config.workspace) / "archives" / config.dataset.name
    files = [archive.file for archive in config.dataset.archives.values()]
    if absent := receipt.missing(folder, files):
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
        raise UserError(f"{folder} was made from other archives: +stage=process makes it again")
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
    train = versions.open_version(config.datastore).manifest.splits.get("train")
    batch = config.recipe.global_batch
    if train and train.images < batch:
        raise UserError(f"recipe.global_batch={batch} is more than the {train.images} images of train")


def _pinned_version(job: Job) -> None:
    """Refuse an upload to a version that stands, and a datastore's name that is none."""
    store = job.config.datastore
    name, number = versions.parse(store.name)
    if job.stage != "upload" or number is None or number not in versions.complete(store.url, name):
        return
    if versions.open_version(replace(store, content=None)).manifest.content != store.content:
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
            f"session.datastore={config.session.datastore} lies at {version.place.url}, where no files "
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
