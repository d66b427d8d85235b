"""More epochs than before: which trainings are named, and why none is continued."""

from __future__ import annotations

import pytest
from command_line import Cli

from hpc_imagenet.config.compose import compose
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.retries.longer import shorter_runs
from hpc_imagenet.runs.store import Run, RunStore

pytestmark = pytest.mark.slow

FIXED = ("dataset=digits", "model=resnet18", "cluster=local")


def plan(cli: Cli, *overrides: str):
    return make_plan(compose([*FIXED, f"workspace={cli.workspace}", *overrides]), lambda datastore: None)


def add_run(cli: Cli, *overrides: str) -> Run:
    (job,) = plan(cli, *overrides)
    return RunStore(cli.workspace).create(job.run_id, job.frozen(), {"stage": "train", "label": job.label})


def test_the_longest_shorter_training_is_named(cli: Cli) -> None:
    add_run(cli, "recipe.epochs=2")
    run = add_run(cli, "recipe.epochs=4", "recipe.schedule=linear")
    add_run(cli, "recipe.epochs=4", "recipe.schedule=linear", "seed=1")
    store = RunStore(cli.workspace)
    assert shorter_runs(plan(cli, "recipe.epochs=4", "recipe.schedule=linear"), store) == []  # it is that run
    assert shorter_runs(plan(cli, "recipe.epochs=1"), store) == []
    (line,) = shorter_runs(plan(cli, "recipe.epochs=9", "recipe.schedule=linear"), store)
    assert f"begins at the start and does not continue {run.id}: its linear schedule" in line
    assert "zero at epoch 4; with 9 epochs" in line
    assert "does not continue" in cli(*FIXED, "recipe.epochs=3", "+stage=pipeline", "dry_run=true").stdout


def test_retry_with_settings_is_refused(cli: Cli) -> None:
    run = add_run(cli, "recipe.epochs=2")
    checkpoint = run.folder / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    line = cli.refused("retry", run.id, "recipe.epochs=5")
    assert f"recipe.epochs=5 cannot continue {run.id}: its cosine schedule reaches" in line
    assert line.endswith(f"model.weights={run.id}")
