"""Session stage: Jupyter Lab on this node until its time limit, its idle limit or a shutdown.

Notebooks and Lab's settings are stored in the run folder and are kept when the session is resumed. Kernels
and terminals are not kept.
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

from filelock import FileLock

from hpc_imagenet.cluster import gpus, slurm
from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.datastore import catalog, versions
from hpc_imagenet.datastore.backends.storage_backend import explain_os_errors
from hpc_imagenet.datastore.node_cache.cache import NodeCache
from hpc_imagenet.errors import Preempted, UserError
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.job import signature
from hpc_imagenet.runs.store import Progress, Run
from hpc_imagenet.session import watchdog
from hpc_imagenet.session.connection import ConnectionInfo
from hpc_imagenet.session.server import TOP, JupyterServer

_SHUTDOWN_TIME = 120.0  # s before Slurm's time limit, so that the outcome can be written
_PACKAGE = Path(__file__).resolve().parents[2]


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Serve Jupyter until the end of the session.

    Returns:
        `ended`: the reason for the end, as text; `minutes`: the duration.

    Raises:
        UserError: Jupyter is not installed, the datastore cannot be used on this node, or the port is in use.
        Preempted: a signal requested a stop.
    """
    if not dist_env.is_rank_zero:
        return {}
    settings, attempt, begin = config.session, run.attempt, time.time()
    assert attempt is not None
    if not importlib.util.find_spec("jupyter_server") or not importlib.util.find_spec("jupyterlab"):
        raise UserError(
            f"{socket.gethostname()} has no Jupyter in {sys.prefix}: "
            "pip install -c constraints.txt -e '.[session]' in the checkout"
        )
    if settings.gpus is not None:
        _check_gpus(settings.gpus)
    folder = run.folder / "notebooks"  # kept between the starts of a session
    folder.mkdir(exist_ok=True)
    _copy_notebooks(folder)
    environment = {
        "HPC_IMAGENET_WORKSPACE": config.workspace,
        "HPC_IMAGENET_CPUS": str(available_cpus(dist_env)),
    }
    environment |= _link_datastore(config, folder / "datastore", Progress(run))
    progress = Progress(run, every=5)
    ends = min(begin + 60 * settings.time, (slurm.end_time() or float("inf")) - _SHUTDOWN_TIME)
    listen = _resolve_listen(settings.listen)
    with StopSignal() as stop:
        server = JupyterServer(run.folder, folder, listen, settings.port, (ends - begin) / 3600)
        try:
            try:
                server.start(environment)
            except UserError:
                if received := stop.wait(watchdog.SIGNAL_DELAY):  # the same signal has ended Jupyter
                    raise Preempted(f"stopped by {received.name}; its notebooks are kept") from None
                raise
            info = _connection_info(server, folder, ends, config)
            info.save(attempt)
            print(f"serving {folder}; connect with: python -m hpc_imagenet connect {run.id}", flush=True)
            reason = watchdog.watch(
                server,
                stop,
                ends,
                settings.idle_minutes,
                progress=lambda left, idle: progress(0, note=_status(info.host, left, idle)),
                warn=lambda line: _warn(line, server),
            )
            return {"ended": reason, "minutes": round((time.time() - begin) / 60, 1)}
        finally:
            server.close()


def _resolve_listen(listen: str) -> str:
    """Return where to listen (loopback, socket or address) for a `session.listen` setting.

    A tunnel reaches a loopback port or a Unix socket only if the node accepts ssh connections.
    """
    job = slurm.this_job()
    if listen != "auto":
        return listen
    if job is None:
        return "loopback"
    if not _accepts_ssh():
        return "address"
    # The mount has the job id of the array task, which differs from the array's.
    return "loopback" if has_private_tmp(os.environ.get("SLURM_JOB_ID", job)) else "socket"


