"""Diagnosis and retry of jobs that a real Slurm ends: at the time limit, and with their node."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from command_line import eventually
from lab import Lab, LabDoor

TESTS = Path(__file__).resolve().parents[1]


def test_time_limit_and_node_failure(lab: Lab, cluster: LabDoor) -> None:
    cluster.env["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    options = ("+cluster.sbatch.requeue=false", "+cluster.sbatch.exclusive=true")  # on two nodes
    jobs = ("+stage=download", "dataset=ilsvrc", "dataset.make=failing:wait", *options)
    for name, minutes in (("long", 1), ("lost", 30)):
        source = f"dataset.source={cluster.cwd}/{name}"
        cluster(*jobs, f"dataset.name={name}", source, f"cluster.stage.download.time={minutes}")
    eventually(lambda: all(row["nodes"] for row in cluster.jobs()))
    node = cluster.jobs()[1]["nodes"]
    lab.crash(node)
    lab.wait_until_down(node)
    eventually(lambda: [row["state"] for row in cluster.jobs()] == ["failed", "failed"], 200)
    assert [row["failure"] for row in cluster.jobs()] == ["time_limit", "node_failure"]
    limit, failure = cluster("retry", "--failed", "--dry-run").stdout.splitlines()[:2]
    assert limit.endswith("time limit · cluster.stage.download.time: 1 → 2")
    assert failure.endswith(f"node failure · cluster.sbatch.exclude: default → {node}")
    lab.revive(node)
    assert cluster("retry", "--failed").stdout.count("submitted") == 2
    first, second = (str(row["job_id"]) for row in cluster.jobs())
    assert lab.job(first)["TimeLimit"] == "00:02:00"
    assert lab.job(second)["ExcNodeList"] == node


def test_job_that_is_requeued_too_often(lab: Lab, cluster: LabDoor) -> None:
    cluster.env["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    settings = ("dataset.name=often", f"dataset.source={cluster.cwd}/often", "dataset.make=failing:wait")
    cluster("+stage=download", "dataset=ilsvrc", *settings, "cluster.max_requeues=0")
    eventually(lambda: bool(cluster.jobs()[0]["nodes"]))
    lab.scontrol("requeue", str(cluster.jobs()[0]["job_id"]))
    (row,) = cluster.until("failed", seconds=300)
    assert row["failure"] == "requeued_too_often"
    shown = cluster("retry", row["run"], "--dry-run").stdout
    assert "preempted too often · cluster.max_requeues: 0 → 10" in shown
