"""Files of a lab: its private folder, and the configuration of every daemon and node."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
GPUS, CPUS, MEMORY_MB = 2, 8, 64000  # per node; declared to Slurm, whatever the machine has

# The network is the lab's own, so two labs may use the same addresses.
LOGIN = "10.77.0.1"
ADDRESS = {node: f"10.77.0.{11 + i}" for i, node in enumerate(NODES)}
DATABASE_PORT, CONTROL_PORT = 6819, 6817

FOLDERS = ("bin", "dev", "empty", "etc", "log", "mysql", "nodes", "root", "run", "spool", "state")

COMMANDS = (
    "sacct",
    "sacctmgr",
    "salloc",
    "sattach",
    "sbatch",
    "sbcast",
    "scancel",
    "scontrol",
    "sdiag",
    "sinfo",
    "sprio",
    "squeue",
    "sreport",
    "srun",
    "sshare",
    "sstat",
    "strigger",
)

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=login({LOGIN})
SlurmctldPort={CONTROL_PORT}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that is requeued waits this long (s; 120 by default) until its old credential has expired.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SwitchType=switch/none
MpiDefault=none
# No cgroups by default (see `lab up --memory`): cores are not bound and memory is not enforced.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5

# Short times, so that a crash or a time limit is seen in seconds.
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=3
InactiveLimit=0
MinJobAge=300
ReturnToService=2

SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
MaxArraySize=128
MaxJobCount=5000
JobRequeue=1
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={LOGIN}
AccountingStoragePort={DATABASE_PORT}
AccountingStoragePass={folder}/run/munge.sock
AccountingStorageTRES=gres/gpu

# More CPUs and memory than the machine may have.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP
PartitionName=debug Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high PriorityTier=100 PreemptMode=OFF
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
DbdHost=login
DbdAddr={LOGIN}
DbdPort={DATABASE_PORT}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
PidFile={folder}/run/slurmdbd.pid
"""

CGROUPS = "/sys/fs/cgroup/memory"  # version 1, the only one that Slurm 22.05 uses without systemd
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
"""

# Inside the lab its namespaces are either our own or (in a user namespace) cannot be inspected.
COMMAND = """\
#!/bin/sh
export SLURM_CONF='{conf}'
if [ ! -e /proc/{pid}/ns/net ] || [ /proc/self/ns/net -ef /proc/{pid}/ns/net ]; then
    [ -d /proc/{pid} ] && exec {real} "$@"
    echo '{name}: the lab is down: slurm/lab/lab up' >&2
    exit 1
