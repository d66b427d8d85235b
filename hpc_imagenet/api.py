"""Python API: the same functions as the command line, with handles on runs.

    import hpc_imagenet
    (run,) = hpc_imagenet.submit("dataset=digits model=resnet18")
    run.state(), run.result()["top1"]

The public names can be imported from `hpc_imagenet`, which loads this module on first use.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_imagenet.config.input.stored_settings import stored_value
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.runs.store import Run, RunStore

if TYPE_CHECKING:
    from hpc_imagenet.cli.submit import PreparedPlan
    from hpc_imagenet.training.loading.image_store import ImageStore
    from hpc_imagenet.training.prototype import Prototype

_POLL_INTERVAL = 0.5  # s


class Handle:
    """A run and its newest attempt. Two handles of the same run are equal.

    Attributes:
        id: the run's id, such as `c0ffee00-resnet18`.
        folder: the run's folder, with its frozen config, logs, metrics and checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self._run = Run(folder)
        self._since = time.monotonic()
        self.id = self._run.id
        self.folder = folder

    def __repr__(self) -> str:
        return f"<{self.id}: {self.state()}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other.folder == self.folder

    def __hash__(self) -> int:
        return hash(self.folder)

    def state(self) -> str:
        """Return queued, running, finished, failed, cancelled or pruned.

        Slurm's reply is cached, for longer the older the handle is (at most 15 s); the end of a run is
        visible immediately.
        """
        from hpc_imagenet.launch.states import state

        return state(self._run, self._since).name

    def reason(self) -> str:
        """Return the reason for the state in one line, such as a Slurm reason or an error; may be empty."""
        from hpc_imagenet.launch.states import state

        return state(self._run, self._since).reason

    def progress(self) -> dict[str, Any]:
        """Return the progress: done, total, unit, rate (per second), note, time; empty at first."""
        return self._run.progress

    def result(self, seconds: float | None = None) -> dict[str, Any]:
        """Wait for the end of the run and return its result, such as top1 and top5 (0 to 1) of a training.

        Args:
            seconds: timeout in s; None: no timeout.

        Raises:
            UserError: the run failed or was cancelled; contains the reason.
            TimeoutError: the run has not ended in time; it keeps running.
        """
        from hpc_imagenet.launch.states import state
        from hpc_imagenet.launch.watched_runs import WatchedRuns

        began, watched = time.monotonic(), WatchedRuns()
        end = None if seconds is None else began + seconds
        while not (current := state(self._run, began)).ended:
            watched.keep_going([self._run])
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"{self.id} is {current.name} after {seconds:g} s")
            time.sleep(_POLL_INTERVAL)
        if not current.finished:
            raise UserError(f"{self.id} {current.name}: {current.reason}")
        attempt = self._run.attempt
        outcome = attempt.outcome if attempt else None
        return (outcome.result if outcome else None) or {}

    def logs(self) -> str:
        """Return the output of the newest attempt so far, stdout before stderr."""
        attempt = self._run.attempt
        return "".join(log.read_text(errors="replace") for log in attempt.logs()) if attempt else ""

    def cancel(self) -> None:
        """Stop the run if it is queued or running.

        Raises:
            UserError: it is a Slurm job, and Slurm cannot be reached from this machine.
        """
        from hpc_imagenet.launch.submission import cancel_run

        cancel_run(self._run)

    def retry(self, *settings: str, again: bool = False) -> None:
        """Continue the run from where it stopped, and the failed or cancelled runs that it needs.

        Args:
            settings: `SETTING=VALUE` outside the signature, instead of the remedy of the run's diagnosis.
            again: whether to submit it unchanged, although it would fail, or has failed twice, the same way.

        Raises:
            UserError: it would fail again, it was not submitted to a queue, or Slurm refused it.
        """
        from hpc_imagenet.launch.retries.retry_plan import plan_retry, send_retry

        store = RunStore(self.folder.parents[1])
        send_retry(store, plan_retry(store, [self._run], settings, again))


def submit(overrides: str | Sequence[str], config_dir: str | None = None) -> list[Handle]:
    """Submit jobs as the command line does, and return at once; commas in overrides make a sweep.

    Args:
        overrides: settings, such as `"+stage=pipeline dataset=digits"`, or a list of them.
        config_dir: a folder with config groups in addition to conf/.

    Returns:
        A handle per job, each before those that need it, including runs that were finished or running
        already. With `cluster=foreground` or `wait=true` the runs have ended (sessions are running). With
        `dry_run=true` or `price=true` the list is empty, and the jobs or their prices are printed.

    Raises:
        JobsRefused: Slurm refused a job; the runs in its `entries` are submitted.
        UserError: invalid input; nothing was submitted.
    """
    from hpc_imagenet.cli.submit import prepare
    from hpc_imagenet.config.compose import compose

    overrides = shlex.split(overrides) if isinstance(overrides, str) else overrides
    return _submit(prepare(compose(overrides, multirun=True, config_dir=config_dir)))


