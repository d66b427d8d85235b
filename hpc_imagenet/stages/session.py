"""Session: Jupyter Lab on this node, until its time is over or nobody uses it.

What is made in it, and Lab's settings, lie in the run's folder and are there again when it is resumed.
Kernels and terminals are not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.datastore import catalog, versions
from hpc_imagenet.datastore.node_cache.cache import NodeCache
from hpc_imagenet.datastore.open_dataset import scratch_folder
from hpc_imagenet.errors import Preempted, UserError
from hpc_imagenet.launch import slurm
from hpc_imagenet.launch.dist_env import DistEnv, available_cpus
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.store import Progress, Run
from hpc_imagenet.session.connection import ConnectionInfo, notebook_folder
from hpc_imagenet.session.server import TOP, JupyterServer
from hpc_imagenet.session.watchdog import SPREADS, StopEvent, Watchdog

_IN_ORDER = 120.0  # s before Slurm's own end, so that the outcome can be written
_PACKAGE = Path(__file__).resolve().parent.parent


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Serve until the end, and return how it came: ended (in words), minutes.

    Raises:
        UserError: no Jupyter, no such datastore here, a port that is taken.
        Interrupted: a signal asked to stop.
    """
    if not dist_env.is_rank_zero:
        return {}
    asked, attempt, began = config.session, run.attempt, time.time()
    assert attempt is not None
    if not importlib.util.find_spec("jupyter_server") or not importlib.util.find_spec("jupyterlab"):
        raise UserError(
            f"{socket.gethostname()} has no Jupyter in {sys.prefix}: "
            "pip install -c constraints.txt -e '.[session]' in the checkout"
        )
    _enough_gpus(asked.gpus)
    folder = notebook_folder(run.folder)
    folder.mkdir(exist_ok=True)
    _examples(folder)
    environment = {
        "HPC_IMAGENET_WORKSPACE": config.workspace,
        "HPC_IMAGENET_CPUS": str(available_cpus(dist_env)),
    }
    environment |= _datastore(config, folder / "datastore", Progress(run))
    progress = Progress(run, every=5)
    ends = min(began + 60 * asked.time, (slurm.end_time() or float("inf")) - _IN_ORDER)
    way = _way(asked.listen)
    with StopEvent().listening() as signals:
        server = JupyterServer(run.folder, folder, way, asked.port, (ends - began) / 3600)
        try:
            try:
                server.start(environment)
            except UserError:
                if signals.wait(SPREADS):  # Jupyter has ended by the same signal
                    raise Preempted(f"stopped by {signals.name}; its folder stays") from None
                raise
            told = _note(server, folder, ends, config)
            told.save(attempt)
            print(f"serving {folder}; how to reach it: python -m hpc_imagenet connect {run.id}", flush=True)
            life = Watchdog(
                server,
                ends,
                asked.idle_minutes,
                lambda left, idle: progress(0, note=_state(told.host, left, idle)),
                lambda line: _warn(line, server),
            )
            return {"ended": life.watch(signals), "minutes": round((time.time() - began) / 60, 1)}
        finally:
            server.close()


def _way(listen: str) -> str:
    """Return where to listen: a tunnel reaches what is the node's own only where the node answers ssh."""
    job = slurm.this_job()
    if listen != "auto":
        return listen
    if job is None:
        return "loopback"
    if not _answers_ssh():
        return "address"
    # An array's task has an id of its own there.
    return "loopback" if private(os.environ.get("SLURM_JOB_ID", job)) else "socket"


def private(job: str, top: Path = TOP, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether Slurm gave a job a `top` of its own (job_container/tmpfs), whose files no login by ssh sees.

    What is mounted there is then a folder that is called by the job's id.
    """
    rows = [line.split() for line in mounts.read_text().splitlines()]
    roots = [row[3] for row in rows if row[4] == str(top)]
    return bool(roots) and re.search(rf"\b{job}\b", roots[-1]) is not None  # the last one covers the others


def _answers_ssh() -> bool:
    try:
        with socket.create_connection((socket.gethostname(), 22), timeout=3) as connection:
            connection.settimeout(3)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _note(server: JupyterServer, folder: Path, ends: float, config: Config) -> ConnectionInfo:
    return ConnectionInfo(
        host=socket.gethostname(),
        way=server.way,
        port=server.port,
        socket=server.socket,
        fingerprint=server.fingerprint,
        notebooks=str(folder),
        ends=ends,
        idle_minutes=config.session.idle_minutes,
        restarts=lease.restart_count(),
        job=os.environ.get("SLURM_JOB_ID"),
    )


def _state(host: str, left: float, idle: float) -> str:
    soon = "ends soon: " if left < 10 else ""
    quiet = f" · idle for {idle:.0f} min" if idle >= 1 else ""
    return f"{soon}{int(left) // 60}:{int(left) % 60:02} h left on {host}{quiet}"


def _warn(line: str, server: JupyterServer) -> None:
    print(line, flush=True)
    server.tell(line)


def _enough_gpus(wanted: int | None) -> None:
    # Slurm gives what was asked for, or nothing; this machine gives what it has.
    if wanted and slurm.this_job() is None:
        there = len([gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu])
        if there < wanted:
            raise UserError(f"session.gpus={wanted}, but {socket.gethostname()} gives {there}")


def _examples(folder: Path) -> None:
    """Put the notebook of the package into a session's folder; one that is there is its owner's."""
    for source in (_PACKAGE / "notebooks", _PACKAGE.parent / "notebooks"):
        for path in sorted(source.glob("*.ipynb")):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _datastore(config: Config, link: Path, progress: Progress) -> dict[str, str]:
    """Link the version that was asked for into the session's folder; return the variables that tell of it.

    What lies behind ssh or in a bucket is brought to the node's own disk first; jobs that are sent from the
    session run on other nodes, so they are told where it came from.

    Raises:
        UserError: it is not to be had from this node, or a file of the user's own has the link's name.
    """
    if link.is_symlink():  # of an earlier start
        link.unlink()
    if not config.session.datastore:
        return {}
    if link.exists():
        raise UserError(f"{link} is not a link of this session's making: give it another name")
    try:
        version = versions.open_version(config.datastore)
        folder, url = version.folder, version.backend.url
        if folder is None:
            folder = _brought(config, version, progress)
        if not os.access(folder / "manifest.json", os.R_OK):
            raise UserError(f"{folder} cannot be read")
    except UserError as error:
        raise UserError(
            f"{socket.gethostname()} has no datastore {config.session.datastore}: {error}"
        ) from None
    link.symlink_to(folder, target_is_directory=True)
    return {"HPC_IMAGENET_DATASTORE": str(link), "HPC_IMAGENET_DATASTORE_URL": url}


def _brought(config: Config, version: versions.Version, progress: Progress) -> Path:
    setting = cluster_for(config, "session").scratch
    if not setting:
        raise UserError(f"it lies at {version.backend.url}: cluster.scratch=FOLDER brings it to the node")
    entry = catalog.find_version(version.backend, f"{version.name}@v{version.number}")
    # Beside the copies that trainings make there, of which the cache throws away what it has no room for.
    target = NodeCache(scratch_folder(setting)).folder / ".datastores"
    target.mkdir(exist_ok=True)
    total = version.manifest.bytes

    def tell(done: int, _: str) -> None:
        progress(done, total, "B", f"bringing {entry.reference} to this node")

    return catalog.fetch_version(version.backend, entry, target, 4, tell)
