"""Limits of submitted jobs: MaxSubmitJobs and GrpSubmitJobs of an account, a user or a QOS.

sbatch refuses a job array as a whole if its tasks and the jobs in the queue are more than the limit, and
names the limit. Source of the names: job_state_reason.c and slurm_protocol_defs.c of Slurm 20.11 to 26.05.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Callable

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import UserError

# By the name of the limit: what has it, and its field in sacctmgr.
_LIMITS = {
    "QOSMaxSubmitJobPerUserLimit": ("qos", "MaxSubmitJobsPerUser"),
    "MaxSubmitJobsPerAccount": ("qos", "MaxSubmitJobsPerAccount"),
    "QOSGrpSubmitJobsLimit": ("qos", "GrpSubmitJobs"),
    "AssocMaxSubmitJobLimit": ("assoc", "MaxSubmitJobs"),
    "AssocGrpSubmitJobsLimit": ("assoc", "GrpSubmitJobs"),
}
_NAME = re.compile("|".join(_LIMITS))


class SubmitLimitReached(UserError):
    """A limit of submitted jobs is reached; the job may be submitted when others have ended."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def limit_in(reply: str) -> str:
    """Return the name of the limit in a reply of sbatch; empty if there is none."""
    found = _NAME.search(reply)
    return found[0] if found else ""


def describe_limit(name: str, cluster: Cluster) -> str:
    """Return the reason of a waiting run, with the number if sacctmgr has exactly one."""
    kind, field = _LIMITS[name]
    query = ["sacctmgr", "--noheader", "--parsable2", "show", kind]
    if kind == "qos":
        query += [cluster.qos] if cluster.qos else []
    else:
        query += [f"user={getpass.getuser()}"] if "Max" in name else ["user="]
        query += [f"account={cluster.account}"] if cluster.account else []
    reply = slurm.run_command(*query, f"format={field}").stdout
    numbers = {line.strip() for line in reply.splitlines()} - {""}
    number = f"{numbers.pop()} " if len(numbers) == 1 else ""
    return f"waiting: limit of {number}submitted jobs ({name})"


def largest_accepted(refused: int, is_accepted: Callable[[int], bool]) -> int:
    """Return the largest number of tasks that sbatch would accept.

    Args:
        refused: a number that it has refused.
        is_accepted: the reply of `sbatch --test-only` to a number of tasks.
    """
    if is_accepted(refused):  # this Slurm does not check limits then, or a job has just ended
        return refused // 2
    low, high = 0, refused
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_accepted(middle) else (low, middle)
    return low
