"""What a training costs: its time, from a `TimeRecord` of the same shape, and how often Slurm starts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpc_imagenet.cluster.gpus import available_gpus
from hpc_imagenet.config.schema import Cluster, Config, cluster_for
from hpc_imagenet.datastore.versions import open_version
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.slurm_jobs.resource_requests import warning_seconds
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.runs.time_record import ZERO, Time, TimeRecord, find_record, training_shape
from hpc_imagenet.stages.price_stage import PRICE, price_config
from hpc_imagenet.stages.train_stage import TRAIN

DATA, DEVICE, NETWORK = "data", "device", "network"
_WAITING = 0.1  # share of the time without data from which a training counts as bound by it
_SLOWER = 0.9  # rate of a GPU among others, of that of one alone, below which the network bounds it
_TOLERANCE = 0.1  # of a price: a time limit is refused only if it is too short by more


@dataclass(frozen=True)
class Images:
    """Number of images of the two splits that a training reads."""

    train: int
    val: int


@dataclass(frozen=True)
class KnownTimes:
    """What is recorded for the shape of a training.

    Attributes:
        record: of its own shape, or of one of its tasks alone.
        alone: of one of its tasks, if it has several.
    """

    record: TimeRecord
    alone: TimeRecord | None

    @property
    def bound(self) -> str:
        """What bounds the speed of a step: data, device or network."""
        record, alone = self.record, self.alone
        if (record.waiting or 0.0) >= _WAITING:
            return DATA
        if alone and alone is not record:
            slower = [px for px in record.train if _rate(alone, px) * _SLOWER > _rate(record, px)]
            return NETWORK if slower else DEVICE
        return DEVICE


@dataclass(frozen=True)
class Price:
    """The price of one training.

    Attributes:
        job: the training.
        state: its state; finished and active trainings are free.
        known: the times it is computed from; None if it is free, or nothing is recorded.
        work: time of all that remains to be computed, without startup; of one task.
        starts: how often the job is started: 1, and each time that it reaches its time limit. infinity: the
            limit is too short for any work.
        allowed: how often it may be started.
    """

    job: Job
    state: State
    known: KnownTimes | None = None
    work: Time = ZERO
    starts: float = 1
    allowed: float = math.inf

    @property
    def free(self) -> bool:
        """Whether it need not be computed: it is finished, or running already."""
        return self.state.finished or self.state.active

    @property
    def total(self) -> Time:
        """Time of all its starts, without waiting in queues; of one task."""
        if self.known is None or math.isinf(self.starts):
            return self.work
        return self.work + self.known.record.startup * self.starts

    @property
    def gpus(self) -> int:
        """GPUs that it occupies; 0: a training on CPUs."""
        if self.known is None or self.known.record.device == "CPU":
            return 0
        return tasks_of(self.job)

    @property
    def device_hours(self) -> float:
        """Hours of its GPUs or, without, of its CPUs."""
        if self.known is None:
            return 0.0
        count = self.gpus or tasks_of(self.job) * self.known.record.cpus
        return self.total.wall / 3600 * count

    @property
    def money(self) -> float | None:
        """GPU-hours times `cluster.gpu_hour_price`; None if that is not set, or it has no GPU."""
        rate = self.job.cluster.gpu_hour_price
        return rate * self.device_hours if rate is not None and self.gpus else None

    @property
    def energy(self) -> float | None:
        """Energy of its GPUs in kWh, at `cluster.gpu_watts`; None if that is not set, or it has no GPU."""
        watts = self.job.cluster.gpu_watts
        return watts * self.device_hours / 1000 if watts is not None and self.gpus else None

    @property
    def too_long(self) -> bool:
        """Whether it would certainly not end within its time limit and its requeues."""
        if self.known is None or self.free:
            return False
        return exceeds_limit(self.work.wall, self.known.record.startup.wall, self.job.cluster)

    @property
    def minutes_needed(self) -> int:
        """A `cluster.time` in minutes with which it ends within its requeues."""
        assert self.known is not None
        return minutes_needed(self.work.wall, self.known.record.startup.wall, self.job.cluster)

    @property
    def settings_needed(self) -> str:
        """The settings with either of which it ends: more requeues, or a longer time limit."""
        assert self.known is not None
        return settings_needed(self.work.wall, self.known.record.startup.wall, self.job.cluster)


def price(job: Job, run: Run | None, state: State, known: KnownTimes | None, images: Images) -> Price:
    """Return the price of a training.

    Args:
        job: the training.
        run: its run, whose progress counts; None: from its beginning.
        state: its state.
        known: what is recorded for its shape; None: nothing.
        images: size of the dataset.
    """
    if known is None or state.finished or state.active:
        return Price(job, state)
    work = _work(job, known.record, images, _epochs_done(job, run, images) if run else 0)
    starts = _starts(work.wall, known.record.startup.wall, job.cluster)
    return Price(job, state, known, work, starts, _allowed_starts(job.cluster))


def exceeds_limit(work: float, startup: float, cluster: Cluster) -> bool:
    """Whether a job would certainly not end within its time limit and its requeues.

    Args:
        work: s that it computes, without startup.
        startup: s of each start.
        cluster: its resources.
    """
    return _starts(work * (1 - _TOLERANCE), startup, cluster) > _allowed_starts(cluster)


def minutes_needed(work: float, startup: float, cluster: Cluster) -> int:
    """Return a `cluster.time` in minutes with which a job ends within its requeues; as `exceeds_limit`."""
    part = work * (1 + _TOLERANCE) / _allowed_starts(cluster)
    return math.ceil((part + startup + warning_seconds(None)) / 60)


def settings_needed(work: float, startup: float, cluster: Cluster) -> str:
    """Return the settings with either of which a job ends; as `exceeds_limit`.

    A partition may allow no longer limit. More requeues are proposed where jobs are requeued, and a start
    computes for longer than it takes to begin.
    """
    time = f"cluster.time={minutes_needed(work, startup, cluster)}"
    usable = (_limit(cluster) or 0) - startup - warning_seconds(cluster.time)
    if not _requeues(cluster) or usable <= startup:
        return time
    return f"cluster.max_requeues={math.ceil(work * (1 + _TOLERANCE) / usable) - 1} or {time}"


def known_times(job: Job, store: RunStore) -> KnownTimes | None:
    """Return what is recorded for the shape of a training; None: nothing that can be read."""
    config = price_config(job.config)
    alone = find_record(store.folder, training_shape(config, cluster_for(config, PRICE.name)))
    if tasks_of(job) == 1:
        return KnownTimes(alone, None) if alone else None
    record = find_record(store.folder, training_shape(job.config, job.cluster)) or alone
    return KnownTimes(record, alone) if record else None


def images_of(job: Job) -> Images:
    """Return the size of the dataset that a training reads.

    Raises:
        UserError: it does not exist yet.
    """
    splits = open_version(job.config.datastore).manifest.splits
    return Images(*(splits[name].images if name in splits else 0 for name in ("train", "val")))


def sweep_seconds(prices: Sequence[Price]) -> float:
    """Return the s until all trainings have ended, if as many run at a time as the settings allow."""
    slots = [0.0] * max((jobs_at_once(each.job.cluster, len(prices)) for each in prices), default=1)
    for each in prices:
        at = slots.index(min(slots))
        slots[at] += each.total.wall
    return max(slots)


def jobs_at_once(cluster: Cluster, jobs: int) -> int:
    """Return how many of so many trainings, or workers of a search, run at a time."""
    if cluster.executor == "slurm":
        most = cluster.array_parallelism
    else:
        most = 1 if cluster.executor == "foreground" else _places_here(cluster)
    return max(1, min(jobs, most))


def tasks_of(job: Job) -> int:
    """Return the number of tasks of a training: one per GPU, and one if it shares a loader."""
    return 1 if job.config.train.share_loader else job.cluster.tasks


def _places_here(cluster: Cluster) -> int:
    """Return how many jobs the local queue runs at a time, each with GPUs of its own."""
    from hpc_imagenet.launch.local_jobs.local_worker import gpus_for

    gpus = len(available_gpus())
    places, of_each = cluster.parallel or gpus, gpus_for(cluster, TRAIN.name, gpus)
    return min(places, gpus // of_each) if 0 < of_each <= gpus else places


def _work(job: Job, record: TimeRecord, images: Images, done: float) -> Time:
    """Return the time from epoch `done` to the end, without the startup of the job."""
    config, recipe, tasks = job.config, job.config.recipe, tasks_of(job)
    batches = images.train // recipe.global_batch * config.train.accumulate
    validation = _validation(record, config, images, tasks)
    total = record.end
    seen: set[int] = set()
    for number, size in enumerate(recipe.sizes):
        share = min(1.0, max(0.0, number + 1 - done))  # of this epoch, that remains
        if share == 0:
            continue
        times = record.epoch(size)
        total += (times.overhead + times.batch * batches) * share + validation + record.after
        if size not in seen:
            total += times.first
            seen.add(size)
    if seen:
        total += record.validation.first
    # Checkpoints within an epoch; where the training itself was timed, they are in its epochs.
    extra = int(total.wall / (60 * config.train.checkpoint_every_minutes)) if record.short else 0
    return total + record.after * extra


def _validation(record: TimeRecord, config: Config, images: Images, tasks: int) -> Time:
    """Return the time of a validation, whose batches may be smaller than those that were timed."""
    largest = config.recipe.global_batch // (tasks * config.train.accumulate)
    per_task = -(-images.val // tasks)
    batch = min(largest, per_task)
    timed = min(largest, -(-images.val // (int(record.shape["nodes"]) * int(record.shape["tasks"]))))
    return record.validation.overhead + record.validation.batch * (-(-per_task // batch) * batch / timed)


def _epochs_done(job: Job, run: Run, images: Images) -> float:
    """Return how many epochs an earlier attempt has completed, as far as its progress shows."""
    recipe, progress = job.config.recipe, run.progress
    per_epoch = images.train // recipe.global_batch * recipe.global_batch
    done, total = progress.get("done"), progress.get("total")
    if not isinstance(done, (int, float)) or total != per_epoch * recipe.epochs or not total:
        return 0.0
    return float(min(max(0.0, done / per_epoch), recipe.epochs))


def _starts(work: float, startup: float, cluster: Cluster) -> float:
    limit = _limit(cluster)
    if not limit:
        return 1
    usable = limit - startup - warning_seconds(cluster.time)
    if work + startup <= limit:
        return 1
    return math.ceil(work / usable) if usable > 0 else math.inf


def _allowed_starts(cluster: Cluster) -> float:
    """Return how often a job may be started; infinity: it has no time limit."""
    if not _limit(cluster):
        return math.inf
    return 1 + (cluster.max_requeues if _requeues(cluster) else 0)


def _limit(cluster: Cluster) -> float | None:
    """Return the time limit in s; None: there is none."""
    return 60.0 * cluster.time if cluster.executor == "slurm" and cluster.time else None


def _requeues(cluster: Cluster) -> bool:
    from hpc_imagenet.launch.slurm_jobs.sbatch import extra_sbatch_options

    return "requeue" in extra_sbatch_options(cluster)


def _rate(record: TimeRecord, size: int) -> float:
    """Return the batches/s of a task at a size."""
    return 1 / max(1e-9, record.epoch(size).batch.wall)
