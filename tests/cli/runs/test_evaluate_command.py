"""The commands evaluate and show, on a training with three splits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Cli

sys.path.append(str(Path(__file__).resolve().parents[2] / "training"))
from tiny_training import write_store

pytestmark = pytest.mark.slow

TRAINING = (
    *("datastore.name=digits", "model=squeezenet1_1", "recipe=demo", "recipe.epochs=2"),
    *("recipe.global_batch=8", "cluster=foreground", "train.keep_checkpoints=1"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A workspace with one finished training, on a datastore with the splits train, val and test."""
    cli = Cli(tmp_path_factory.mktemp("trained") / "workspace")
    write_store(cli.workspace / "datastores" / "digits" / "v1", {"train": 40, "val": 13, "test": 17})
    cli(*TRAINING)
    return cli


def run_of(cli: Cli, stage: str) -> dict:
    (row,) = [row for row in cli.jobs() if row["stage"] == stage]
    return row


def test_an_evaluation_is_a_run_on_the_leaderboard(trained: Cli) -> None:
    training = run_of(trained, "train")
    done = trained.process("evaluate", "squeezenet", "cluster=foreground")
    assert "split test of digits@v1" in done.stdout
    result = run_of(trained, "evaluate")["result"]
    assert (result["split"], result["images"], result["datastore"]) == ("test", 17, "digits@v1")
    assert (result["checkpoint"], result["training"]) == ("best.ckpt", training["run"])
    rows = json.loads(trained("report", "--json").stdout)
    assert [(row["stage"], row["split"]) for row in rows if row["top1"] == result["top1"]][-1] == (
        "evaluate",
        "test",
    )
    assert {row["training"] for row in rows} == {None, training["run"]}
    assert "\n  evaluation on test" in trained("report").stdout  # below its training
    assert "already finished" in trained("evaluate", training["run"], "cluster=foreground").stdout


def test_an_evaluation_of_a_file_in_another_workspace(trained: Cli, tmp_path: Path) -> None:
    training = Path(run_of(trained, "train")["dir"])
    file, other = tmp_path / "mine.ckpt", f"workspace={tmp_path / 'other'}"
    shutil.copy(training / "checkpoints" / "last.ckpt", file)
    trained.process("evaluate", str(file), "split=val", "cluster=local", "wait=true", other)
    (row,) = json.loads(trained("report", "--json", other).stdout)
    scores = json.loads((training / "attempts" / "1" / "outcome.json").read_text())["result"]
    assert [row[name] for name in ("top1", "top5")] == [scores["top1"], scores["top5"]]
    assert row["loss"] == pytest.approx(scores["loss"])
    trained.workspace, before = tmp_path / "other", trained.workspace
    trained.close()  # the local worker
    trained.workspace = before


def test_an_evaluation_on_another_datastore(trained: Cli) -> None:
    write_store(trained.workspace / "datastores" / "other" / "v1", {"val": 30}, size=24)
    done = trained(
        "evaluate", "squeezenet", "datastore.name=other", "cluster=slurm", "dry_run=true", code=None
    )
    assert "split val of other@v1" in done.stdout


def test_wrong_evaluations_are_refused_in_one_line(trained: Cli) -> None:
    run = run_of(trained, "train")["run"]

    def refused(*words: str) -> str:
        return trained.refused("evaluate", *words)

    assert "no run nothing" in refused("nothing")
    assert refused("nothing.ckpt").endswith("nothing.ckpt: no such file")
    assert "split=dev: datastore digits@v1 has the splits train, val, test" in refused(run, "split=dev")
    assert "is no setting of evaluate; did you mean: split" in refused(run, "splitt=val")
    assert "recipe.epochs=9 changes a training" in refused(run, "recipe.epochs=9")
    assert "it has best, last, previous, epoch-2" in refused(run, "checkpoint=epoch-1")
    assert "split= is given twice" in refused(run, "split=val", "split=test")
    assert "val is not SETTING=VALUE" in refused(run, "val")
    assert refused("split=val").endswith("must come before split=val: evaluate RUN split=val")
    file = trained.workspace.parent / "text.ckpt"
    file.write_text("text")
    assert "text.ckpt is not a checkpoint of a training" in refused(str(file))


