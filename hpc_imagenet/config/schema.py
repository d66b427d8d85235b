"""The typed schema of everything in conf/: names, units, limits.

It imports no other room but experiment.py, which has a part of it, and the user's error.

The values live in conf/, commented there. A field without a default must come from conf/ or the command
line. Hydra checks names and types while it composes; `limits.check` looks at what a type cannot say.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from hpc_imagenet.config.recipe import Model, Recipe
from hpc_imagenet.errors import UserError

STAGES = ("download", "process", "upload", "train", "pipeline", "session")
EXECUTORS = ("local", "slurm", "foreground")
PIXEL_VERSION = 2  # which way images are decoded and resized: 1 was Pillow's; another is another result
SESSION_SHUTDOWN_MINUTES = (
    2  # minutes that Slurm gives a session beyond session.time, in which it ends in order
)
LISTEN_MODES = ("auto", "loopback", "socket", "address")
OPEN_MAPPINGS = (
    "cluster.stage",
    "cluster.sbatch",
    "dataset.archives",
    "model.options",
)  # mappings with any key


@dataclass
class Stage:
    """What to run: one of `STAGES`; `+stage=NAME` on the command line.

    A stage of data may be cut into parts that run side by side, as jobs of their own; one more job, with no
    part, puts together what they made. Filled by the plan.
    """

    name: str = "train"
    part: int | None = None  # 0 … parts - 1
    parts: int = 1


@dataclass
class Archive:
    """One file to download. `md5` and `bytes` are checked where they are given."""

    file: str = MISSING
    md5: str | None = None
    bytes: int | None = None


@dataclass
class Dataset:
    """ILSVRC-shaped archives and where they come from.

    `source` is a folder or a URL prefix. `revision` names the data in signatures where no MD5 pins it.
    `make` is an importable `module:function` that writes the archives into the source folder where that
    folder does not exist yet. `hint` is shown behind a failed download.
    """

    name: str = MISSING
    source: str = MISSING
    revision: str = ""
    archives: dict[str, Archive] = field(default_factory=dict)  # keys: train, val, devkit
    make: str | None = None
    hint: str = ""


@dataclass
class Datastore:
    """A named, versioned dataset: `<url>/<name>/v<N>/`.

    `url` is a folder, user@host:/path or s3://bucket/prefix.
    `name` may pin a version as `name@vN`. `version` and `content` are filled at submission.
    """

    name: str = MISSING
    url: str = MISSING
    version: int | None = None
    content: str | None = None


@dataclass
class Loader:
    """How images reach the device; changes the speed, not the result, but for `decode=gpu`."""

    workers: int | None = None  # threads a rank; null: the CPUs of the task less one
    decode: str = "cpu"  # cpu or gpu, whose pixels differ a little: it is in the signature
    on_corrupt: str = "fail"  # fail or skip


@dataclass
class Download:
    """The download stage.

    `login` is a file of mode 600 with cookies, a netrc or headers; the secret itself is never a setting.
    """

    connections: int = MISSING  # ranges of one archive at a time
    limit: float | None = MISSING  # MB (10^6 bytes) a second over all connections; null: none
    retries: int = MISSING  # broken connections in a row without a new byte
    timeout: float = MISSING  # s without a byte
    login: str | None = MISSING


@dataclass
class Process:
    """The process stage.

    `layout` is index (no byte copied), shards (new tars, and what is done to the images on the way) or
    folders (class folders besides the index).
    """

    layout: str = MISSING
    tasks: int = 1  # parts that run side by side, as jobs of their own; of shards and folders
    workers: int | None = None  # processes a job; null: the CPUs of its task
    check: str = MISSING  # header: 2 kB of each image are read; decode: all of it, and it is decoded
    on_corrupt: str = MISSING  # fail or skip
    shard_size: float = MISSING  # GiB; all from here on: shards only
    order: str = MISSING  # archive or shuffled: how the images of train lie in the shards
    seed: int = MISSING  # of that shuffle
    resize: str | None = MISSING  # short:PX or long:PX: larger images are made so small
    quality: int = MISSING  # of the JPEGs that resize writes, 1 to 100
    normalise: bool = MISSING  # whether PNG, CMYK and progressive become baseline RGB JPEGs
    tile: bool = MISSING  # whether JPEGs get restart markers, without loss

    def identity(self) -> dict[str, Any]:
        """Return what decides which files the stage leaves; beside the archives."""
        mine: dict[str, Any] = {"layout": self.layout, **self.image_identity()}
        if self.layout == "shards":
            mine |= {"shard_size": self.shard_size, "order": self.order, "tile": self.tile}
            mine |= {"seed": self.seed} if self.order == "shuffled" else {}
        return mine

    def image_identity(self) -> dict[str, Any]:
        """Return what decides which pictures a training sees; empty where they are those of the archives.

        Shards that are copied, shuffled or tiled hold the same pictures, and the index keeps their order.
        """
        mine: dict[str, Any] = {}
        if self.resize:
            mine |= {"resize": self.resize, "quality": self.quality}
        if self.normalise:
            mine |= {"normalise": True}
        if self.on_corrupt == "skip":
            mine |= {"on_corrupt": "skip", "check": self.check}
        return mine


@dataclass
class Upload:
    """The upload stage; changes the speed, never what arrives."""

    tasks: int = 1  # parts that run side by side, as jobs of their own
    connections: int = 8  # requests at a time a job, to S3


@dataclass
class Train:
    """The train stage, as far as it does not change the result."""

    checkpoint_every_minutes: float = MISSING
    accumulate: int = 1  # parts of a step, where a device's share of the global batch exceeds its memory
    bottleneck_after_seconds: float = 120  # until it is told what the training waits for
    deterministic: bool = False  # on a GPU: the same algorithms in every process; slower


@dataclass
class Session:
    """The session stage: Jupyter Lab on a node. What is asked for by the same name is the same session."""

    name: str = "me"
    datastore: str | None = None  # NAME or NAME@vN at datastore.url, linked into the session's folder
    gpus: int | None = None  # null: as the cluster says
    time: int = 240  # minutes
    idle_minutes: float | None = 60  # without activity, until it ends; null: it does not
    listen: str = "auto"  # one of LISTEN
    port: int | None = None  # null: a free one


@dataclass
class Cluster:
    """Where jobs run and what they may use. Null leaves a value to the cluster's own default."""

    executor: str = MISSING  # one of EXECUTORS
    parallel: int | None = None  # local: jobs at a time; null: one a GPU, else one
    nodes: int = 1
    gpus_per_node: int | None = None  # null: one a local job where there are GPUs, none on Slurm
    tasks_per_node: int | None = None  # null: one a GPU, else one
    cpus_per_task: int | None = None
    memory_gb: float | None = None  # GiB a node; 0: all that it has
    time: int | None = None  # minutes
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    array_parallelism: int = 256  # jobs of one array at a time
    max_requeues: int = 10
    setup: list[str] = field(default_factory=list)  # shell lines before the job: module load …
    sbatch: dict[str, Any] = field(default_factory=dict)  # more options of sbatch, by their long names
    srun: list[str] = field(default_factory=list)  # more arguments of srun
    login: str | None = (
        None  # how your own machine calls the login node, for tunnels; null: as it calls itself
    )
    scratch: str | None = None  # folder on each node's own disk; variables are put in on the node
    scratch_gb: float | None = None  # GB that copies of shards may take there; None: what is free
    stage: dict[str, dict[str, Any]] = field(default_factory=dict)  # any of the above, for one stage


