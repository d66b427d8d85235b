"""Choice of cluster=auto: slurm if Slurm replies on this machine, else local."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from hpc_imagenet.errors import UserError

_TIMEOUT = 10.0  # s for a reply of Slurm's controller


def resolve_cluster(overrides: Sequence[str]) -> tuple[list[str], str]:
    """Replace cluster=auto, or no cluster setting, by an explicit one.

    Returns:
        The overrides, and the reason of the choice; empty if the overrides name a cluster.

    Raises:
        UserError: Slurm is configured on this machine, but does not reply.
    """
    if any(override.startswith("cluster=") and override != "cluster=auto" for override in overrides):
        return list(overrides), ""
    name, reason = choose_cluster()
    resolved = [override for override in overrides if override != "cluster=auto"]
    # Next to the other overrides: Hydra cannot parse overrides with options between them.
    index = next((i for i, word in enumerate(resolved) if "=" in word and word[0] != "-"), len(resolved))
    resolved.insert(index, f"cluster={name}")
    return resolved, reason


def choose_cluster() -> tuple[str, str]:
    """Return slurm or local, and the reason.

    Raises:
        UserError: Slurm is configured, but does not reply: a job must not run on a login node by mistake.
    """
    if not shutil.which("sbatch"):
        return "local", "no sbatch is on the PATH"
    try:
        done = subprocess.run(
            ["scontrol", "ping"], capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except FileNotFoundError:
        return "slurm", "sbatch is on the PATH"
    except subprocess.TimeoutExpired:
        problem = f"no reply within {_TIMEOUT:g} s"
    else:
        if " UP" in done.stdout:  # one line per controller, the primary and its backups
            return "slurm", "Slurm replies"
        if "fatal" in done.stderr:  # no slurm.conf: the packages alone are installed
            return "local", "sbatch is on the PATH, but Slurm is not configured on this machine"
        lines = (done.stderr.strip() or done.stdout.strip() or "no reply").splitlines()
        problem = lines[-1].removeprefix("scontrol: error: ")
    raise UserError(
        f"cluster=auto: Slurm does not reply ({problem}): try again, or set cluster=local "
        "to run on this machine"
    )
