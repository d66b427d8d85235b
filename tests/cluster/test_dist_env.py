"""Where the tasks of a job meet, from the environment that srun sets."""

from __future__ import annotations

import socket

import pytest

from hpc_imagenet.cluster.dist_env import from_environment

# Of a step in an allocation, as Slurm 22.05 sets them.
STEP = {
    **{"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "1", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    "SLURM_LAUNCH_NODE_IPADDR": "10.77.0.11",
}


@pytest.mark.parametrize(
    ("step", "job", "master"),
    [
        ("n[3-4]", "n[1-4]", "n3"),
        ("", "n[1-4]", "n1"),
        ("unknown1,n2", "unknown1,n[2-4]", "10.77.0.11"),
        ("unknown3,n4", "n[1-2],unknown3,n4", "unknown3"),  # that address is of the node n1
    ],
)
def test_tasks_meet_at_the_first_node_of_their_step(
    monkeypatch: pytest.MonkeyPatch, step: str, job: str, master: str
) -> None:
    def resolve(host: str, port: None) -> None:
        if host.startswith("unknown"):
            raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    variables = {**STEP, "SLURM_STEP_NODELIST": step, "SLURM_JOB_NODELIST": job}
    assert from_environment(variables).master == master


@pytest.mark.parametrize(
    ("nodes", "first", "last"),
    [
        ("n[3-4]", "n3", "n4"),
        ("gpu[03-05,9],big1", "gpu03", "big1"),
        ("big1,gpu[03-05,9]", "big1", "gpu9"),
        ("a[1,7]-ib,b[1-2]-ib", "a1-ib", "b2-ib"),
        ("one,two", "one", "two"),
    ],
)
def test_each_node_knows_another_one(nodes: str, first: str, last: str) -> None:
    variables = {**STEP, "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": f"other,{nodes}"}
    assert from_environment(variables).peer == last
    assert from_environment({**variables, "SLURM_NODEID": "1"}).peer == first
