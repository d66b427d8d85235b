"""Findings of checks, the reports of a probe, and the texts that several checks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from hpc_imagenet.config.schema import Cluster

OK, WARN, FAIL = "ok", "warn", "fail"
NO_RESULT = "no result within"  # a program of a probe took too long; the seconds follow


class Finding(NamedTuple):
    """Outcome of one check."""

    status: str  # OK, WARN or FAIL
    found: str
    fix: str = ""  # which setting to change


ok, warn, fail = partial(Finding, OK), partial(Finding, WARN), partial(Finding, FAIL)


@dataclass(frozen=True)
class StageCluster:
    """Cluster settings of one stage."""

    stage: str
    cluster: Cluster
    overrides: frozenset[str]  # names of the settings under cluster.stage.<stage>

    @property
    def on_slurm(self) -> bool:
        """Whether the stage runs as a Slurm job."""
        return self.cluster.executor == "slurm"

    def setting(self, name: str) -> str:
        """Return the full name of a setting: `cluster.<name>` or `cluster.stage.<stage>.<name>`."""
        return f"cluster.stage.{self.stage}.{name}" if name in self.overrides else f"cluster.{name}"


@dataclass(frozen=True)
class ProbeReport(StageCluster):
    """What one probe was to check, and the reports of its tasks."""

    size: int  # tasks requested
    login: Mapping[str, Any]  # `probe.installation` of the login node, and `versions` of packages there
    archives: int = 0  # bytes of the dataset's archives, as far as they are known
    source: str = ""  # dataset.source, if this probe checks it
    tasks: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # by rank; see `probe.run_probe`
    missing_nodes: Sequence[str] = ()  # nodes of the job that sent no report

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that sent a report, in order of rank."""
        return list(dict.fromkeys(task["node"] for _, task in sorted(self.tasks.items())))

    def node_reports(self, key: str = "disks") -> list[Mapping[str, Any]]:
        """Return the complete reports of the first task of each node, of those that have `key`."""
        return [task for _, task in sorted(self.tasks.items()) if task.get(key) is not None]

    def by_node(self, key: str, text: Callable[[Any], str]) -> str:
        """Return `text(report[key])` of each node with the node's name, or once if all have the same."""
        groups: dict[str, list[str]] = {}
        for report in self.node_reports(key):
            groups.setdefault(text(report[key]), []).append(report["node"])
        if len(groups) == 1:
            return next(iter(groups))
        return "; ".join(f"{node_names(nodes)}: {each}" for each, nodes in groups.items() if each)


def node_names(nodes: Sequence[str]) -> str:
    """Return the names of at most six nodes, or of the first four and the number of the others."""
    return " ".join(nodes) if len(nodes) <= 6 else f"{' '.join(nodes[:4])} and {len(nodes) - 4} more"


def gigabytes(size: float) -> str:
    """Return a number of bytes as text in units of 10^9 bytes."""
    return f"{size / 1e9:,.1f} GB"
