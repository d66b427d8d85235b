"""Fake Slurm commands: shell scripts in a folder of the PATH that record their arguments."""

from __future__ import annotations

from pathlib import Path

from hpc_imagenet.cluster import slurm
from hpc_imagenet.cluster.partition_limits import partition_limits

# sbatch numbers the jobs and keeps each script, and the SLURM_ variables that it would export.
SBATCH = """
for word in "$@"; do
  case $word in
    --foo*) echo "sbatch: unrecognized option '$word'" >&2; exit 1 ;;
    --help) exit 0 ;;
  esac
done
n=$(ls $here | grep -c script)
cp "$1" $here/script.$((n + 1)); env | grep ^SLURM_ >> $here/env
echo Submitted batch job $((n + 1))
"""
# squeue prints the rows in the file `queue`: job|state|restarts|exit code|reason.
SQUEUE = """
test ! -f $here/queue || awk -F'|' '{printf "%-48s%-24s%-12s%-160s%-12s\\n", $1, $2, $3, $5, $4}' $here/queue
"""
SCONTROL = "echo 'Slurmctld(primary) at head is UP'"
SACCT = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
SCANCEL = 'echo "$@" >> $here/cancelled'
# srun drops its own options and runs the command as the only task, with its output where srun would write it.
SRUN = """
out=/dev/stdout err=/dev/stderr
while [[ $1 == --* ]]; do
  case $1 in
    --output=*) out=${1#*=} ;;
    --output) out=$2; shift ;;
    --error=*) err=${1#*=} ;;
    --error) err=$2; shift ;;
  esac
  shift
done
out=${out//%t/0} err=${err//%t/0}
export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_STEP_ID=0 SLURM_JOB_NODELIST=n1 SLURMD_NODENAME=n1
exec "$@" >> "${out//%j/$SLURM_JOB_ID}" 2>> "${err//%j/$SLURM_JOB_ID}"
"""


def write_command(folder: Path, name: str, text: str) -> None:
    """Write a bash script `folder/name`; `$here` in it is the folder."""
    path = folder / name
    path.write_text(f"#!/bin/bash\nhere={folder}\n{text}\n")
    path.chmod(0o755)


def write_slurm(folder: Path) -> None:
    """Write all commands of submission into `folder`; srun does nothing."""
    slurm._reply_cache.clear()
    partition_limits.cache_clear()
    commands = {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL, "scontrol": SCONTROL, "srun": "true"}
    commands |= {"sacct": SACCT, "sinfo": "exit 1"}
    for name, text in commands.items():
        write_command(folder, name, text)


def scripts(folder: Path) -> list[str]:
    """Return the scripts that sbatch was given, in order."""
    return [p.read_text() for p in sorted(folder.glob("script.*"), key=lambda p: int(p.suffix[1:]))]


def queue_row(job: object, state: str, reason: str = "None") -> str:
    """Return a line of squeue in the format that slurm.py requests."""
    cells = {"jobarrayid": str(job), "state": state, "reason": reason}
    return "".join(cells.get(name, "0").ljust(width) for name, width in slurm._COLUMNS)
