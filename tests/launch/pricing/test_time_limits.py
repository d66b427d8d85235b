"""The settings with which a job ends within its time limit."""

from __future__ import annotations

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.launch.pricing.price import settings_needed


def test_requeues_are_not_proposed_where_a_start_has_little_time_for_work() -> None:
    cluster = Cluster(executor="slurm", time=1, max_requeues=2)
    assert settings_needed(3600, 20, cluster).startswith("cluster.max_requeues=")
    for startup in (30, 50):
        assert settings_needed(3600, startup, cluster).startswith("cluster.time=")