def jobs(name: str | None = None, workspace: str | Path | None = None) -> list[Handle]:
    """Return the runs of a workspace, oldest first.

    Args:
        name: id or label of one run, or a prefix of one; None: all runs.
        workspace: folder of the workspace; None: the stored one (HPC_IMAGENET_WORKSPACE), else ./workspace.

    Raises:
        UserError: no run, or more than one, has that name.
    """
    store = _run_store(workspace)
    runs = store.readable() if name is None else [store.find(name)]
    return [Handle(run.folder) for run in runs]


def command(name: str, *arguments: str) -> Any:
    """Run a command of the command line, such as `command("report", "--json")`.

    Args:
        name: the command.
        arguments: its arguments, one string each.

    Returns:
        With `--json` the parsed objects, else the printed text.

    Raises:
        UserError: the command failed or, such as `verify`, found an error; its `printed` holds the output.
    """
    from hpc_imagenet.cli.commands import COMMANDS, run_command_line
    from hpc_imagenet.errors import did_you_mean

    if name not in COMMANDS:
        raise UserError(f"{name} is an unknown command{did_you_mean(name, COMMANDS)}")
    out, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out):
            code = run_command_line(name, arguments)
    except SystemExit as end:  # --help
        code = int(end.code or 0)
    except UserError as error:
        error.printed = out.getvalue()
        raise
    printed = out.getvalue()
    if "--json" in arguments:
        return json.loads(printed)
    if code:
        failure = UserError(f"{name}: {(printed.strip().splitlines() or ['it failed'])[-1].strip()}")
        failure.printed = printed
        raise failure
    return printed


def evaluate(
    source: Handle | str | Path, settings: str | Sequence[str] = (), workspace: str | Path | None = None
) -> Handle:
    """Submit a job that evaluates a training on a split, and return at once.

    Args:
        source: a training: its handle, id or label; or a checkpoint file.
        settings: such as `"split=test checkpoint=last"`; see `python -m hpc_imagenet evaluate --help`.
        workspace: folder of the workspace; None: that of the handle, else as for `jobs`.

    Returns:
        The job; its `result()` has top1 and top5 (0 to 1).

    Raises:
        UserError: invalid input; nothing was submitted.
    """
    from hpc_imagenet.cli.runs.evaluate_command import prepare_evaluation

    store = _run_store(workspace, source)
    name = str(source.folder) if isinstance(source, Handle) else str(source)
    settings = shlex.split(settings) if isinstance(settings, str) else settings
    handles = _submit(prepare_evaluation(store, name, settings))
    if not handles:
        raise UserError("dry_run=true submits no evaluation: remove it")
    return handles[0]


def export(
    source: Handle | str | Path,
    out: str | Path,
    format: str = "state_dict",
    checkpoint: str | None = None,
    workspace: str | Path | None = None,
) -> Path:
    """Write a trained network to a folder that needs nothing of this package, with a model card.

    Args:
        source: as for `evaluate`.
        out: a new folder.
        format: state_dict, safetensors, onnx, torch_export or hf.
        checkpoint: best, last or epoch-N of a run; None: best if there is one, else last.
        workspace: as for `evaluate`.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: there is no such training or checkpoint, the folder exists, or the format cannot be used.
    """
    from hpc_imagenet.report.show.evaluations import evaluations
    from hpc_imagenet.training.export.exporter import export_network
    from hpc_imagenet.training.trained import load_trained

    store = _run_store(workspace, source)
    trained = load_trained(_find(store, source), checkpoint)
    return export_network(trained, Path(out), format, evaluations(store, trained.fingerprint, trained.config))


