"""How a session is reached: the tunnel, the address for the browser, VSCode, a shell."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import time
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.launch import slurm
from hpc_imagenet.launch.states import State, state
from hpc_imagenet.runs.store import RUNNING, Attempt, Run
from hpc_imagenet.session import credentials
from hpc_imagenet.session.connection import ConnectionInfo, end_warning, load_connection_info

_EVERY = 0.5  # s


def connect(run: Run) -> int:
    """Wait until a session runs and print how to reach it; what it waits for is told meanwhile.

    Returns:
        The exit code.

    Raises:
        UserError: it is no session, or has ended.
    """
    if run.info.get("stage") != "session":
        raise UserError(f"{run.id} is no session: +stage=session makes one, logs shows what others print")
    attempt, told = wait_until_running(run)
    ways = access_instructions(run, attempt, told)
    width = max(map(len, ways))
    print(f"{run.id} runs on {told.host}{_until(told)}{_again(told)}")
    for name, line in ways.items():
        print(f"  {name:{width}}  {line}", flush=True)
    return 0


def access_instructions(run: Run, attempt: Attempt, told: ConnectionInfo) -> dict[str, str]:
    """Return the ways to a session by their names: tunnel, browser, VSCode, shell.

    The address for the browser has the token in it; it is read from its file, which others cannot.
    """
    token, user, here = credentials.token(run.folder), getpass.getuser(), socket.gethostname()
    by_ssh = "SSH_CONNECTION" in os.environ  # the browser is elsewhere
    login = f"{user}@{run.cluster().login or here}"
    job = attempt.submitted.get("job_id") if attempt.submitted.get("executor") == "slurm" else None
    away = bool(job) or told.host != here  # on a node, or another workstation with the same files
    jump = f"-J {login} " if job or run.cluster().login or by_ssh else ""
    host = f"{jump}{user}@{told.host}" if away else login
    base = "https://localhost" if told.fingerprint else "http://127.0.0.1"
    ways: dict[str, str] = {}
    if told.way == "address":
        ways["tunnel"] = f"ssh -N -L {told.port}:{told.host}:{told.port} {login}"
    elif told.socket or away or by_ssh:
        end = told.socket or f"127.0.0.1:{told.port}"
        ways["tunnel"] = f"ssh -N -L {told.port}:{end} {host}"
    ways["browser"] = f"{base}:{told.port}/lab?token={token}"
    if told.fingerprint:
        ways["certificate"] = f"its own; the browser asks, and shows SHA-256 {told.fingerprint}"
    if told.way == "address":
        ways["VSCode"] = "Jupyter: Select Kernel, Existing Jupyter Server: the line for the browser"
    elif away:
        ways["VSCode"] = f"code --remote ssh-remote+{told.host} {told.notebooks}"
        if jump:
            ways["~/.ssh/config"] = (
                f"Host {told.host}, with ProxyJump {login} and User {user}: once, for VSCode"
            )
    else:
        ways["VSCode"] = f"code {told.notebooks}"
    if job:
        ways["shell"] = f"srun --overlap --jobid {told.job or job} --pty bash"
    if near := end_warning(told.ends):
        ways["mind"] = near
    return ways


def wait_until_running(run: Run) -> tuple[Attempt, ConnectionInfo]:
    """Wait until a session answers; what it waits for is told on stderr.

    Raises:
        UserError: it has ended.
    """
    said, began = "", time.monotonic()
    while True:
        was, attempt = state(run, began), run.attempt
        if not was.active:
            why = f": {was.reason}" if was.reason else ""
            raise UserError(f"{run.id} has ended ({was.name}{why}): resume {run.id} takes it up again")
        told = load_connection_info(attempt) if attempt and was.name == RUNNING else None
        # Slurm may have begun it again already, while what stands there is still of the start before.
        if attempt and told is not None and told.restarts >= was.restarts:
            return attempt, told
        words = _waits(was, run, began)
        if words != said:
            print(words, file=sys.stderr, flush=True)
            said = words
        time.sleep(_EVERY)


def _waits(was: State, run: Run, since: float) -> str:
    attempt = run.attempt
    submitted: dict[str, Any] = attempt.submitted if attempt else {}
    if attempt and was.name == RUNNING:
        far = run.progress
        if far.get("total") and far["time"] > attempt.started.get("time", ""):  # of this start
            return f"it has begun: {far['note']}, {10 * int(10 * far['done'] / far['total'])}%"
        return "it has begun, and Jupyter starts"
    words = f"{was.name}: {was.reason}" if was.reason else was.name
    on_slurm = submitted.get("executor") == "slurm"
    if on_slurm and (start := slurm.expected_start(str(submitted["job_id"]), since)):
        words += f"; Slurm expects it to start at {time.strftime('%Y-%m-%d %H:%M', time.localtime(start))}"
    return words


def _again(told: ConnectionInfo) -> str:
    if not told.restarts:
        return ""
    times = "once" if told.restarts == 1 else f"{told.restarts} times"
    return f"; Slurm has started it again {times}, and earlier addresses are void"


def _until(told: ConnectionInfo) -> str:
    left = max(0, int(told.ends - time.time()) // 60)
    idle = f", or after {told.idle_minutes:g} minutes without activity" if told.idle_minutes else ""
    clock = time.strftime("%H:%M", time.localtime(told.ends))
    return f" until {clock} ({left // 60}:{left % 60:02} h left){idle}"