def has_private_tmp(job: str, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether Slurm mounted a private /tmp for a job (job_container/tmpfs), which an ssh login cannot see.

    The root of such a mount is a folder named after the job id.
    """
    rows = [line.split() for line in mounts.read_text().splitlines()]
    roots = [row[3] for row in rows if row[4] == str(TOP)]
    return bool(roots) and re.search(rf"\b{job}\b", roots[-1]) is not None  # the last mount hides the others


def _accepts_ssh() -> bool:
    try:
        with socket.create_connection((socket.gethostname(), 22), timeout=3) as connection:
            connection.settimeout(3)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _connection_info(server: JupyterServer, folder: Path, ends: float, config: Config) -> ConnectionInfo:
    return ConnectionInfo(
        host=socket.gethostname(),
        way=server.listen,
        port=server.port,
        socket=server.socket,
        fingerprint=server.fingerprint,
        notebooks=str(folder),
        ends=ends,
        idle_minutes=config.session.idle_minutes,
        restarts=lease.restart_count(),
        job=os.environ.get("SLURM_JOB_ID"),
    )


def _status(host: str, left: float, idle: float) -> str:
    prefix = "ends soon: " if left < 10 else ""
    suffix = f" · idle for {idle:.0f} min" if idle >= 1 else ""
    return f"{prefix}{int(left) // 60}:{int(left) % 60:02} h left on {host}{suffix}"


def _warn(line: str, server: JupyterServer) -> None:
    print(line, flush=True)
    server.write_to_terminals(line)


def _check_gpus(required: int) -> None:
    # Slurm allocates the requested GPUs or does not start the job; this machine may have fewer.
    if required and slurm.this_job() is None:
        available = len(gpus.available_gpus())
        if available < required:
            raise UserError(
                f"session.gpus={required}, but {socket.gethostname()} has {available} available: "
                "use fewer, or a Slurm cluster"
            )


def _copy_notebooks(folder: Path) -> None:
    """Copy the package's example notebooks to a session's folder; keep files that exist."""
    for source in (_PACKAGE / "notebooks", _PACKAGE.parent / "notebooks"):
        for path in sorted(source.glob("*.ipynb")):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _link_datastore(config: Config, link: Path, progress: Progress) -> dict[str, str]:
    """Link the version of `session.datastore` into the session's folder.

    A version on an ssh host or in a bucket is first fetched to the node's own disk. Jobs submitted from the
    session run on other nodes, so they get the URL of the original.

    Returns:
        Environment variables for the session: path of the link, URL of the storage backend.

    Raises:
        UserError: the version cannot be used on this node, or the link's name is taken by a user's file.
    """
    if link.is_symlink():  # from an earlier start
        link.unlink()
    if not config.session.datastore:
        return {}
    if link.exists():
        raise UserError(f"{link} exists and was not created by this session: rename it")
    try:
        version = versions.open_version(config.datastore)
        folder, url = version.folder, version.backend.url
        if folder is None:
            folder = _fetch_to_node(config, version, progress)
        if not os.access(folder / "manifest.json", os.R_OK):
            raise UserError(f"{folder / 'manifest.json'} is not readable: check its permissions")
    except UserError as error:
        raise UserError(
            f"{socket.gethostname()} cannot use datastore {config.session.datastore}: {error}"
        ) from None
    link.symlink_to(folder, target_is_directory=True)
    return {"HPC_IMAGENET_DATASTORE": str(link), "HPC_IMAGENET_DATASTORE_URL": url}


def _fetch_to_node(config: Config, version: versions.Version, progress: Progress) -> Path:
    setting = cluster_for(config, "session").scratch
    if not setting:
        raise UserError(
            f"it is stored at {version.backend.url}: set cluster.scratch=FOLDER to fetch it to the node"
        )
    entry = catalog.find_version(version.backend, f"{version.name}@v{version.number}")
    # Next to the node cache, which would evict the files when it needs space. Each backend counts its own
    # versions, so that v1 of another one may have other images.
    copies = NodeCache(setting).folder / ".datastores"
    target = copies / signature(version.backend.url, version.manifest.content)
    copy = target / entry.path
    with explain_os_errors("cluster.scratch", copies):
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(copies / ".deleted.lock"):  # else two sessions could remove what one begins to fetch
            if (copy / versions.DELETED).exists():  # the user has deleted this copy: fetch it again
                if len(list(copy.iterdir())) > 1:
                    raise UserError(
                        f"{copy} is being deleted, or was in part: start the session again after that, or "
                        f"after rm -r {copy}"
                    )
                shutil.rmtree(copy)
    total = version.manifest.bytes

    def report(done: int, _: str) -> None:
        progress(done, total, "B", f"fetching {entry.reference} to this node")

    return catalog.fetch_version(version.backend, entry, target, 4, report, check=False)
