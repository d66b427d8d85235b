"""Typed schema of conf/: name, type, meaning, unit and bounds of every setting.

Default values are in conf/. A field without a default must be set there or on the command line. Hydra checks
names and types during composition; `bounds.check_values` checks values against the bounds declared here.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.input.slurm_values import parse_gib, parse_gpus, parse_minutes
from hpc_imagenet.config.names.tracker_names import parse_trackers
from hpc_imagenet.config.recipe import Model, Recipe
from hpc_imagenet.config.search import Search
from hpc_imagenet.config.setting import MISSING, setting
from hpc_imagenet.errors import UserError

STAGES = ("download", "process", "upload", "train", "evaluate", "price", "search", "pipeline", "session")
EXECUTORS = ("local", "slurm", "foreground")
RESIZE_VERSION = 2  # version of process.resize (1: by Pillow), part of the signature
PIXEL_VERSION = 2  # version of decoding and resizing (1: Pillow), part of the signature
SESSION_SHUTDOWN_MINUTES = 2  # added to session.time in the Slurm time limit, for a clean shutdown
CONTAINER_RUNTIMES = ("auto", "apptainer", "singularity", "charliecloud", "podman", "pyxis")
GPU_REQUESTS = ("gpus-per-node", "gres", "gpus-per-task")
LISTEN_MODES = ("auto", "loopback", "socket", "address")
OPEN_MAPPINGS = (  # any key
    *("cluster.stage", "cluster.sbatch", "dataset.archives", "dataset.splits", "model.options"),
    *("model.preprocessing", "recipe.optimizer_options"),
)
PATH_SETTINGS = (  # paths and URLs: taken as typed, without Hydra's grammar
    *("workspace", "dataset.source", "dataset.labels", "datastore.url", "download.login", "model.weights"),
    *("cluster.scratch", "notify"),
)
DATA_STAGES = ("download", "process", "upload", "pipeline")  # need dataset.source; the others a datastore


@dataclass
class StageSelection:
    """The stage to run: one of `STAGES`; `+stage=NAME` on the command line.

    The process and upload stages can be split into parts, each a parallel job; a final job without a part
    number merges their results. `part` and `parts` are filled by the plan.
    """

    name: str = setting("train", "stage to run", choices=STAGES)
    part: int | None = setting(None, "number of this part, 0 … parts - 1; set by the plan")
    parts: int = setting(1, "number of parts; set by the plan")


@dataclass
class Datastore:
    """A named, versioned dataset: `<url>/<name>/v<N>/`.

    `url` is a folder, user@host:/path or s3://bucket/prefix.
    `name` may pin a version: `name@vN`. `version` and `content` are filled at submission.
    """

    name: str = setting(MISSING, "name, or NAME@vN for a pinned version")
    url: str = setting(MISSING, "folder, user@host:/path or s3://bucket/prefix")
    version: int | None = setting(None, "version number; set at submission")
    content: str | None = setting(None, "hash of the images; set at submission")


@dataclass
class Loader:
    """Reading and decoding of images; changes the speed but not the result, except `loader.decode=gpu`."""

    workers: int | None = setting(None, "threads per rank; null: the CPUs of the task minus one", minimum=0)
    decode: str = setting(
        "cpu",
        "device that decodes; pixels differ slightly, so gpu is in the signature",
        choices=("cpu", "gpu"),
    )
    on_corrupt: str = setting("fail", "what to do about a corrupt image", choices=("fail", "skip"))


@dataclass
class Download:
    """The download stage.

    `login` is a file of mode 600 with cookies, a netrc or headers; no setting holds the secret itself.
    """

    connections: int = setting(MISSING, "concurrent byte ranges of one archive", minimum=1)
    limit: float | None = setting(
        MISSING, "MB (10^6 bytes) per second over all connections; null: unlimited", above=0
    )
    retries: int = setting(MISSING, "consecutive failed connections without a new byte", minimum=0)
    timeout: float = setting(MISSING, "s without a byte received", above=0)
    login: str | None = setting(
        MISSING, "file of mode 600 with cookies, a netrc or headers; null: environment, then ~/.netrc"
    )


@dataclass
class Process:
    """The process stage.

    `layout` is index (nothing is copied), shards (new tars, optionally with transformed images) or folders
    (class folders in addition to the index).
    """

    layout: str = setting(
        MISSING,
        "index: nothing is copied; shards: new tars; folders: class folders in addition to the index",
        choices=("index", "shards", "folders"),
    )
    tasks: int = setting(1, "parallel jobs; shards and folders only", minimum=1, maximum=9999)
    workers: int | None = setting(
        None, "processes per job; null: the CPUs of its task", minimum=1, maximum=9999
    )
    check: str = setting(
        MISSING, "header: read 2 kB of each image; decode: decode each image", choices=("header", "decode")
    )
    on_corrupt: str = setting(MISSING, "what to do about a corrupt image", choices=("fail", "skip"))
    shard_size: float = setting(MISSING, "GiB; this and the fields below: shards only", above=0)
    order: str = setting(
        MISSING,
        "order of the training images in the shards",
        choices=("archive", "shuffled"),
    )
    seed: int = setting(MISSING, "seed of the shuffle", minimum=0, maximum=2**32 - 1)
    resize: str | None = setting(MISSING, "short:PX or long:PX: maximum length of that side")
    quality: int = setting(MISSING, "JPEG quality of resized images", minimum=1, maximum=100)
    normalise: bool = setting(
        MISSING, "whether to convert PNG, CMYK and progressive JPEG to baseline RGB JPEG"
    )
    tile: bool = setting(MISSING, "whether to add restart markers to JPEGs (lossless)")

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide which files the stage writes, for the signature."""
        identity: dict[str, Any] = {"layout": self.layout, **self.image_identity()}
        if self.layout == "shards":
            identity |= {"shard_size": self.shard_size, "order": self.order, "tile": self.tile}
            identity |= {"seed": self.seed} if self.order == "shuffled" else {}
        return identity

    def image_identity(self) -> dict[str, Any]:
        """Return the settings that change the images of a training; empty if they equal the archives' images.

        Copying, shuffling and tiling keep the images, and the index keeps their order.
        """
        identity: dict[str, Any] = {}
        if self.resize:
            identity |= {"resize": self.resize, "quality": self.quality, "resizer": RESIZE_VERSION}
        if self.normalise:
            identity |= {"normalise": True}
        if self.on_corrupt == "skip":
            identity |= {"on_corrupt": "skip", "check": self.check}
        return identity


