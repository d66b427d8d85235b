"""How long the parts of a training took, by the shape of the training: what prices are computed from.

    runs/.times-<uid>/<hash of the shape>.json

Trainings and price jobs write the file on the node; the newest one counts. Any file may be deleted at any
time. The shape is everything that decides the speed: two trainings that differ in the learning rate or the
number of epochs share one.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc_imagenet.config.schema import Cluster, Config
from hpc_imagenet.io.atomic_files import read_json, write_json
from hpc_imagenet.io.ownership import make_own_folder
from hpc_imagenet.runs.job import signature
from hpc_imagenet.runs.store import folder_of_user

VERSION = 1  # of the files
_RECIPE = (  # settings that change the speed of a step; image sizes are added by `training_shape`
    *("optimizer", "optimizer_options", "precision", "ema", "ema_every", "augment", "blurpool", "freeze"),
    *("crop_scale", "val_resize", "val_size", "val_flip"),
)


@dataclass(frozen=True)
class Time:
    """A duration, and the CPU time of the process in it, both in s."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Time) -> Time:
        return Time(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Time) -> Time:
        return Time(self.wall - other.wall, self.cpu - other.cpu)

    def __mul__(self, factor: float) -> Time:
        return Time(self.wall * factor, self.cpu * factor)


ZERO = Time()


@dataclass(frozen=True)
class PassTime:
    """The time of passes over batches: one costs `overhead + batches * batch`, and the first `first` more."""

    batch: Time
    overhead: Time = ZERO  # to start the loader and fill its queue
    first: Time = ZERO  # once: memory is allocated, kernels are chosen or compiled


@dataclass(frozen=True)
class TimeRecord:
    """The parts of one training.

    Attributes:
        run: id of the run that was timed.
        host: node that it ran on.
        device: name of the device, CPU or that of the GPU.
        cpus: CPUs of a task.
        train: time of an epoch's device batches by the side of the images, px.
        validation: time of a validation.
        after: time from the end of a validation to the next epoch: the checkpoint.
        startup: time from the start of the process to the first epoch.
        end: time from the last epoch to the result.
        waiting: share of the time, 0 to 1, in which the device waited for data; None: not measured.
        suggestion: setting that would make the loader fast enough; empty if it is.
        memory: bytes of host memory that the job's tasks of one node have used at most.
        staged: bytes of the dataset in the node's cache, and of the whole; None without cluster.scratch.
        short: whether a price job timed it, rather than the training itself.
        shape: what decides the speed; see `training_shape`.
    """

    run: str
    host: str
    device: str
    cpus: int
    train: Mapping[int, PassTime]
    validation: PassTime
    after: Time
    startup: Time
    end: Time
    waiting: float | None = None
    suggestion: str = ""
    memory: int = 0
    staged: tuple[int, int] | None = None
    short: bool = False
    shape: Mapping[str, Any] = field(default_factory=dict)

    def epoch(self, size: int) -> PassTime:
        """Return the time of an epoch's batches at `size` px; one that was not timed by its pixels.

        Between two measured sizes, and beyond them, a batch costs `a + b * pixels`; with one measured size
        it is proportional to the pixels.
        """
        if size in self.train:
            return self.train[size]
        near = sorted(self.train, key=lambda px: abs(px - size))[:2]
        one = self.train[near[0]]
        if len(near) == 1:
            batch = one.batch * (size**2 / near[0] ** 2)
        else:
            share = (size**2 - near[0] ** 2) / (near[1] ** 2 - near[0] ** 2)
            batch = one.batch + (self.train[near[1]].batch - one.batch) * share
            if batch.wall <= 0 or batch.cpu < 0:
                batch = one.batch * (size**2 / near[0] ** 2)
        return PassTime(batch, one.overhead, one.first)


def training_shape(config: Config, cluster: Cluster) -> dict[str, Any]:
    """Return what decides the speed of a training, as JSON values.

    Args:
        config: the config, with the content of its datastore.
        cluster: the resources of the job.
    """
    recipe, tasks = config.recipe, 1 if config.train.share_loader else cluster.tasks_of_node
    place: list[Any] = [cluster.partition, cluster.constraint, cluster.gpu_type]
    if cluster.executor != "slurm":  # jobs of this machine share its CPUs
        place = [socket.gethostname(), cluster.parallel]
    model = {k: v for k, v in config.model.identity().items() if not k.startswith("weights")}
    return {
        "model": {**model, "compile": config.model.compile},
        "data": [config.datastore.content, bool(cluster.scratch), config.loader.decode],
        "loader": [config.loader.workers, config.train.share_loader],
        "sizes": sorted(set(recipe.sizes)),
        "recipe": {name: getattr(recipe, name) for name in _RECIPE},
        "mixes": [recipe.mixup > 0, recipe.cutmix > 0, recipe.erase > 0],
        "batch": [recipe.global_batch / (cluster.nodes * tasks), config.train.accumulate],
        "deterministic": config.train.deterministic,
        "place": place,
        "resources": [cluster.gpus_per_node and 1, cluster.cpus_per_task],
        "nodes": cluster.nodes,
        "tasks": tasks,
    }


def times_folders(runs: Path) -> list[Path]:
    """Return the folders of records below the folder of all runs; that of this user comes first."""
    own = folder_of_user(runs, "times")
    return sorted(runs.glob(".times-*"), key=lambda path: (path != own, path.name))


def record_path(runs: Path, shape: Mapping[str, Any]) -> Path:
    """Return this user's file of a shape, below the folder of all runs."""
    return folder_of_user(runs, "times") / f"{signature(shape)}.json"


def write_record(runs: Path, record: TimeRecord) -> None:
    """Write the record of its shape; a newer one replaces an older one.

    Raises:
        UserError: another user could write the folder.
        OSError: the disk is full.
    """
    path = record_path(runs, record.shape)
    make_own_folder(path.parent)
    write_json(path, {"version": VERSION, **asdict(record)})


def find_record(runs: Path, shape: Mapping[str, Any]) -> TimeRecord | None:
    """Return the record of a shape, this user's before that of another.

    None if there is none, or all are damaged or of another version.
    """
    name = record_path(runs, shape).name
    found = (_read(folder / name) for folder in times_folders(runs))
    return next((record for record in found if record), None)


def _read(path: Path) -> TimeRecord | None:
    try:
        raw = read_json(path)
        if raw is None or raw.pop("version") != VERSION:
            return None
        return _parsed(raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _parsed(raw: dict[str, Any]) -> TimeRecord:
    for name in ("after", "startup", "end"):
        raw[name] = _time(raw[name])
    raw["train"] = {int(size): _pass(value) for size, value in raw["train"].items()}
    raw["validation"] = _pass(raw["validation"])
    if raw["staged"] is not None:
        cached, whole = raw["staged"]
        raw["staged"] = int(cached), int(whole)
    if not raw["train"] or not int(raw["shape"]["nodes"]) * int(raw["shape"]["tasks"]) * int(raw["cpus"]):
        raise ValueError("no epoch was timed")
    return TimeRecord(**raw)


def _pass(raw: dict[str, Any]) -> PassTime:
    return PassTime(*(_time(raw[name]) for name in ("batch", "overhead", "first")))


def _time(raw: dict[str, Any]) -> Time:
    wall, cpu = float(raw["wall"]), float(raw["cpu"])
    if not (math.isfinite(wall) and math.isfinite(cpu)):
        raise ValueError(f"{wall} s is not a duration")
    return Time(wall, cpu)
