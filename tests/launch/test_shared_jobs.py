"""Which runs share a loader and a job; submission and cancellation with stub Slurm commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from fake_slurm import queue_row, scripts, write_command

from hpc_imagenet.config.compose import compose
from hpc_imagenet.launch import shared_jobs
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.tasks import shared_task
from hpc_imagenet.runs.attempt import FAILED
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.stages.train_stage import TRAIN

SWEEP = (
    *("-m", "+stage=pipeline", "dataset=digits", "cluster=slurm", "train.share_loader=true"),
    *("model=resnet18,squeezenet1_1", "recipe=demo"),
)


def groups(*overrides: str) -> list[list[str]]:
    """Return the values of each group's runs that the sweep sets."""
    configs = compose(
        ["+stage=train", "dataset=digits", "recipe=demo", "train.share_loader=true", *overrides], True
    )
    jobs = make_plan(configs, lambda _: None)
    found = shared_jobs.group_by_loader(jobs, lambda job: (job.config, job.needs))
    return [[f"{job.config.model.name}/{job.config.recipe.epochs}" for job in group] for group in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    "behind",
    [
        "recipe.learning_rate=0.1,0.2",
        "recipe.optimizer=sgd,adamw",
        "recipe.mixup=0,0.2",
        "recipe.augment=none,trivial",
        "recipe.ema=null,0.99",
        "recipe.precision=32-true,bf16-mixed",
        "recipe.epochs=8,16",
        "recipe.freeze=false,true",
        "model.preprocessing.mean=[0.5,0.5,0.5],[0.4,0.4,0.4]",
    ],
)
def test_settings_behind_the_loader_may_differ(behind: str) -> None:
    assert [len(group) for group in groups("model=resnet18,vgg11", f"+{behind}".replace("+r", "r"))] == [4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "recipe.global_batch=32,64",
        "recipe.size=16,24",
        "recipe.start_size=null,8",
        "recipe.crop_scale=0.3,0.5",
        "recipe.flip=0,0.5",
        "recipe.val_resize=16,24",
        "seed=1,2",
        "+model.preprocessing.interpolation=bilinear,bicubic",
    ],
)
def test_runs_are_grouped_by_what_feeds_the_loader(before: str) -> None:
    assert [len(group) for group in groups("model=resnet18,vgg11", before)] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["train.accumulate=2", "loader.on_corrupt=skip", "cluster.time=60", "cluster.gpus_per_node=2"]
)
def test_so_do_settings_outside_the_signature(setting: str) -> None:
    """A retry may change them for one run."""
    keys = {
        TRAIN.loader_key(compose(["dataset=digits", "train.share_loader=true", *more])[0])
        for more in ([], [setting])
    }
    assert len(keys) == 2


@pytest.mark.slow
def test_timm_networks_share_if_filter_and_crop_are_set() -> None:
    models = "model=timm/resnet18,timm/vit_tiny_patch16_224,resnet18"
    assert [len(group) for group in groups(models)] == [1, 1, 1]
    own = "+model.preprocessing={interpolation: bilinear, crop_pct: 0.9, crop_mode: center}"
    assert [len(group) for group in groups(models, own)] == [3]


@pytest.mark.slow
def test_large_groups_are_divided_evenly() -> None:
    rates = ",".join(f"0.{number}" for number in range(1, 8))
    sweep = (f"recipe.learning_rate={rates}", "model=resnet18")
    assert [len(group) for group in groups(*sweep)] == [3, 4]
    assert [len(group) for group in groups(*sweep, "train.share_runs=2")] == [1, 2, 2, 2]


@pytest.mark.slow
def test_share_loader_is_no_part_of_the_signature() -> None:
    ids = [
        make_plan(compose(["+stage=train", "dataset=digits", f"train.share_loader={value}"]), lambda _: None)[
            0
        ].run_id
        for value in ("true", "false")
    ]
    assert ids[0] == ids[1]


def submitted(cli: Cli) -> dict[str, dict[str, Any]]:
    """Return submitted.json of each training by its run."""
    return {
        path.parents[2].name: json.loads(path.read_text())
        for path in cli.workspace.glob("runs/*[0-9]/attempts/1/submitted.json")
    }


