"""Proposal of a cluster file from Slurm's answers: `doctor --write NAME`.

The file is proved by the checks of the doctor, written to the user's config folder, and made the default
cluster there.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.input.slurm_values import parse_minutes
from hpc_imagenet.config.input.stored_settings import FILE, store, user_folder
from hpc_imagenet.doctor.check_result import FAIL
from hpc_imagenet.doctor.cluster_checks import check_commands, check_squeue, partitions
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write

DAY = 1440  # minutes
_MEMORY_SHARE = 0.9  # of a node's memory; the rest is left to Slurm and the system
_COLUMNS = "%R|%D|%c|%m|%G|%f"  # partition, nodes, CPUs, MB, generic resources, features
_GPU = re.compile(r"gpu(?::([\w.-]+))?:(\d+)(?=[(,]|$)")  # the type of a part of a GPU begins with a digit

RunChecks = Callable[[list[str], str], list[dict[str, str]]]
"""Run the doctor with overrides and a config folder; return its results."""


@dataclass(frozen=True)
class Partition:
    """A partition, and the smallest of its nodes."""

    name: str
    default: bool
    nodes: int
    cpus: int  # per node
    memory: int  # MB per node
    gpus: int  # per node
    gpu_types: tuple[str, ...]
    features: tuple[str, ...]
    time: int | None  # limit in minutes; None: unlimited
    preempted: bool


def write_cluster_file(
    name: str, overrides: Sequence[str], run_checks: RunChecks, as_json: bool = False
) -> int:
    """Propose, check and store a cluster file; print what was done.

    Args:
        name: name of the file, without .yaml.
        overrides: settings of the checks, such as workspace=FOLDER.
        run_checks: the doctor.
        as_json: whether it prints JSON on stdout; what was done then goes to stderr.

    Returns:
        Exit code: 0 if the file is the default cluster now, 1 if a check failed.

    Raises:
        UserError: the file exists already, or Slurm does not reply.
    """
    path = user_folder() / "cluster" / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--write {name}: not a file name: use letters, digits, . _ and -")
    if path.exists():
        raise UserError(f"{path} exists already: change it, remove it, or choose another name")
    for finding in (check_commands(), check_squeue()):
        if finding.status == FAIL:
            raise UserError(f"--write {name}: {finding.found}: {finding.fix}")
    given = dict(word.removeprefix("cluster.").split("=", 1) for word in overrides if _is_cluster_value(word))
    text = propose(name, find_partitions(), _accounts(), slurm.user_associations("qos"), given)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "cluster" / path.name
        trial.parent.mkdir()
        trial.write_text(text)
        results = run_checks([f"cluster={name}", *overrides], folder)
    failed = [result["check"] for result in results if result["status"] == FAIL]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())
    output = sys.stderr if as_json else sys.stdout
    # Without internet on the nodes only the download stage fails; its archives can come from elsewhere.
    if blocking := [check for check in failed if check != "internet"]:
        print(
            f"wrote {path}; failed checks: {', '.join(blocking)}. Change the file, then check it with "
            f"python -m hpc_imagenet doctor cluster={name}, and store cluster: {name} in "
            f"{user_folder() / FILE}",
            file=output,
        )
        return 1
    print(f"wrote {path}, and made it the default cluster in {store({'cluster': name})}", file=output)
    return 0


def find_partitions() -> list[Partition]:
    """Return the partitions that are up, by sinfo and scontrol."""
    known = partitions()
    lines = slurm.run_command("sinfo", "--noheader", f"--format={_COLUMNS}").stdout.splitlines()
    nodes: dict[str, list[list[str]]] = {}
    for line in lines:
        name, *cells = line.strip().split("|")
        if len(cells) == 5 and known.get(name, {}).get("State", "UP") == "UP":
            nodes.setdefault(name, []).append(cells)
    return [_partition(name, rows, known.get(name, {})) for name, rows in nodes.items()]


def _partition(name: str, rows: list[list[str]], values: Mapping[str, str]) -> Partition:
    found = [_GPU.findall(row[3]) for row in rows]
    limit = values.get("MaxTime", "UNLIMITED")
    return Partition(
        name=name,
        default=values.get("Default") == "YES",
        nodes=sum(_number(row[0]) for row in rows),
        cpus=min(_number(row[1]) for row in rows),
        memory=min(_number(row[2]) for row in rows),
        gpus=min(sum(int(count) for _, count in gpus) for gpus in found),
        gpu_types=tuple(sorted({kind for gpus in found for kind, _ in gpus if kind})),
        features=tuple(sorted({f for row in rows for f in row[4].split(",") if f and f != "(null)"})),
        time=parse_minutes(limit) if limit[:1].isdigit() else None,
        preempted=values.get("PreemptMode", "OFF") != "OFF",
    )


def _number(text: str) -> int:
    digits = re.match(r"\d+", text)  # sinfo prints 8+ if nodes differ
    return int(digits[0]) if digits else 0


def _accounts() -> list[str]:
    """Return the accounts of the user, the default one first; empty without accounting."""
    found = slurm.user_associations("account")
    command = ("sacctmgr", "-nP", "show", "user", getpass.getuser(), "format=defaultaccount")
    default = slurm.run_command(*command).stdout.strip()
    return [default, *(name for name in found if name != default)] if default in found else found


def _is_cluster_value(word: str) -> bool:
    return re.match(r"cluster\.(?!host)[a-z_]+=", word) is not None  # the host is stored apart


def propose(
    name: str,
    found: Sequence[Partition],
    accounts: Sequence[str],
    qos: Sequence[str],
    given: Mapping[str, str],
) -> str:
    """Return a cluster file with a comment on each line.

    Args:
        name: name of the file.
        found: the partitions; the default one with GPUs is preferred, then the one with most GPUs.
        accounts: accounts of the user, the one to use first.
        qos: QOS of the user.
        given: settings that replace the proposed ones, such as gpus_per_node: "0".

    Raises:
        UserError: there is no partition.
    """
    if not found:
        raise UserError("sinfo lists no partition that is up: try again later")
    # A partition that is given may be the only one that the user may use.
    usable = [each for each in found if each.name == given.get("partition")] or found
    train = max(
        usable, key=lambda each: (each.gpus > 0, not each.preempted, each.default, each.gpus * each.nodes)
    )
    time_limit = min(train.time or DAY, DAY)
    with contextlib.suppress(ValueError):  # such as null, which the checks refuse
        time_limit = parse_minutes(given.get("time", time_limit))

    def suits_data(each: Partition) -> tuple[object, ...]:
        is_long = each.time is None or each.time >= min(DAY, time_limit)
        return (not each.gpus, is_long, not each.preempted, each.default, each.cpus)

    data = max(usable, key=suits_data)
    others = ", ".join(_describe(each) for each in found if each != train) or "none"
    tasks = (train.gpus or 1) if given.get("gpus_per_node") != "0" else 1
    kind = train.gpu_types[0] if len(train.gpu_types) == 1 else ""
    gpus = f"{kind}:{train.gpus}" if kind[:1].isalpha() and train.gpus else train.gpus
    memory = int(_MEMORY_SHARE * train.memory / 1024)
    limit = "unlimited" if train.time is None else f"{train.time} minutes"
    values = {
        "partition": (train.name, f"{_describe(train)}; others: {others}"),
        "account": (accounts[0] if accounts else "null", f"yours: {', '.join(accounts) or 'none known'}"),
        "qos": ("null", f"yours: {', '.join(qos) or 'none known'}; null: the default"),
        "constraint": ("null", f"node features: {', '.join(train.features) or 'none'}"),
        "gpus_per_node": (gpus, f"all of a node; types: {', '.join(train.gpu_types) or 'not named'}"),
        "cpus_per_task": (max(1, train.cpus // tasks), f"{train.cpus} CPUs of a node / {tasks}"),
        "memory_gb": (memory, f"GiB, 90 % of a node's {train.memory / 1024:.0f} GiB"),
        "time": (time_limit, f"minutes; the partition's limit: {limit}. A training continues in a new job"),
    }
    values |= {key: (_yaml(value), "as given") for key, value in given.items()}
    lines = [
        f"# Proposed by `doctor --write {name}` from Slurm's answers; change any line.",
        "defaults: [slurm, _self_] # all other settings, with a comment on each: conf/cluster/slurm.yaml",
        *(f"{key}: {value} # {comment}" for key, (value, comment) in values.items()),
        "stage: # data stages use no GPU",
    ]
    cpus, small = min(8, data.cpus), max(1, min(8, int(_MEMORY_SHARE * data.memory / 1024)))
    own_time = f", time: {data.time}" if data.time is not None and data.time < time_limit else ""
    for stage, cores in (("download", min(2, cpus)), ("process", cpus), ("upload", min(2, cpus))):
        size = f"gpus_per_node: 0, cpus_per_task: {cores}, memory_gb: {small}{own_time}"
        lines.append(f"  {stage}: {{partition: {data.name}, {size}}}")
    return "\n".join(lines) + "\n"


def _yaml(value: str) -> str:
    """Return a value of an override as YAML."""
    if value.startswith(("[", "{")):
        with contextlib.suppress(HydraException):  # the checks refuse it
            return json.dumps(OverridesParser.create().parse_override(f"value={value}").value(), default=str)
    return json.dumps(value) if re.search(r"[:#{[]", value) else value


def _describe(partition: Partition) -> str:
    gpus = f" with {partition.gpus} GPUs" if partition.gpus else ""
    extra = ", preemptable" if partition.preempted else ""
    return f"{partition.name} ({partition.nodes} nodes{gpus}{extra})"
