"""Trackers across a preemption, without a server, and failing; a real MLflow server on loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from outcomes import STEPS, new_run, train
from pytorch_lightning.utilities import rank_zero_only
from servers import free_port

from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import Preempted, Superseded
from hpc_imagenet.io.atomic_files import read_json
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.training import trackers
from hpc_imagenet.training.trackers import Tracker

KEY = "0123456789abcdef0123456789abcdef01234567"  # as W&B's are


@pytest.fixture(autouse=True)
def no_trackers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without logins and servers of this machine's user."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def stored_run(workspace: Path, config: Config) -> Run:
    """Return a run as a submission writes it, in a sweep."""
    info = {"stage": "train", "label": "squeezenet1_1", "sweeps": ["seed-1f0c2e"]}
    return RunStore(workspace).create("12ab34cd-squeezenet1_1", asdict(config), info)


def interrupt_and_resume(config: Any, tiny: DatasetReader, run: Run, tracker: Any, signal_at: Any) -> None:
    """Stop a training within its second epoch, and resume it."""
    changed = config()
    changed.tracker = tracker
    signal_at(STEPS + 2)
    with pytest.raises(Preempted):
        train(changed, tiny, run)
    signal_at(1000)
    train(changed, tiny, run)


@pytest.mark.slow
def test_the_dataset_is_a_tag_only_where_the_datastore_holds_it(config: Any, tmp_path: Path) -> None:
    settings = config()
    run = stored_run(tmp_path, settings)
    assert Tracker("mlflow", settings, run, 0, lambda: None).tags()["dataset"] == settings.dataset.name
    settings.datastore = replace(settings.datastore, name="birds", content="c0ffee01")
    tags = Tracker("mlflow", settings, run, 0, lambda: None).tags()
    assert tags["datastore"] == "birds"
    assert "dataset" not in tags


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    pytest.importorskip("sqlalchemy", reason="an MLflow server needs alembic and SQLAlchemy")
    pytest.importorskip("alembic", reason="an MLflow server needs alembic and SQLAlchemy")
    port = free_port()
    with serve_mlflow(tmp_path, port) as url:
        yield url


@contextlib.contextmanager
def serve_mlflow(folder: Path, port: int) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    # The tracking server's application; `mlflow server` adds a gateway, which needs pandas.
    command = [sys.executable, "-m", "flask", "--app", "mlflow.server:app", "run", "--port", str(port)]
    store = {"_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db"}
    environment = {**os.environ, **store, "_MLFLOW_SERVER_ARTIFACT_ROOT": str(folder)}
    with (folder / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
                log_text = (folder / "mlflow.log").read_text()
                assert server.poll() is None, log_text
                assert time.monotonic() < end, log_text
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.slow
def test_wandb_offline_keeps_one_id_over_a_requeue(
    config: Any, tiny: DatasetReader, tmp_path: Path, signal_at: Any, monkeypatch: Any, capfd: Any
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")  # no internet on the node
    run = stored_run(tmp_path / "a workspace", config())
    interrupt_and_resume(config, tiny, run, ["tensorboard", "wandb"], signal_at)
    record = read_json(run.folder / "trackers.json")["wandb"]
    assert record["id"].startswith("12ab34cd-squeezenet1_1-")
    assert record["sent"]["train_loss"] == record["sent"]["val_loss"] == 2 * STEPS - 1
    folders = sorted((run.folder / "wandb").glob("offline-run-*"))
    assert len(folders) >= 1
    assert {folder.name.partition("-run-")[2].partition("-")[2] for folder in folders} == {record["id"]}
    assert all(list(folder.glob("*.wandb")) for folder in folders)
    out, err = capfd.readouterr()
    assert out.count(f"wandb sync '{run.folder}/wandb'/offline-run-*") == 2
    assert "warning: wandb" not in err
    assert list((run.folder / "tensorboard").glob("events*"))
    for path in run.folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in out + err
    # The steps of both attempts, each once; the files are W&B's own records.
    content = b"".join(path.read_bytes() for folder in folders for path in folder.glob("*.wandb"))
    assert content.count(b"val_top1") >= 2
    assert b"sweep:seed-1f0c2e" in content
    assert b"seed-1f0c2e" in content


ONLINE = """
from hpc_imagenet.training import trackers
trackers.can_reach = lambda url: True
print(trackers._wandb_online())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("key", "online"), [(KEY, "True"), ("", "False")])
def test_wandb_without_a_login_is_offline_without_a_prompt(key: str, online: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    # A process of its own, since a login holds for the process.
    done = subprocess.run(
        [sys.executable, "-c", ONLINE],
        env={**os.environ, "WANDB_API_KEY": key} if key else None,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{online}\n"
    assert "deprecated" not in done.stderr
    assert KEY not in done.stderr
    assert not list(tmp_path.glob(".netrc"))


@pytest.mark.slow
def test_mlflow_has_one_run_over_a_requeue(
    config: Any, tiny: DatasetReader, tmp_path: Path, signal_at: Any, monkeypatch: Any, mlflow_server: str
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    run = stored_run(tmp_path / "workspace", config())
    interrupt_and_resume(config, tiny, run, "mlflow", signal_at)
    assert not (run.folder / "tensorboard").exists()
    client: Any = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("hpc-imagenet")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_id == read_json(run.folder / "trackers.json")["mlflow"]["id"]
    assert found.data.params["recipe/epochs"] == "2"
    assert found.data.tags["sweep"] == "seed-1f0c2e"
    assert found.data.tags["hpc_imagenet.run"] == run.id
    for name, steps in (("train_loss", [4, 9]), ("val_loss", [4, 9])):
        assert [each.step for each in client.get_metric_history(found.info.run_id, name)] == steps
    # An attempt that was killed before it could record the id finds the run again.
    (run.folder / "trackers.json").unlink()
    Tracker("mlflow", config(), run, 0, lambda: None).log_metrics({"train_loss": 1.0}, 10)
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.mark.slow
def test_metrics_are_sent_to_mlflow_later(
    config: Any, tiny: DatasetReader, tmp_path: Path, monkeypatch: Any, mlflow_server: str, capfd: Any
) -> None:
    from mlflow import MlflowClient

    changed = config()
    changed.tracker = ["mlflow"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    run = stored_run(tmp_path / "workspace", changed)
    train(changed, tiny, run)
    out, err = capfd.readouterr()
    assert err.count("warning: mlflow: its server cannot be reached from this node") == 1
    command = f"python -m hpc_imagenet.training.trackers {run.folder}"
    assert command in out
    assert "secret" not in out + err
    for _ in range(2):  # the second time sends nothing twice
        environment = {**os.environ, "MLFLOW_TRACKING_URI": mlflow_server}
        words = [sys.executable, *command.split()[1:]]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    client: Any = MlflowClient(mlflow_server)
    (found,) = client.search_runs([client.get_experiment_by_name("hpc-imagenet").experiment_id])
    assert [each.step for each in client.get_metric_history(found.info.run_id, "val_top1")] == [4, 9]


@pytest.mark.slow
def test_trackio_has_one_run_over_a_requeue_without_a_network(
    config: Any, tiny: DatasetReader, tmp_path: Path, signal_at: Any, capfd: Any
) -> None:
    if importlib.util.find_spec("trackio") is None:  # not imported here: it reads TRACKIO_DIR at its import
        pytest.skip("trackio is not installed: docs/trackers.md says how")
    run = stored_run(tmp_path / "a workspace", config())
    interrupt_and_resume(config, tiny, run, "trackio", signal_at)
    out, err = capfd.readouterr()
    assert "warning: trackio" not in err
    folder = tmp_path / "a workspace" / "trackio"
    assert out.count(f"TRACKIO_DIR='{folder}' trackio sync --project hpc-imagenet --space-id") == 2
    database = sqlite3.connect(next(folder.glob("hpc-imagenet*.db")))
    lines = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for name, *_ in lines} == {read_json(run.folder / "trackers.json")["trackio"]["id"]}
    steps = [step for _, step, metrics in lines if "val_top1" in json.loads(metrics)]
    assert steps == [STEPS - 1, 2 * STEPS - 1]  # of both attempts, each once


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["open", "log", "close"])
def test_a_tracker_that_fails_is_one_warning(
    fails: str, config: Any, tiny: DatasetReader, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    class Broken:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            if fails == "log":
                raise OSError("https://me:secret@server refused")

        def finalize(self, status: str) -> None:
            raise RuntimeError("\x1b[31mbroken")

    def opened(tracker: Tracker, record: dict[str, Any]) -> Any:
        if fails == "open":
            raise ValueError("no such project")
        return Broken()

    monkeypatch.setitem(trackers._OPEN, "trackio", opened)
    changed = config()
    changed.tracker = ["trackio", "tensorboard"]
    run = new_run(tmp_path / "run")
    assert train(changed, tiny, run)["top1"] >= 0
    out, err = capfd.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("warning: trackio")]
    assert "the training goes on without it" in line
    assert "secret" not in out + err
    assert "\x1b" not in out + err
    assert list((run.folder / "tensorboard").glob("events*"))


def test_other_ranks_log_nothing_and_a_lost_lease_ends_the_job(
    config: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def superseded() -> None:
        raise Superseded("another start")

    run = stored_run(tmp_path, config())
    monkeypatch.setitem(trackers._OPEN, "mlflow", lambda *_: pytest.fail("it opens a tracker"))
    tracker = Tracker("mlflow", config(), run, 0, superseded)
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    tracker.log_metrics({"train_loss": 1.0}, 1)
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)
    with pytest.raises(Superseded):
        tracker.log_metrics({"train_loss": 1.0}, 1)
    assert not (run.folder / "trackers.json").exists()


def test_the_command_that_sends_later_refuses_other_folders_in_one_line(
    config: Any, tmp_path: Path, capsys: Any
) -> None:
    run = stored_run(tmp_path, config())
    (tmp_path / "metrics.csv").touch()
    for arguments, status, line in (
        ([], 2, "usage: python -m hpc_imagenet.training.trackers RUN_FOLDER"),
        ([tmp_path / "none"], 1, f"error: {tmp_path}/none/metrics.csv: no such file: type the folder of a"),
        ([run.folder], 1, f"error: {run.folder}/metrics.csv: no such file: type the folder of a"),
        ([tmp_path], 1, f"error: {tmp_path.name}: {tmp_path}/config.yaml is missing"),
    ):
        assert trackers.main([str(each) for each in arguments]) == status
        error = capsys.readouterr().err
        assert error.startswith(line)
        assert error.count("\n") == 1


def test_the_network_source_is_not_sent_and_a_new_run_folder_gets_a_new_id(
    config: Any, tmp_path: Path
) -> None:
    changed = config()
    changed.model.source = {"net.py": "print()"}
    run = stored_run(tmp_path, changed)
    tracker = Tracker("wandb", changed, run, 0, lambda: None)
    assert "source" not in tracker.sent_config()["model"]
    assert changed.model.source
    first = tracker.run_id({})
    (run.folder / "run.json").unlink()
    time.sleep(0.002)  # `created` is in ms
    again = stored_run(tmp_path, changed)
    assert Tracker("wandb", changed, again, 0, lambda: None).run_id({}) != first
    assert tracker.run_id({"id": first}) == first