fi
exec {enter} {real} "$@"
"""


@dataclass(frozen=True)
class Folder:
    """The lab's folder, and the paths in it."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def socket(self) -> Path:
        """The socket on which the lab's init accepts commands while the lab runs."""
        return self / "run/lab.sock"

    @property
    def slurm_conf(self) -> Path:
        """The value of SLURM_CONF."""
        return self / "etc/slurm.conf"

    def scratch(self, node: str) -> Path:
        """Return the folder that a node sees as /scratch."""
        return self / f"nodes/{node}/scratch"

    @property
    def is_lab(self) -> bool:
        """Whether a lab was made here, whose files may be overwritten and removed."""
        return (self / "munge.key").exists()

    def make(self) -> None:
        """Create the folder with mode 700: it holds the cluster's key.

        Raises:
            OSError: it belongs to another user, or holds a folder of the same name as one of the lab's.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.path.stat().st_uid != os.getuid():
            owner = self.path.stat().st_uid
            raise PermissionError(f"{self} belongs to user {owner}: choose another folder with --dir")
        if (found := [name for name in FOLDERS if (self / name).exists()]) and not self.is_lab:
            raise FileExistsError(f"{self / found[0]} is not of a lab: choose another folder with --dir")
        self.path.chmod(0o700)
        with contextlib.suppress(FileExistsError):
            (self / "munge.key").touch(mode=0o600, exist_ok=False)
            (self / "munge.key").write_bytes(os.urandom(1024))
        for name in FOLDERS:
            (self / name).mkdir(exist_ok=True)
        for node in NODES:
            self.scratch(node).mkdir(parents=True, exist_ok=True)

    def prepare(self, settings: dict[str, str], memory: bool) -> None:
        """Write all configuration for a cold start; `settings` replace lines of slurm.conf.

        Only the accounting of earlier starts and the scratch disks are kept. With `memory` a job that exceeds
        its requested memory is killed, with the state OUT_OF_MEMORY.
        """
        self.remove_cgroups()
        for name in ("log", "run", "spool", "state"):
            shutil.rmtree(self / name, ignore_errors=True)
        self.make()
        for gpu in range(GPUS):
            device = self / f"dev/nvidia{gpu}"
            device.unlink(missing_ok=True)
            device.symlink_to("/dev/null")  # gres/gpu refuses plain files
        nodes = "\n".join(f"NodeName={n} NodeHostname={n} NodeAddr={ADDRESS[n]}" for n in NODES)
        values = {
            **globals(),
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "folder": self,
            "nodes": nodes,
            "first_job": self._first_job(),
        }
        if memory:
            settings = {"TaskPlugin": "task/cgroup", **settings}
            self._write("cgroup.conf", CGROUP_CONF)
        self._write("slurm.conf", _with_settings(SLURM_CONF.format_map(values), settings))
        self._write("slurmdbd.conf", SLURMDBD_CONF.format_map(values), 0o600)
        self._write(
            "gres.conf",
            f"NodeName=n[1-{len(NODES)}] Name=gpu File={self}/dev/nvidia[0-{GPUS - 1}]\n",
        )
        names = {LOGIN: "login"} | {ADDRESS[n]: n for n in NODES}
        # The second form is an IPv4 peer as seen by an IPv6 socket; torch looks up its name.
        lines = [f"{address} {name}\n::ffff:{address} {name}\n" for address, name in names.items()]
        self._write("hosts", "".join(["127.0.0.1 localhost\n", *lines]))
        # No server listens there, so look-ups fail at once; an unreachable server would cost 20 s per name.
        self._write("resolv.conf", "nameserver 127.0.0.1\n")

    def write_commands(self, enter: list[str], pid: int) -> None:
        """Write bin/: Slurm's commands for shells outside the lab, each of which enters its network."""
        for name in COMMANDS:
            real = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin")
            if real is None:
                continue
            path = self / f"bin/{name}"
            text = COMMAND.format(conf=self.slurm_conf, name=name, pid=pid, real=real, enter=" ".join(enter))
            new = path.with_suffix(".new")
            new.write_text(text)
            new.chmod(0o755)
            new.replace(path)

    def remove_cgroups(self) -> None:
        """Remove the cgroups that memory limits leave on the machine after the lab has ended."""
        conf = self / "etc/cgroup.conf"
        if conf.exists():
            for node in NODES:
                for path, _, _ in os.walk(f"{CGROUPS}/slurm_{node}", topdown=False):
                    with contextlib.suppress(OSError):  # the kernel keeps cgroups that have processes
                        Path(path).rmdir()
            conf.unlink()

    def _first_job(self) -> int:
        # A reused job id would find the results of another job in a workspace that was kept.
        path = self / "first-job.json"
        last = json.loads(path.read_text()) if path.exists() else random.randrange(1, 3000) * 10_000
        path.write_text(json.dumps(last + 10_000))
        return int(last)

    def _write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self / f"etc/{name}"
        path.unlink(missing_ok=True)
        path.touch(mode=mode)
        path.write_text(text)


def _with_settings(text: str, settings: dict[str, str]) -> str:
    left = dict(settings)
    lines = []
    for line in text.splitlines():
        name = line.partition("=")[0]
        lines.append(f"{name}={left.pop(name)}" if name in left else line)
    return "\n".join([*lines, *(f"{name}={value}" for name, value in left.items())]) + "\n"