@dataclass
class Upload:
    """The upload stage; changes the speed, never the uploaded data."""

    tasks: int = setting(1, "parallel jobs", minimum=1, maximum=9999)
    connections: int = setting(8, "concurrent S3 requests per job", minimum=1)


@dataclass
class Train:
    """Settings of the train stage that do not change the result."""

    checkpoint_every_minutes: float = setting(MISSING, "minutes between checkpoints within an epoch", above=0)
    accumulate: int = setting(
        1, "micro-batches per step, if the share of a device does not fit its memory", minimum=1
    )
    bottleneck_after_seconds: float = setting(
        120, "s of training before bottleneck.json is written", minimum=0
    )
    deterministic: bool = setting(False, "on GPUs: deterministic algorithms only; slower")
    keep_checkpoints: int | None = setting(
        None, "newest epochs whose checkpoints are kept beside best and last; null or 0: none", minimum=0
    )
    share_loader: bool = setting(
        False, "runs of a sweep with the same images, batches and seed share one job and one loader"
    )
    share_runs: int = setting(4, "most runs that share a loader, in one job", minimum=1)
    share_wait_seconds: float = setting(
        60, "s that the runs of a shared loader wait for one of them, before it takes its own", minimum=0
    )


@dataclass
class Evaluate:
    """The evaluate stage. All fields are set by the command evaluate."""

    checkpoint: str | None = setting(None, "file of the checkpoint; set by the command evaluate")
    fingerprint: str | None = setting(None, "hash of that file; set by the command evaluate")
    split: str | None = setting(None, "split that is evaluated; set by the command evaluate")
    run: str | None = setting(None, "id of the training; set by the command evaluate")


