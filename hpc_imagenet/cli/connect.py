"""Print how to reach a session: ssh tunnel, browser URL, VSCode and shell commands."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import time
from typing import Any

from hpc_imagenet.cluster import slurm
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.states import state
from hpc_imagenet.launch.watched_runs import WatchedRuns
from hpc_imagenet.runs.attempt import RUNNING, Attempt
from hpc_imagenet.runs.store import Run
from hpc_imagenet.session.connection import ConnectionInfo, end_warning, load_connection_info, read_token

_POLL_INTERVAL = 0.5  # s


def connect(run: Run) -> int:
    """Wait until a session runs and print how to reach it; print the state to stderr meanwhile.

    Returns:
        The exit code.

    Raises:
        UserError: the run is not a session, or has ended.
    """
    if run.info.get("stage") != "session":
        raise UserError(
            f"{run.id} is not a session: +stage=session starts one; logs {run.id} shows this run's output"
        )
    attempt, info = wait_until_running(run)
    lines = access_instructions(run, attempt, info)
    width = max(map(len, lines))
    print(f"{run.id} runs on {info.host}{_until(info)}{_restarted(info)}")
    for name, line in lines.items():
        print(f"  {name:{width}}  {line}", flush=True)
    return 0


def access_instructions(run: Run, attempt: Attempt, info: ConnectionInfo) -> dict[str, str]:
    """Return commands and URLs to reach a session by their names: tunnel, browser, VSCode, shell.

    The browser URL contains the token, which is read from a file that other users cannot read.
    """
    token, user, local_host = read_token(run.folder), getpass.getuser(), socket.gethostname()
    over_ssh = "SSH_CONNECTION" in os.environ  # the browser runs on another machine
    cluster = run.cluster()
    login = cluster.host or f"{user}@{cluster.login or local_host}"
    job = attempt.submitted.get("job_id") if attempt.submitted.get("executor") == "slurm" else None
    elsewhere = bool(job) or info.host != local_host  # on a node, or a workstation with a shared file system
    jump = f"-J {login} " if job or cluster.login or over_ssh else ""
    host = f"{jump}{user}@{info.host}" if elsewhere else login
    base = "https://localhost" if info.fingerprint else "http://127.0.0.1"
    lines: dict[str, str] = {}
    if info.way == "address":
        lines["tunnel"] = f"ssh -N -L {info.port}:{info.host}:{info.port} {login}"
    elif info.socket or elsewhere or over_ssh:
        remote_end = info.socket or f"127.0.0.1:{info.port}"
        lines["tunnel"] = f"ssh -N -L {info.port}:{remote_end} {host}"
    lines["browser"] = f"{base}:{info.port}/lab?token={token}"
    if info.fingerprint:
        lines["certificate"] = (
            f"self-signed: accept it in the browser if its SHA-256 fingerprint is {info.fingerprint}"
        )
    if info.way == "address":
        lines["VSCode"] = "Jupyter: Select Kernel, Existing Jupyter Server: the browser URL above"
    elif elsewhere:
        lines["VSCode"] = f"code --remote ssh-remote+{info.host} {info.notebooks}"
        if jump:
            lines["~/.ssh/config"] = (
                f"Host {info.host}, with ProxyJump {login} and User {user}: once, for VSCode"
            )
    else:
        lines["VSCode"] = f"code {info.notebooks}"
    if job:
        lines["shell"] = f"srun --overlap --jobid {info.job or job} --pty bash"
    if warning := end_warning(info.ends):
        lines["warning"] = warning
    return lines


def wait_until_running(run: Run) -> tuple[Attempt, ConnectionInfo]:
    """Wait until a session's server responds; print each change of its state to stderr.

    Raises:
        UserError: the session has ended.
    """
    printed, begin, watched = "", time.monotonic(), WatchedRuns()
    while True:
        watched.keep_going([run])
        current, attempt = state(run, begin), run.attempt
        if current.waiting:
            raise UserError(
                f"{run.id} is not submitted yet ({current.reason}): when another job has ended, "
                f"python -m hpc_imagenet resume {run.id}"
            )
        if current.ended:
            reason = f": {current.reason}" if current.reason else ""
            raise UserError(
                f"{run.id} has ended ({current.name}{reason}): "
                f"restart it with python -m hpc_imagenet resume {run.id}"
            )
        info = load_connection_info(attempt) if attempt and current.name == RUNNING else None
        # Slurm may have restarted the job while the file still describes the previous start.
        if attempt and info is not None and info.restarts >= current.restarts:
            return attempt, info
        status = _status(current, run, begin)
        if status != printed:
            print(status, file=sys.stderr, flush=True)
            printed = status
        time.sleep(_POLL_INTERVAL)


def _status(current: State, run: Run, since: float) -> str:
    attempt = run.attempt
    submitted: dict[str, Any] = attempt.submitted if attempt else {}
    if attempt and current.name == RUNNING:
        progress = run.progress
        if progress.get("total") and progress["time"] > attempt.started.get("time", ""):  # of this start
            percent = 10 * int(10 * progress["done"] / progress["total"])
            return f"running: {progress['note']}, {percent}%"
        return "running: Jupyter is starting"
    status = f"{current.name}: {current.reason}" if current.reason else current.name
    on_slurm = submitted.get("executor") == "slurm"
    if on_slurm and (start := slurm.expected_start(str(submitted["job_id"]), since)):
        status += f"; Slurm expects it to start at {time.strftime('%Y-%m-%d %H:%M', time.localtime(start))}"
    return status


def _restarted(info: ConnectionInfo) -> str:
    if not info.restarts:
        return ""
    times = "once" if info.restarts == 1 else f"{info.restarts} times"
    return f"; Slurm has restarted it {times}, and earlier URLs are no longer valid"


def _until(info: ConnectionInfo) -> str:
    left = max(0, int(info.ends - time.time()) // 60)
    idle = f", or after {info.idle_minutes:g} minutes without activity" if info.idle_minutes else ""
    clock = time.strftime("%H:%M", time.localtime(info.ends))
    return f" until {clock} ({left // 60}:{left % 60:02} h left){idle}"