@pytest.mark.slow
def test_a_group_is_one_slurm_job(cluster: Cli, commands: Path) -> None:
    cluster(*SWEEP, "recipe.learning_rate=0.1,0.2", "+cluster.stage.train.gpus_per_node=3")
    train = scripts(commands)[3]
    assert len(scripts(commands)) == 4
    assert "#SBATCH --array" not in train
    assert "#SBATCH --ntasks-per-node=1\n" in train
    assert "#SBATCH --gpus-per-node=3\n" in train
    assert re.search(r"#SBATCH --job-name=\w+\+3\n", train)
    runs = submitted(cluster)
    assert len(runs) == 4
    for run, record in runs.items():
        assert record["job_id"] == "4"
        assert sorted([run, *record["shares_with"]]) == sorted(runs)
    write_command(commands, "squeue", f"echo '{queue_row('4', 'PENDING')}'")
    assert "shares a loader with 3" in cluster("jobs").stdout


@pytest.mark.slow
def test_groups_of_equal_size_are_an_array(cluster: Cli, commands: Path) -> None:
    cluster(*SWEEP, "recipe.global_batch=32,64", "+cluster.stage.train.gpus_per_node=4")
    train = scripts(commands)[3]
    assert "#SBATCH --array=0-1%2\n" in train
    assert "#SBATCH --gpus-per-node=2\n" in train  # one for each run
    assert sorted(record["job_id"] for record in submitted(cluster).values()) == ["4_0"] * 2 + ["4_1"] * 2


@pytest.mark.slow
def test_dry_run_shows_which_runs_share(cluster: Cli) -> None:
    text = cluster(*SWEEP, "dry_run=true").stdout
    assert re.search(r"\none job with one loader: \w+-resnet18 \w+-squeezenet1_1\n", text)
    assert re.search(r"sbatch script of \w+-resnet18 \w+-squeezenet1_1 \(one loader\):", text)


@pytest.mark.slow
def test_cancelling_one_leaves_the_job_until_none_is_left(cluster: Cli, commands: Path) -> None:
    cluster(*SWEEP, "recipe.learning_rate=0.1,0.2")
    rows = [("1", "COMPLETED"), ("2", "COMPLETED"), ("3", "COMPLETED"), ("4", "PENDING")]
    write_command(commands, "squeue", "\n".join(f"echo '{queue_row(*row)}'" for row in rows))
    first, second, third, fourth = submitted(cluster)
    cluster("cancel", first)
    assert not (commands / "cancelled").exists()
    (RunStore(cluster.workspace).run(second).attempts()[0]).end(FAILED, "as if it had failed")
    cluster("cancel", third)
    assert not (commands / "cancelled").exists()
    cluster("cancel", fourth)
    assert "4" in (commands / "cancelled").read_text().split()
    states = {row["run"]: row["state"] for row in cluster.jobs()}
    assert [states[run] for run in (first, second, third, fourth)] == [
        *("cancelled", "failed", "cancelled", "cancelled")
    ]


@pytest.mark.slow
def test_runs_that_cannot_share_are_refused(cluster: Cli) -> None:
    for setting, message in (
        (
            "+cluster.stage.train.nodes=2",
            "cluster.nodes=2: with train.share_loader=true each run is one process",
        ),
        ("+cluster.stage.train.tasks_per_node=2", "set cluster.tasks_per_node=1 or train.share_loader=false"),
        ("loader.decode=gpu", "train.share_loader=true decodes on CPUs, for all runs: set loader.decode=cpu"),
        ("train.share_runs=0", "train.share_runs=0 is too small: at least 1"),
    ):
        assert message in cluster.refused(*SWEEP, setting)


@pytest.mark.parametrize(
    ("gpus_per_node", "visible"),
    [
        (2, ["GPU-a", "GPU-b", "GPU-a"]),
        (None, ["GPU-a", "GPU-b", "GPU-a"]),  # requested by cluster.sbatch, or those of this machine
        (1, ["GPU-a,GPU-b"] * 3),  # on this machine: each takes the first one
        (0, ["GPU-a,GPU-b"] * 3),
    ],
)
def test_runs_are_spread_over_the_gpus_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus_per_node: int | None, visible: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    environments: list[dict[str, str]] = []
    monkeypatch.setattr(shared_task.subprocess, "Popen", lambda command, env, **_: environments.append(env))
    store = RunStore(tmp_path)
    for number in range(3):
        cluster = {"executor": "local", "gpus_per_node": gpus_per_node}
        run = store.create(f"{number}-x", {"cluster": cluster, "stage": {"name": "train"}}, {})
        shared_task._start(run, run.new_attempt(), number, 0).connection.close()
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == visible