@dataclass
class Session:
    """The session stage: Jupyter Lab on a node. The name identifies the session."""

    name: str = setting("me", "identifies the session and its folder")
    datastore: str | None = setting(
        None, "NAME or NAME@vN at datastore.url; the session's folder gets a link to it"
    )
    gpus: Any = setting(None, "GPUs of the session; null: cluster.gpus_per_node", minimum=0, parse=parse_gpus)
    time: Any = setting(240, "minutes until it ends, or 4:00:00", minimum=1, parse=parse_minutes)
    idle_minutes: float | None = setting(
        60, "minutes without activity before it ends; null: unlimited", above=0
    )
    listen: str = setting("auto", "where the server listens; see docs/session.md", choices=LISTEN_MODES)
    port: int | None = setting(None, "port of the server; null: any free port", minimum=1024, maximum=65535)


@dataclass
class Cluster:
    """Where jobs run and the resources they get. Null leaves a value to the cluster's default.

    `time`, `memory_gb` and `gpus_per_node` also take Slurm's notation; composition converts them.
    """

    executor: str = setting(MISSING, "what executes the jobs", choices=EXECUTORS)
    parallel: int | None = setting(
        None, "local: concurrent jobs; null: one per GPU, or one without GPUs", minimum=1
    )
    nodes: int = setting(1, "nodes of a training", minimum=1)
    gpus_per_node: Any = setting(
        None,
        "GPUs of each node, or TYPE:COUNT; null: one per local job if there are GPUs, none on Slurm",
        minimum=0,
        parse=parse_gpus,
    )
    gpu_request: str = setting("gpus-per-node", "Slurm: option that requests the GPUs", choices=GPU_REQUESTS)
    gpu_type: str | None = setting(None, "Slurm's name of the GPUs; null: that of gpus_per_node, or any")
    tasks_per_node: int | None = setting(
        None, "processes of each node; null: one per GPU, or one without GPUs", minimum=1
    )
    cpus_per_task: int | None = setting(None, "CPUs of each task", minimum=1)
    memory_gb: Any = setting(
        None, "GiB per node, or with a unit (64G, 512M); 0: all memory", minimum=0, parse=parse_gib
    )
    time: Any = setting(
        None,
        "time limit of a job: minutes, HH:MM:SS or D-HH:MM:SS",
        minimum=1,
        parse=parse_minutes,
    )
    partition: str | None = setting(None, "Slurm partition")
    account: str | None = setting(None, "Slurm account")
    qos: str | None = setting(None, "Slurm quality of service")
    constraint: str | None = setting(None, "Slurm node features")
    array_parallelism: int = setting(256, "concurrent jobs of one array", minimum=1)
    max_requeues: int = setting(10, "requeues after interruptions before a job fails", minimum=0)
    setup: list[str] = setting(factory=list, meaning="shell lines before the job: module load …")
    sbatch: dict[str, Any] = setting(factory=dict, meaning="more sbatch options, by their long names")
    srun: list[str] = setting(factory=list, meaning="more srun arguments")
    container: str | None = setting(None, "Slurm: image that the tasks run in; see docs/cluster.md")
    container_runtime: str = setting("auto", "what runs the image", choices=CONTAINER_RUNTIMES)
    container_args: list[str] = setting(factory=list, meaning="more arguments of the container runtime")
    host: str | None = setting(
        None, "login node user@host that carries out every command, by ssh; see docs/remote.md"
    )
    host_folder: str = setting(
        "hpc_imagenet", "folder on cluster.host with code and environment; relative paths start there"
    )
    host_python: str = setting("python3", "Python 3.10 to 3.13 on cluster.host, for the environment")
    login: str | None = setting(
        None, "login node's host name from your own machine, for tunnels; null: its own"
    )
    gpu_hour_price: float | None = setting(
        None, "money for an hour of one GPU, in any currency, for price=true", minimum=0
    )
    gpu_watts: float | None = setting(
        None, "W of one GPU in a training, with its share of node and cooling, for price=true", minimum=0
    )
    scratch: str | None = setting(None, "folder on each node's own disk; variables are expanded on the node")
    scratch_gb: float | None = setting(None, "GB for copies of shards; null: all free space", minimum=0)
    stage: dict[str, dict[str, Any]] = setting(factory=dict, meaning="any of the fields above, for one stage")

    @property
    def tasks_of_node(self) -> int:
        """Tasks of each node of a training: one per GPU, unless they are set."""
        return int(self.tasks_per_node or self.gpus_per_node or 1)

    @property
    def tasks(self) -> int:
        """Tasks of a training, over all its nodes."""
        return self.nodes * self.tasks_of_node


