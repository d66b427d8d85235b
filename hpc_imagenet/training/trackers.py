"""Trackers of a training: TensorBoard, Weights & Biases, MLflow and Trackio, through Lightning's loggers.

A training has one run in each tracker, whatever number of requeues and retries it takes. `trackers.json` in
the run folder holds its id there, and the last step of each metric that was sent, so that steps which a
resumed attempt repeats are not sent twice. A tracker that fails ends with one warning; the training goes on.

    python -m hpc_imagenet.training.trackers RUN_FOLDER

sends what MLflow did not get, from metrics.csv: for nodes without internet. Secrets are read by the trackers
themselves, from the environment or their own login files.
"""

from __future__ import annotations

import csv
import os
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from hpc_imagenet.config.names.tracker_names import parse_trackers
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import Superseded, UserError, first_line
from hpc_imagenet.io.atomic_files import read_json, write_json
from hpc_imagenet.runs.job import holds_dataset, signature
from hpc_imagenet.runs.store import Run

PROJECT = "hpc-imagenet"  # unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT is set
_RUN_TAG = "hpc_imagenet.run"
_TIMEOUT = 5  # s, of the test whether a server can be reached


class Unreachable(Exception):
    """No server to log to from this node; metrics.csv is sent later."""


def training_loggers(config: Config, run: Run, step: int, check_lease: Callable[[], object]) -> list[Logger]:
    """Return the loggers of the trackers in the config's `tracker`.

    Args:
        config: the config of the run.
        run: the run.
        step: number of steps in the checkpoint that this attempt resumes from.
        check_lease: called before each write; raises `Superseded` if this job has lost the run's lease.
    """
    return [
        Tracker(name, config, run, step, check_lease) if name != "tensorboard" else _tensorboard(run, step)
        for name in parse_trackers(config.tracker)
    ]


class Tracker(Logger):
    """The logger of one tracker that never fails a training; rank 0 alone logs.

    Args:
        tracker: wandb, mlflow or trackio.
        config: the config of the run; sent without the source code of a network.
        run: the run, whose folder keeps the id and the steps that were sent.
        step: as in `training_loggers`.
        check_lease: as in `training_loggers`.
    """

    def __init__(
        self, tracker: str, config: Config, run: Run, step: int, check_lease: Callable[[], object]
    ) -> None:
        super().__init__()
        self._tracker, self._config, self._run = tracker, config, run
        self._check_lease = check_lease
        self._inner: Logger | None = None
        self._stopped = False
        self._path = run.folder / "trackers.json"
        self.hint = ""  # the command that sends later what was not sent; printed at the end

    @property
    def name(self) -> str:
        """Name of the tracker."""
        return self._tracker

    @property
    def version(self) -> str:
        """Unused by this logger."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the frozen config is sent when the tracker is opened."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send the metrics that no attempt has sent for this step."""
        self._check_lease()
        if self._stopped:
            return
        try:
            record = self._record()
            sent = record.setdefault("sent", {})
            at = step or 0
            new = {name: float(value) for name, value in metrics.items() if at > sent.get(name, -1)}
            if not set(new) - {"epoch"}:
                return
            self._open(record).log_metrics(new, at)
            sent |= dict.fromkeys(new, at)
            self._save(record)
        except Superseded:
            raise
        except Exception as error:
            self._stop(error)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the tracker's run of this attempt, and print the command that sends later what is missing."""
        if self._inner is not None and not self._stopped:
            try:
                _close(self._tracker, self._inner, status)
            except Exception as error:
                self._stop(error)
        if self.hint:
            print(f"{self._tracker}: not sent yet; where there is internet: {self.hint}", flush=True)
        self._inner, self.hint = None, ""

    def _open(self, record: dict[str, Any]) -> Logger:
        if self._inner is None:
            self._inner = _OPEN[self._tracker](self, record)
            self._save(record)
        return self._inner

    def _record(self) -> dict[str, Any]:
        """Return the content of trackers.json for this tracker."""
        return dict((read_json(self._path) or {}).get(self._tracker) or {})

    def _save(self, record: dict[str, Any]) -> None:
        write_json(self._path, {**(read_json(self._path) or {}), self._tracker: record})

    def _stop(self, error: Exception) -> None:
        self._stopped = True
        if isinstance(error, Unreachable):
            line = str(error)
        else:
            kind = type(error).__name__
            line = f"it failed ({kind}), and the training goes on without it{_reason(error)}"
        print(f"warning: {self._tracker}: {line}", file=sys.stderr, flush=True)
        if self._tracker == "mlflow":
            self.hint = send_command(self._run.folder)

    def run_id(self, record: dict[str, Any]) -> str:
        """Return the id of the run in the tracker: that of the first attempt, else made of the run's id.

        With the time at which the run was created, so that a run folder made anew is another run there.
        """
        made = f"{self._run.id}-{signature(self._run.id, self._run.info.get('created'))[:6]}"
        return str(record.setdefault("id", made))

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    @property
    def title(self) -> str:
        """The run's label."""
        return str(self._run.info.get("label") or self._run.id)

    @property
    def sweeps(self) -> list[str]:
        """Names of the sweeps that the run belongs to."""
        return [str(name) for name in self._run.info.get("sweeps", ())]

    def tags(self) -> dict[str, str]:
        """Return the settings by which runs are found."""
        config = self._config
        tags = {_RUN_TAG: self._run.id, "model": config.model.name, "seed": str(config.seed)}
        tags["datastore"] = config.datastore.name
        if holds_dataset(asdict(config)):
            tags["dataset"] = config.dataset.name
        return tags | ({"sweep": " ".join(self.sweeps)} if self.sweeps else {})

    def sent_config(self) -> dict[str, Any]:
        """Return the frozen config without the source code of a network."""
        values = asdict(self._config)
        values["model"].pop("source", None)
        return values


