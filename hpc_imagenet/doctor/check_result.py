"""A line of the doctor's report, and the words that all of them use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hpc_imagenet.config.schema import Cluster

OK, FAIL, WARN = "well", "wrong", "unsure"
STATUS_MARKS = {OK: "✓", FAIL: "✗", WARN: "\N{EN DASH}"}

ROOM = 10**9  # bytes without which a folder counts as full
INODES = 10_000  # the same for its files


@dataclass(frozen=True)
class CheckResult:
    """One matter: `where` is login or the stage whose nodes were asked; `mend` says what to set."""

    where: str
    check: str
    status: str  # WELL, WRONG or UNSURE
    found: str
    fix: str = ""

    def __str__(self) -> str:
        """Draw it as a line of text, and what to set in a second one."""
        mend = f"\n{'':17}→ {self.fix}" if self.fix else ""
        return f"  {STATUS_MARKS[self.status]} {self.check:<12} {self.found}{mend}"

    def plain(self) -> dict[str, str]:
        """Return it as a mapping of strings."""
        return asdict(self)


@dataclass(frozen=True)
class ProbeReport:
    """All that one probe brought home from its nodes."""

    stage: str
    cluster: Cluster  # for this stage
    overlaid: frozenset[str]  # the settings that the stage has of its own
    size: int  # tasks
    home: Mapping[str, Any]  # what the login side says of itself: python, package, code, versions
    greetings: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # by rank
    reports: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # of each node's first task
    silent: tuple[str, ...] = ()  # nodes that told nothing
    archives: int = 0  # bytes of the dataset, as far as they are known
    source: str = ""  # where the archives come from

    @property
    def nodes(self) -> list[str]:
        """The nodes that told something, in order of rank."""
        return list(dict.fromkeys(hello["node"] for _, hello in sorted(self.greetings.items())))

    @property
    def on_slurm(self) -> bool:
        """Whether Slurm gave out what the tasks have."""
        return self.cluster.executor == "slurm"

    def setting(self, name: str) -> str:
        """Return a cluster setting's full name, as it must be written for this stage."""
        return setting(self.stage, name, self.overlaid)

    def result(self, check: str, mark: str, found: str, mend: str = "") -> CheckResult:
        """Return a line of this stage."""
        return CheckResult(self.stage, check, mark, found, mend if mark != OK else "")


def setting(stage: str, name: str, overlaid: Iterable[str]) -> str:
    """Return `cluster.stage.<stage>.<name>` where the stage has a value of its own, else `cluster.<name>`."""
    return f"cluster.stage.{stage}.{name}" if name in overlaid else f"cluster.{name}"


def by_node(seen: ProbeReport, tell: Callable[[Mapping[str, Any]], str]) -> str:
    """Return what is told of each node, once where all say the same."""
    groups: dict[str, list[str]] = {}
    for _, report in sorted(seen.reports.items()):
        groups.setdefault(tell(report), []).append(report["node"])
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{node_names(nodes)}: {text}" for text, nodes in groups.items() if text)


def node_names(nodes: Sequence[str]) -> str:
    """Return node names in a row, the first few of many."""
    return " ".join(nodes) if len(nodes) <= 6 else f"{' '.join(nodes[:4])} and {len(nodes) - 4} more"


def is_full(disk: Mapping[str, Any]) -> bool:
    """Whether a folder has next to no bytes or files left."""
    return (disk["free"] or 0) < ROOM or (disk["inodes"] is not None and disk["inodes"] < INODES)


def free_space_text(disk: Mapping[str, Any]) -> str:
    """Return what `probe.disk` found in words: error, or free bytes, inodes and kind of file system."""
    if disk["error"]:
        return str(disk["error"])
    inodes = "" if disk["inodes"] is None else f" and {disk['inodes']:,} files"
    return f"{size_text(disk['free'])}{inodes} free" + (f" ({disk['kind']})" if disk["kind"] else "")


def size_text(amount: float) -> str:
    """Return bytes in words: 1.5 GB, in powers of ten."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if amount >= limit:
            return f"{amount / limit:.1f} {unit}"
    return f"{amount:.0f} bytes"
