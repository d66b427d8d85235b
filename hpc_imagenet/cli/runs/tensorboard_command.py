"""Command tensorboard: serve the learning curves of runs on this machine, and print the tunnel to them."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from hpc_imagenet.cli.command import RUN_NAMES, Command, say_left_out
from hpc_imagenet.cli.runs.run_selection import find_sweep
from hpc_imagenet.cluster import slurm
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.child_environment import environment_without_secrets
from hpc_imagenet.runs.store import Run, RunStore

_PORT = 6006  # TensorBoard's own


def _tensorboard(store: RunStore, options: argparse.Namespace) -> int:
    runs = _selected(store, options)
    curves = [run for run in runs if (run.folder / "tensorboard").is_dir()]
    if not curves:
        raise UserError(
            f"no learning curves in {store.folder}: a training with tracker=tensorboard writes them once it "
            "has run for some steps"
        )
    port = options.port or _free_port()
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-tensorboard-") as folder:
        for run in curves:  # links, so that TensorBoard does not walk through checkpoints
            (Path(folder) / run.id).symlink_to(run.folder / "tensorboard")
        print(f"{len(curves)} run{'s' * (len(curves) > 1)} · Ctrl-C ends it")
        if tunnel := _tunnel(port, curves[-1]):
            print(f"tunnel   {tunnel}")
        print(f"browser  http://127.0.0.1:{port}", flush=True)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "127.0.0.1"]
        try:
            done = subprocess.run(
                [*command, "--port", str(port)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=environment_without_secrets(),
                check=False,
            )
        except KeyboardInterrupt:
            return 0
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"TensorBoard could not start on port {port}: {last}; --port N takes another port")
    return 0


def _selected(store: RunStore, options: argparse.Namespace) -> list[Run]:
    runs = [store.find(name) for name in options.runs] if options.runs else store.readable()
    say_left_out(store)
    sweeps = {run: found if isinstance(found := run.info.get("sweeps"), list) else [] for run in runs}
    sweep = find_sweep((each for found in sweeps.values() for each in found), options.sweep)
    return runs if sweep is None else [run for run in runs if sweep in sweeps[run]]


def _tunnel(port: int, run: Run) -> str:
    """Return the ssh command that reaches the port from the user's own machine; empty on that machine."""
    user, host = getpass.getuser(), socket.gethostname()
    # The line is for the user's shell, so no value of another user's run belongs into it.
    login = run.frozen().get("cluster", {}).get("login") if run.is_mine else None
    forward = f"ssh -N -L {port}:127.0.0.1:{port}"
    if slurm.this_job():  # on a node, which is reached through the login node
        return f"{forward} -J {user}@{login or 'LOGIN-NODE'} {user}@{host}"
    return f"{forward} {user}@{login or host}" if login or "SSH_CONNECTION" in os.environ else ""


def _free_port() -> int:
    """Return TensorBoard's usual port, or any other if it is taken."""
    for port in (_PORT, 0):
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(server.getsockname()[1])
    raise UserError("no port is free")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", help="default: all runs of the workspace")
    parser.add_argument("--sweep", metavar="S", help="runs of a sweep: its name, or the beginning of it")
    parser.add_argument("--port", type=int, help=f"port on this machine; default: {_PORT}, or any free port")


COMMANDS = {
    "tensorboard": Command(
        "Serve the learning curves of runs on this machine, for a browser or a tunnel.",
        _tensorboard,
        _add_arguments,
        epilog=RUN_NAMES,
    )
}