def send_command(folder: Path) -> str:
    """Return the command that sends metrics.csv of a run to MLflow."""
    return f"MLFLOW_TRACKING_URI=URL python -m hpc_imagenet.training.trackers {shlex.quote(str(folder))}"


def _reason(error: Exception) -> str:
    """Return the first line of an error, without the address that it may hold, whose login is a secret."""
    line = next(iter(str(error).splitlines()), "")
    return "" if "://" in line or not line.isprintable() else f": {line[:200]}"


def _tensorboard(run: Run, step: int) -> Logger:
    return TensorBoardLogger(run.folder, name="", version="tensorboard", purge_step=step)


def _open_wandb(tracker: Tracker, record: dict[str, Any]) -> Logger:
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_online() else "offline")
    if mode != "online":
        runs = f"{shlex.quote(str(tracker.run.folder / 'wandb'))}/offline-run-*"
        tracker.hint = f"wandb sync {runs}" if mode in ("offline", "dryrun") else ""
    logger = WandbLogger(
        name=tracker.title,
        save_dir=tracker.run.folder,
        id=tracker.run_id(record),
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        config=tracker.sent_config(),
        group=tracker.sweeps[-1] if tracker.sweeps else None,
        tags=[f"{name}:{value}"[:64] for name, value in tracker.tags().items() if name != _RUN_TAG],
        mode=mode,
        # It captures neither the output nor the code: they are in the run folder.
        settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=30),
    )
    _ = logger.experiment
    return logger


def _wandb_online() -> bool:
    """Whether W&B's server can be reached and there is a login for it."""
    import wandb

    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return can_reach(url) and wandb.login(prompt=False, verify=False)