def predict(
    source: Handle | str | Path,
    images: Any,
    top: int = 5,
    checkpoint: str | None = None,
    workspace: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Classify images with a trained network, on this machine's CPUs.

    Args:
        source: as for `evaluate`.
        images: an image file, a folder, an array (uint8 [height, width, 3], RGB), or a sequence of them.
        top: number of classes per image.
        checkpoint: as for `export`.
        workspace: as for `evaluate`.

    Returns:
        A dict per image: image (file or position), classes (label, id, name and probability, 0 to 1, the
        best first), and problem: why the image cannot be read, or an empty string.

    Raises:
        UserError: there is no such training, checkpoint or file.
    """
    from hpc_imagenet.training.predictor import find_image_files, predict_images, prediction_row
    from hpc_imagenet.training.trained import load_trained

    one = isinstance(images, (str, Path)) or getattr(images, "ndim", 0) in (2, 3)
    one = one or not hasattr(images, "__iter__") or hasattr(images, "convert")  # an image of Pillow
    found: list[Any] = []
    for image in [images] if one else images:
        if isinstance(image, (str, Path)):
            found += find_image_files([image])
            continue
        shape: tuple[int, ...] = getattr(image, "shape", ())
        if len(shape) != 3 or shape[2] != 3 or not shape[0] or not shape[1] or str(image.dtype) != "uint8":
            kind = f"{image.dtype} {list(shape)}" if hasattr(image, "dtype") else type(image).__name__
            raise UserError(
                f"image {len(found)} is {kind}, and neither a file nor uint8 [height, width, 3], as "
                "numpy.asarray(image.convert('RGB')) gives of a Pillow image"
            )
        found.append(image)
    trained = load_trained(_find(_run_store(workspace, source), source), checkpoint)
    return [prediction_row(prediction) for prediction in predict_images(trained, found, top)]


def open_datastore(name: str | None = None, url: str | None = None, scratch: str | None = None) -> ImageStore:
    """Open a datastore: its classes, splits, images as arrays, and batches.

    Args:
        name: NAME or NAME@vN; None: the datastore of this session.
        url: folder, user@host:/path or s3://bucket/prefix; None: that of the workspace.
        scratch: folder on this machine's disk for copies, which a datastore behind ssh needs.

    Raises:
        UserError: there is no such datastore, or it cannot be read from this machine.
    """
    from hpc_imagenet.config.schema import Datastore
    from hpc_imagenet.datastore.versions import open_version
    from hpc_imagenet.training.loading.image_store import ImageStore

    if name is None:
        if "HPC_IMAGENET_DATASTORE" not in os.environ:
            raise UserError("no datastore: type its name, or resume RUN session.datastore=NAME in a session")
        folder = Path(os.environ["HPC_IMAGENET_DATASTORE"]).resolve()  # …/NAME/vN, perhaps a copy
        local = open_version(Datastore(f"{folder.parent.name}@{folder.name}", str(folder.parents[1])))
        return ImageStore(local, scratch, os.environ.get("HPC_IMAGENET_DATASTORE_URL"))
    url = url or stored_value("datastore.url") or str(_run_store(None).folder.parent / "datastores")
    return ImageStore(open_version(Datastore(name, url)), scratch)


def prototype(
    overrides: str | Sequence[str], store: ImageStore | None = None, config_dir: str | None = None
) -> Prototype:
    """Return a training in this process, for a look at batches, speed and the first minutes.

    Args:
        overrides: settings of one training, as for `submit`.
        store: its datastore, if it is open; None: open it.
        config_dir: as for `submit`.

    Raises:
        UserError: invalid input.
    """
    from hpc_imagenet.config.compose import compose
    from hpc_imagenet.datastore.versions import needs_copies, open_backend
    from hpc_imagenet.training.prototype import Prototype

    overrides = shlex.split(overrides) if isinstance(overrides, str) else overrides
    (config,) = compose(overrides, config_dir=config_dir)
    if store is None:
        name, url, scratch = config.datastore.name, config.datastore.url, config.cluster.scratch
        store = open_datastore(name, url, scratch if needs_copies(open_backend(url)) else None)
    return Prototype(config, store)


def _submit(prepared: PreparedPlan) -> list[Handle]:
    """Submit a plan and, with `wait=true`, wait for its jobs; see `submit`."""
    from hpc_imagenet.cli.connect import wait_until_running

    if prepared.first.dry_run:
        from hpc_imagenet.report.dry_run import print_dry_run

        print_dry_run(prepared.jobs, prepared.store, prepared.executor, prepared.state_of)
        return []
    if prepared.first.price:
        from hpc_imagenet.cli.price_plan import print_plan_prices

        print_plan_prices(prepared)
        return []
    runs = [entry.run for entry in prepared.submit()]
    handles = [Handle(run.folder) for run in runs]
    if prepared.first.wait:
        for run, handle in zip(runs, handles, strict=True):
            with contextlib.suppress(UserError):  # a failure is visible in the state
                if run.info.get("stage") == "session" and prepared.in_background:
                    wait_until_running(run)
                else:
                    handle.result()
    return handles


def _run_store(workspace: str | Path | None, source: object = None) -> RunStore:
    """Return the runs of a workspace; None: that of `source`, if it is a handle, else of the environment."""
    if workspace is None and isinstance(source, Handle):
        return RunStore(source.folder.parents[1])
    workspace = workspace or stored_value("workspace") or "workspace"
    return RunStore(expand_home(workspace).absolute())


def _find(store: RunStore, source: Handle | str | Path) -> Path | Run:
    from hpc_imagenet.cli.runs.export_command import find_source

    return source.folder if isinstance(source, Handle) else find_source(store, str(source))