@dataclass
class Config:
    """One resolved combination: what a job is frozen as."""

    workspace: str = MISSING
    seed: int = MISSING
    wait: bool = MISSING
    dry_run: bool = MISSING
    stage: Stage = field(default_factory=Stage)
    cluster: Cluster = field(default_factory=Cluster)
    dataset: Dataset = field(default_factory=Dataset)
    datastore: Datastore = field(default_factory=Datastore)
    model: Model = field(default_factory=Model)
    recipe: Recipe = field(default_factory=Recipe)
    loader: Loader = field(default_factory=Loader)
    download: Download = field(default_factory=Download)
    process: Process = field(default_factory=Process)
    upload: Upload = field(default_factory=Upload)
    train: Train = field(default_factory=Train)
    session: Session = field(default_factory=Session)

    def training_identity(self) -> dict[str, Any]:
        """Return what decides the result of a training, beside its data."""
        pixels = {"pixels": PIXEL_VERSION} | ({"decode": "gpu"} if self.loader.decode == "gpu" else {})
        return {"model": self.model.identity(), "recipe": self.recipe.identity(), "seed": self.seed, **pixels}


def from_dict(values: dict[str, Any]) -> Config:
    """Return the typed form of a resolved config, as composed or as frozen in a run's folder.

    Raises:
        UserError: a name, a type or a missing value, with the setting's full name.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), values)
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(explain_omegaconf_error(error)) from None


def explain_omegaconf_error(error: OmegaConfBaseException) -> str:
    """Say an OmegaConf error in one line that begins with the setting's name."""
    setting = error.full_key or "config"
    if isinstance(error, ConfigKeyError):
        return f"{setting} is an unknown setting"
    if "missing mandatory value" in str(error).lower():
        return f"{setting} is not set: add {setting}=VALUE"
    return f"{setting}: {str(error).splitlines()[0]}"


def cluster_for(config: Config, stage: str) -> Cluster:
    """Return the cluster settings of one stage: the general ones with `cluster.stage.<stage>` laid over.

    A session's size is laid over both: `session.time`, with time to end in, and `session.gpus`.

    Raises:
        UserError: a misspelt setting under cluster.stage.
    """
    return cluster_from({"cluster": asdict(config.cluster), "session": asdict(config.session)}, stage)


def cluster_from(frozen: dict[str, Any], stage: str) -> Cluster:
    """Return the same from the plain values of a frozen config."""
    size = {}
    if stage == "session":
        asked = frozen["session"]
        size = {"time": asked["time"] + SESSION_SHUTDOWN_MINUTES}
        size |= {} if asked["gpus"] is None else {"gpus_per_node": asked["gpus"]}
    return _cluster(json.dumps(frozen["cluster"], sort_keys=True), stage, json.dumps(size))


@functools.lru_cache(maxsize=64)
def _cluster(values: str, stage: str, size: str) -> Cluster:
    # OmegaConf takes 10 ms for it, and the jobs of a sweep have theirs in common.
    try:
        general = OmegaConf.merge(OmegaConf.structured(Cluster), json.loads(values))
        laid_over = general.stage.get(stage, {})
        return cast(Cluster, OmegaConf.to_object(OmegaConf.merge(general, laid_over, json.loads(size))))
    except OmegaConfBaseException as error:
        raise UserError(f"cluster.stage.{stage}.{explain_omegaconf_error(error)}") from None