def test_a_crop_fraction_takes_a_size_alone(trained: Cli, tmp_path: Path) -> None:
    from trained_samples import config_of, write_trained

    config = config_of("squeezenet1_1", preprocessing={"crop_pct": 0.95})
    datastore = f"datastore.url={trained.workspace / 'datastores'}"
    command = (
        "evaluate",
        str(write_trained(tmp_path / "mine.ckpt", config)),
        datastore,
        "datastore.name=digits",
    )
    refused = trained.refused(*command, "recipe.val_size=48", "recipe.val_resize=60")
    assert (
        "recipe.val_resize=60 would change nothing: model.preprocessing.crop_pct=0.95 decides it" in refused
    )
    done = trained(*command, "recipe.val_size=48", "cluster=local", "dry_run=true")
    assert "split test of digits@v1" in done.stdout


def test_a_checkpoint_that_changes_before_its_evaluation_is_not_evaluated(
    trained: Cli, tmp_path: Path
) -> None:
    training = Path(run_of(trained, "train")["dir"])
    file = tmp_path / "runs" / "copy" / "checkpoints" / "last.ckpt"
    shutil.copytree(training, file.parents[1])
    other = f"workspace={tmp_path}"
    trained("evaluate", str(file), other, "cluster=foreground")
    (row,) = [
        row for row in json.loads(trained("jobs", "--json", other).stdout) if row["stage"] == "evaluate"
    ]
    shutil.copy(training / "checkpoints" / "previous.ckpt", file)
    (Path(row["dir"]) / "attempts" / "1" / "outcome.json").unlink()
    task = [sys.executable, "-m", "hpc_imagenet.launch.tasks.task", row["dir"], "1"]
    done = subprocess.run(task, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "last.ckpt is another checkpoint than the one submitted" in done.stderr


def test_submitting_and_showing_import_no_torch(trained: Cli) -> None:
    run = run_of(trained, "train")["run"]
    script = (
        "import sys; from hpc_imagenet.cli.main import run\n"
        f"run(['evaluate', {run!r}, 'dry_run=true']); run(['show', {run!r}])\n"
        "sys.exit(repr(heavy) if (heavy := {'torch', 'numpy'} & set(sys.modules)) else 0)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=trained.env, cwd=trained.cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_of_an_old_version_needs_the_folder_of_its_run(trained: Cli, tmp_path: Path) -> None:
    import torch

    from hpc_imagenet.training.trained import load_trained

    training = Path(run_of(trained, "train")["dir"])
    old = tmp_path / "runs" / training.name
    shutil.copytree(training, old)
    content = torch.load(old / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("config", "classes", "metrics"):
        del content[name]
    torch.save(content, old / "checkpoints" / "last.ckpt")
    new, loaded = load_trained(training, "last"), load_trained(old, "last")
    assert (loaded.classes, loaded.config.model, loaded.metrics) == (new.classes, new.config.model, {})
    shutil.copy(old / "checkpoints" / "last.ckpt", tmp_path / "moved.ckpt")
    assert "moved.ckpt has no config and is not in the folder of its run" in trained.refused(
        "evaluate", str(tmp_path / "moved.ckpt")
    )


def test_show_prints_settings_result_checkpoints_and_files(trained: Cli) -> None:
    run = run_of(trained, "train")["run"]
    shown = trained("show", run).stdout
    for text in (
        *("recipe.epochs=2", "datastore.name=digits", "top-1", "after epoch 2", "on disk"),
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/epoch-2.ckpt", "val_classes.csv"),
    ):
        assert text in shown
    for default in ("recipe.ema", "recipe.momentum", "train.checkpoint_every_minutes"):
        assert default not in shown
    assert "all others are the defaults" in shown
    details = json.loads(trained("show", run, "--json").stdout)
    sizes = {Path(file["path"]).name: file["bytes"] for file in details["checkpoints"]}
    assert set(sizes) == {"best.ckpt", "last.ckpt", "previous.ckpt", "epoch-2.ckpt"}
    assert max(sizes.values()) < details["bytes"] < sum(sizes.values())
    assert details["validations"]["best"]["top1"] == details["result"]["best_top1"]
    assert "no run nothing" in trained.refused("show", "nothing")
