"""Run the tasks of Slurm jobs in a container: Apptainer, Singularity, Charliecloud, Podman or Pyxis.

A job starts each task as `srun … PYTHON -m hpc_imagenet.launch.tasks.start_task FOLDER`. A container replaces
PYTHON by a command that runs the image's python3; Pyxis does the same with options of srun. The line after
srun, which decides whether the job is requeued, runs outside the container, where Slurm's commands are.

The package itself is bound from the checkout that submits, so the image needs only its dependencies.
"""

from __future__ import annotations

import shlex
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.schema import Cluster, Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.ownership import check_own
from hpc_imagenet.launch.slurm_jobs.resource_requests import requests_gpus

PACKAGE_ROOT = Path(__file__).resolve().parents[3]
_PYTHON = "python3"
# ch-run requires the variable; torch reads the name from it where the image's /etc/passwd does not have it.
_WITH_USER = 'env USER="${USER:-$(id -un)}"'
_PROGRAMS = {
    "apptainer": "apptainer",
    "singularity": "singularity",
    "charliecloud": "ch-run",
    "podman": "podman",
}


@dataclass(frozen=True)
class ContainerCommand:
    """How srun starts a task: the command in place of Python, and options of srun."""

    python: str  # shell words
    srun_args: tuple[str, ...] = ()


def container_command(cluster: Cluster, folders: Sequence[str]) -> ContainerCommand:
    """Return how the tasks of a job start in `cluster.container`.

    Args:
        cluster: settings with a container.
        folders: folders of the host that the job uses, bound under the same path.
    """
    runtime = find_runtime(cluster)
    bound = dict.fromkeys([str(PACKAGE_ROOT), str(Path.home()), *folders])
    if runtime in ("podman", "pyxis"):
        bound["/tmp"] = None  # which others share: the socket of a session is in it
    mounts = [shlex.quote(folder) for folder in bound]
    if cluster.scratch:
        mounts.append(f'"{cluster.scratch}"')  # its variables are expanded on the node
    image, gpus = shlex.quote(cluster.container or ""), requests_gpus(cluster)
    if runtime == "pyxis":
        arguments = [f"--container-image={cluster.container}", "--container-workdir=/"]
        arguments.append(f"--container-mounts={','.join(f'{folder}:{folder}' for folder in bound)}")
        return ContainerCommand(_PYTHON, (*arguments, *cluster.container_args))
    if runtime == "charliecloud":
        # GPU libraries are put into the image beforehand: ch-fromhost --nvidia IMAGE.
        words = [_WITH_USER, "ch-run", *(f"--bind={mount}" for mount in mounts)]
        image += " --"
    elif runtime == "podman":
        # Its processes stay in the cgroup of the job, whose limits hold and with which they are killed.
        words = [_WITH_USER, "podman", "run", "--rm", "--cgroups=disabled", "--network=host", "--ipc=host"]
        words += ["--env-host"]
        words += ['$([ "$(id -u)" = 0 ] || echo --userns=keep-id)']  # which Podman refuses to root
        words += ["--env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        words += ["--device=nvidia.com/gpu=all"] if gpus else []
        words += [f"--volume={mount}:{mount}" for mount in mounts]
    else:
        words = [runtime, "exec", *(["--nv"] if gpus else []), *(f"--bind {mount}" for mount in mounts)]
    return ContainerCommand(" ".join([*words, *map(shlex.quote, cluster.container_args), image, _PYTHON]))


def find_runtime(cluster: Cluster) -> str:
    """Return the container runtime: the configured one, or the first that this machine has.

    Raises:
        UserError: this machine has none.
    """
    if cluster.container_runtime != "auto":
        return cluster.container_runtime
    for runtime, program in _PROGRAMS.items():
        if shutil.which(program):
            return runtime
    if "--container-image" in slurm.run_command("srun", "--help").stdout:
        return "pyxis"
    raise UserError(
        f"cluster.container={cluster.container}: no container runtime is found here: set "
        "cluster.container_runtime=apptainer, and if the nodes need it cluster.setup=[module load apptainer]"
    )


def check_container(cluster: Cluster) -> None:
    """Check that the image exists, if it is a path, and that there is a runtime.

    Raises:
        UserError: names the setting to change.
    """
    if not cluster.container:
        return
    find_runtime(cluster)
    if cluster.container.startswith("/"):
        image = Path(cluster.container)
        if not image.exists():
            raise UserError(
                f"cluster.container={cluster.container}: no such file or folder; see docs/cluster.md"
            )
        # In a folder such as /tmp any user can have made it; elsewhere its owner is whom the user trusts.
        public = image.resolve().parent.stat().st_mode & (stat.S_ISVTX | stat.S_IWOTH) > stat.S_ISVTX
        if not public:
            check_own(image.parent, None, f"cluster.container={cluster.container}", named=True)
        check_own(image, None, f"cluster.container={cluster.container}", named=not public)


def bound_folders(config: Config) -> tuple[str, ...]:
    """Return the folders of the host that a job of this config uses."""
    paths = [config.workspace, config.datastore.url, config.dataset.source]
    if config.model.weights:
        paths.append(str(Path(config.model.weights).parent))
    if config.download.login:
        paths.append(str(Path(config.download.login).parent))
    return tuple(path for path in dict.fromkeys(paths) if path.startswith("/") and Path(path).exists())
