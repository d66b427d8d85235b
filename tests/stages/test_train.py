"""Stage `train`: from a datastore to the result, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sample_dataset import write_coloured

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch import validate
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.stages.work import train

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "runs" / "abc-train").mkdir(parents=True)
    return Run(tmp_path / "runs" / "abc-train")


def config_of(workspace: Path, *overrides: str) -> Config:
    small = ["recipe.global_batch=4", "recipe.epochs=1", "loader.workers=0", "cluster.gpus_per_node=0"]
    fixed = ["dataset=digits", "model=squeezenet1_1", f"workspace={workspace}"]
    return compose(with_defaults([*fixed, *small], overrides))[0]


def test_training_from_datastore_to_result(tmp_path: Path, run: Run) -> None:
    write_coloured(tmp_path / "datastores" / "digits" / "v1", 8)
    result = train.run(config_of(tmp_path), run, DistEnv())
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {
        *("top1", "top5", "loss", "images_per_second", "skipped", "epochs", "seconds", "parameters"),
        *("best_top1", "best_epoch"),
    }
    assert result["top5"] == 1  # there are two classes only
    assert (run.folder / "checkpoints" / "last.ckpt").exists()


def test_global_batch_larger_than_train_split_is_refused_before_submitting(tmp_path: Path) -> None:
    write_coloured(tmp_path / "datastores" / "digits" / "v1", 8)
    for batch in (8, 12):
        plan = make_plan([config_of(tmp_path, f"recipe.global_batch={batch}")], validate.version_finder())
        if batch == 8:
            validate.validate_jobs(plan, RunStore(tmp_path))
            continue
        with pytest.raises(
            UserError, match=r"global_batch=12 is more than the 8 images of train: set at most 8$"
        ):
            validate.validate_jobs(plan, RunStore(tmp_path))


def test_missing_datastore_error_names_the_stage(tmp_path: Path, run: Run) -> None:
    with pytest.raises(UserError, match=r"\+stage=pipeline makes it"):
        train.run(config_of(tmp_path), run, DistEnv())
    assert list(run.folder.iterdir()) == []


def test_bad_settings_leave_the_run_folder_empty(tmp_path: Path, run: Run) -> None:
    write_coloured(tmp_path / "datastores" / "digits" / "v1", 8)
    for override, line in (
        ("recipe.global_batch=9", r"recipe.global_batch=9 is more than the 8 images of train"),
        ("+model.options.drop=1", r"model.options=\{'drop': 1\} does not fit squeezenet1_1"),
        ("model=maxvit_t", r"recipe.size=16 does not fit model.name=maxvit_t"),
    ):
        with pytest.raises(UserError, match=line):
            train.run(config_of(tmp_path, override), run, DistEnv())
    assert list(run.folder.iterdir()) == []


def test_importing_the_stage_does_not_import_torch() -> None:
    code = (
        "import sys, hpc_imagenet.stages.work.train, hpc_imagenet.config.names.backbones; "
        "print('torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
