"""Trainings that share a loader in one Slurm job: requeued and cancelled like any others."""

from __future__ import annotations

import pytest
import torch
from command_line import eventually
from lab import Lab, LabDoor

from hpc_imagenet.cluster.dist_env import CPUS_VARIABLE
from hpc_imagenet.runs.store import Run

pytestmark = pytest.mark.timeout(1800)

NETWORK = """
import time
from torch import nn

class Slow(nn.Sequential):
    def forward(self, images):
        time.sleep(0.02)
        return super().forward(images)

def build(num_classes, width):
    return Slow(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(49 * width, num_classes))

def one(num_classes): return build(num_classes, 4)
def two(num_classes): return build(num_classes, 8)
def three(num_classes): return build(num_classes, 16)
"""
SETTINGS = ("dataset=digits", "recipe=demo", "recipe.epochs=8", "cluster.cpus_per_task=1", "tracker=null")


def test_a_group_is_requeued_loses_one_run_and_finishes(lab: Lab, site: LabDoor, cluster: LabDoor) -> None:
    (cluster.cwd / "lab_net.py").write_text(NETWORK)
    stores = f"datastore.url={site.workspace / 'datastores'}"
    models = "model=lab_net:one,lab_net:two,lab_net:three"
    cluster("-m", *SETTINGS, stores, models, "train.share_loader=true", "train.checkpoint_every_minutes=0.02")
    runs = [Run(cluster.workspace / "runs" / name) for name in cluster.runs()]
    (job,) = {row["job_id"] for row in cluster.jobs()}
    for run in runs:
        eventually(lambda run=run: run.progress.get("done", 0) > 64 * 10, 400)
    lab.scontrol("requeue", job)
    for run in runs:
        eventually(lambda run=run: run.attempt.started.get("restarts") == 1, 400)
    eventually(lambda: all("resuming from step" in log(run) for run in runs), 400)
    cancelled, killed, kept = runs
    cluster("cancel", cancelled.id)
    (process,) = [
        each for each in cluster.processes(killed.id) if "hpc_imagenet.launch.tasks.task" in each.cmdline()
    ]
    process.kill()
    eventually(lambda: not {row["state"] for row in cluster.jobs()} & {"queued", "running"}, 600)
    states = {row["run"]: (row["state"], row["reason"], row["requeued"]) for row in cluster.jobs()}
    assert states[cancelled.id] == ("cancelled", "by the cancel command", 1)
    assert states[killed.id][0] == "failed"
    assert "SIGKILL" in states[killed.id][1]
    assert states[kept.id] == ("finished", "", 1)
    eventually(lambda: lab.final_state(job) == "FAILED", 60)  # not requeued once more
    # The same run, alone.
    alone = LabDoor(cluster.workspace.with_name("alone"), lab)
    alone.env[CPUS_VARIABLE] = "1"  # as in the job: the number of threads changes the rounding
    try:
        model = f"model={kept.frozen()['model']['name']}"
        alone(*SETTINGS, stores, model, f"workspace={alone.workspace}", "cluster=foreground")
        assert all(map(torch.equal, weights(kept), weights(Run(alone.workspace / "runs" / kept.id))))
    finally:
        alone.close()


def weights(run: Run) -> list[torch.Tensor]:
    content = torch.load(run.folder / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    return list(content["state_dict"].values())


def log(run: Run) -> str:
    return "".join(path.read_text() for path in sorted(run.folder.glob("attempts/1/*_log.*")))
