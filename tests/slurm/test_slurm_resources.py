"""What `show` prints of a job on a real Slurm, from its accounting."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from command_line import eventually
from lab import Lab, LabDoor

TESTS = Path(__file__).resolve().parents[1]


def test_resources_of_a_requeued_and_cancelled_job(lab: Lab, cluster: LabDoor) -> None:
    cluster.env["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    settings = ("dataset.name=used", f"dataset.source={cluster.cwd}/used", "dataset.make=failing:wait")
    # cluster=lab gives a download ten minutes.
    cluster("+stage=download", "dataset=ilsvrc", *settings, "cluster.memory_gb=1")
    eventually(lambda: bool(cluster.jobs()[0]["nodes"]))
    job = str(cluster.jobs()[0]["job_id"])
    run = cluster.jobs()[0]["run"]
    records = cluster.workspace / "runs" / run / "attempts" / "1" / "usage"
    eventually((records / "0-0.json").exists, 180)
    lab.scontrol("requeue", job)
    eventually((records / "1-0.json").exists, 180)
    cluster("cancel", run)
    eventually(lambda: not lab.slurm("squeue", "--noheader"))
    found = {}

    def both_starts_are_recorded() -> bool:
        (found["attempt"],) = json.loads(cluster("show", run, "--json").stdout)["attempts"]
        return bool(found["attempt"]["resources"]["used_memory_bytes"])

    eventually(both_starts_are_recorded)
    used = found["attempt"]["resources"]
    assert (used["memory_bytes"], used["limit_seconds"], used["gpus"]) == (2**30, 600, 0)
    assert used["cpus"] >= 1
    assert used["cpu_efficiency"] > 0
    assert used["used_memory_bytes"] > 2**20
    assert found["attempt"]["requeued"] == 1
    assert found["attempt"]["diagnosis"]["class"] == "cancelled"
    starts = lab.slurm("sacct", "-nP", "--duplicates", "-X", f"--jobs={job}", "--format=ElapsedRaw").split()
    assert len(starts) == 2
