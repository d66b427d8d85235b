"""A search on Slurm: one array of workers; preempted ones go on, and a cancelled one loses no trial."""

from __future__ import annotations

from typing import Any

import pytest
from command_line import eventually
from lab import Lab, LabDoor
from sample_dataset import write_coloured
from sample_search import SETTINGS, trials

from hpc_imagenet.runs.store import RunStore

pytestmark = pytest.mark.timeout(1800)  # s

SEARCH = (
    *("+search=tpe", "search.name=study", "search.trials=4", "search.parallel=2", "recipe.epochs=30"),
    *("recipe.learning_rate=tag(log, interval(0.001,0.1))", "train.checkpoint_every_minutes=0.02"),
    *("cluster.partition=low", "cluster.cpus_per_task=1", "cluster.tasks_per_node=2"),
    "+cluster.sbatch.exclusive=true",
)


def running_with_checkpoint(cluster: LabDoor) -> list[dict[str, Any]]:
    runs = cluster.workspace / "runs"
    found = [each for each in trials(cluster, "study") if each["state"] == "running"]
    return [each for each in found if (runs / each["run"] / "checkpoints/last.ckpt").exists()]


def row_of(cluster: LabDoor, run: str) -> dict[str, Any]:
    return next(row for row in cluster.jobs() if row["run"] == run)


def test_preempted_worker_goes_on_and_trial_of_a_cancelled_one_is_taken_over(
    cluster: LabDoor, lab: Lab
) -> None:
    write_coloured(cluster.workspace / "datastores/tiny/v1", 24, noise=99)
    cluster(*(word for word in SETTINGS if not word.startswith("recipe.epochs")), *SEARCH)
    workers = [row for row in cluster.jobs() if row["stage"] == "search"]
    assert [row["job_id"].partition("_")[2] for row in workers] == ["0", "1"]
    assert len({row["job_id"].partition("_")[0] for row in workers}) == 1
    eventually(lambda: len(running_with_checkpoint(cluster)) == 2, 400)
    first, second = running_with_checkpoint(cluster)
    row = row_of(cluster, first["worker"])
    assert row_of(cluster, first["run"])["state"] == "running"
    lab.sbatch("sleep 1", "--partition=high", f"--nodelist={row['nodes']}", "--exclusive")
    eventually(lambda: row_of(cluster, first["worker"])["requeued"] == 1, 200)
    lab.slurm("scancel", row_of(cluster, second["worker"])["job_id"])  # of which no outcome is written
    eventually(lambda: row_of(cluster, second["worker"])["state"] == "cancelled", 100)
    eventually(lambda: all(row["state"] not in ("queued", "running") for row in cluster.jobs()), 900)
    found = trials(cluster, "study")
    assert [each["state"] for each in found] == ["finished"] * 4
    assert row_of(cluster, first["worker"])["state"] == "finished"
    runs = RunStore(cluster.workspace)
    attempts = runs.run(first["run"]).attempts()
    assert len(attempts) == 1
    assert attempts[0].started["restarts"] == 1
    assert "resuming from step" in cluster("logs", first["run"]).stdout
    before, after = (attempt.outcome for attempt in runs.run(second["run"]).attempts())
    assert before
    assert after
    assert (before.state, after.state) == ("cancelled", "finished")
    assert "its worker has ended" in before.reason
    assert "resuming from step" in cluster("logs", second["run"]).stdout
    assert all(len(each["accuracies"]) == 30 for each in found)