def _open_mlflow(tracker: Tracker, record: dict[str, Any]) -> Logger:
    # Of a server that disappears: its defaults are 7 retries of 120 s within a training step.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient
    from pytorch_lightning.loggers import MLFlowLogger

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise Unreachable("MLFLOW_TRACKING_URI is not set here; metrics.csv can be sent later")
    if uri.startswith("http") and not can_reach(uri):
        raise Unreachable("its server cannot be reached from this node; metrics.csv can be sent later")
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    client: Any = MlflowClient(uri)
    found = record.get("id") or _find_mlflow_run(client, experiment, tracker)
    logger = MLFlowLogger(
        experiment_name=experiment,
        run_name=tracker.title,
        tracking_uri=uri,
        tags={**tracker.tags(), "hpc_imagenet.id": tracker.run_id({})},
        run_id=found,
    )
    record["id"] = logger.run_id
    if found:
        client.update_run(found, status="RUNNING")
    else:
        logger.log_hyperparams(tracker.sent_config())
    return logger


def _find_mlflow_run(client: Any, experiment: str, tracker: Tracker) -> str | None:
    """Return the id of the run that an attempt made and could not record, if there is one."""
    existing = client.get_experiment_by_name(experiment)
    if existing is None:
        return None
    query = f"tags.\"hpc_imagenet.id\" = '{tracker.run_id({})}'"
    runs = client.search_runs([existing.experiment_id], query, max_results=1)
    return str(runs[0].info.run_id) if runs else None


class _TrackioLogger(Logger):
    """Trackio, which has the interface of W&B and no logger in Lightning."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        import trackio

        self._run: Any = trackio.init(**settings)

    name = version = ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._run.log(metrics, step=step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def finalize(self, status: str) -> None:
        self._run.finish()


def _open_trackio(tracker: Tracker, record: dict[str, Any]) -> Logger:
    folder = tracker.run.folder.parent.parent / "trackio"  # one for the workspace, as its dashboard shows
    os.environ.setdefault("TRACKIO_DIR", str(folder))
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    if not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")):
        tracker.hint = (
            f"TRACKIO_DIR={shlex.quote(os.environ['TRACKIO_DIR'])} trackio sync --project {project} "
            "--space-id SPACE --private"
        )
    return _TrackioLogger(
        project=project,
        name=tracker.run_id(record),
        group=tracker.sweeps[-1] if tracker.sweeps else None,
        config={**tracker.sent_config(), "tags": tracker.tags()},
        resume="allow",
        embed=False,
    )


_OPEN: dict[str, Callable[[Tracker, dict[str, Any]], Logger]] = {
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
    "trackio": _open_trackio,
}


def _close(tracker: str, logger: Any, status: str) -> None:
    if tracker == "wandb":  # Lightning's logger leaves its run open
        logger.experiment.finish(exit_code=0 if status in ("success", "finished") else 1)
    else:
        logger.finalize(status)


def can_reach(url: str) -> bool:
    """Whether a server answers from this node, through the proxy of the environment if there is one."""
    parts = urlsplit(url)
    try:
        address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # without a login
        with urllib.request.urlopen(address, timeout=_TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def send_metrics(folder: Path) -> int:
    """Send the lines of metrics.csv that MLflow does not have yet; return the number of lines.

    Raises:
        UserError: the folder is not that of a training, or has no metrics yet.
    """
    run, path = Run(folder), folder / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{path}: no such file: type the folder of a training that has begun")
    tracker = Tracker("mlflow", run.config(), run, 0, lambda: None)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        values = {name: float(text) for name, text in line.items() if text and name != "step"}
        tracker.log_metrics(values, int(line["step"]) - 1)  # Lightning counts from 0
    outcome = run.attempt.outcome if run.attempt else None
    tracker.finalize("success" if outcome is None or outcome.state == "finished" else "failed")
    return 0 if tracker.hint or tracker._stopped else len(lines)


def main(arguments: list[str]) -> int:
    """Send the metrics of the run folder in `arguments` to MLflow; return the exit status."""
    if len(arguments) != 1:
        print("usage: python -m hpc_imagenet.training.trackers RUN_FOLDER", file=sys.stderr)
        return 2
    try:
        sent = send_metrics(Path(arguments[0]))
    except (UserError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    print(f"mlflow: {sent} lines of metrics.csv are there")
    return 0 if sent else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