@dataclass
class Config:
    """One resolved combination of settings, as frozen in a run's folder."""

    workspace: str = setting(MISSING, "folder of everything that is written")
    seed: int = setting(MISSING, "seed of weights, order and augmentation", minimum=0, maximum=2**32 - 1)
    wait: bool = setting(MISSING, "wait for the jobs with a live table")
    dry_run: bool = setting(MISSING, "print what would be submitted, and submit nothing")
    price: bool = setting(False, "print what the trainings would cost, and submit none; see docs/price.md")
    sweep: str | None = setting(
        None, "name of the sweep that the runs belong to; null: made from a sweep's settings"
    )
    tracker: Any = setting(
        "tensorboard",
        "trackers of trainings, one or a list: tensorboard, wandb, mlflow, trackio; null: none",
        parse=parse_trackers,
    )
    notify: str | None = setting(
        None, "environment variable, or file of mode 600, with the URLs that get a message at the end"
    )
    stage: StageSelection = field(default_factory=StageSelection)
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
    evaluate: Evaluate = field(default_factory=Evaluate)
    session: Session = field(default_factory=Session)
    search: Search = field(default_factory=Search)

    def training_identity(self) -> dict[str, Any]:
        """Return the settings that decide a training's result, apart from its data, for the signature."""
        pixels = {"pixels": PIXEL_VERSION} | ({"decode": "gpu"} if self.loader.decode == "gpu" else {})
        return {"model": self.model.identity(), "recipe": self.recipe.identity(), "seed": self.seed, **pixels}


def from_dict(values: dict[str, Any]) -> Config:
    """Return the typed form of a resolved config, composed or read from a run's folder.

    Raises:
        UserError: names the setting that is unknown, missing or of the wrong type.
    """
    from hpc_imagenet.config.input.typed_values import typed_values

    # Source code goes past OmegaConf, which would resolve a `${…}` in it.
    source, others = {}, values
    if isinstance(model := values.get("model"), dict) and model.get("source"):
        source, others = model["source"], {**values, "model": {**model, "source": {}}}
    config = cast(Config, typed_values(Config, others))
    config.model.source = dict(source)
    return config


def cluster_for(config: Config, stage: str) -> Cluster:
    """Return the cluster settings of one stage: the general ones, overridden by `cluster.stage.<stage>`.

    For a session, `session.time` (plus shutdown time) and `session.gpus` override both.

    Raises:
        UserError: names an unknown setting in cluster.stage.
    """
    return cluster_from({"cluster": asdict(config.cluster), "session": asdict(config.session)}, stage)


def cluster_from(frozen: dict[str, Any], stage: str) -> Cluster:
    """Return the same as `cluster_for` from the plain values of a frozen config."""
    size = {}
    if stage == "session":
        session = frozen["session"]
        size = {"time": session["time"] + SESSION_SHUTDOWN_MINUTES}
        size |= {} if session["gpus"] is None else {"gpus_per_node": session["gpus"]}
    return _cluster(json.dumps(frozen["cluster"], sort_keys=True), stage, json.dumps(size))


@functools.lru_cache(maxsize=64)
def _cluster(values: str, stage: str, size: str) -> Cluster:
    # Cached because the merge takes 10 ms and the jobs of a sweep share their cluster settings.
    from hpc_imagenet.config.input.typed_values import typed_values

    general = json.loads(values)
    try:
        overrides = typed_values(Cluster, general).stage.get(stage, {})
        return cast(Cluster, typed_values(Cluster, general, overrides, json.loads(size)))
    except UserError as error:
        raise UserError(f"cluster.stage.{stage}.{error}") from None
