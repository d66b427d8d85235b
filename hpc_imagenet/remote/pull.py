"""Bring run folders from the host to this machine by rsync, resumable."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hpc_imagenet.config.host import Host
from hpc_imagenet.datastore.backends.ssh_connection import SshConnection
from hpc_imagenet.remote.host_command import output_on_host
from hpc_imagenet.remote.shared_connection import open_connection
from hpc_imagenet.runs.checkpoints import INITIAL

# What belongs to the running job, secrets, the checkpoint before the last one, and that of another run with
# which this one began.
_LEFT = ("lease.json", "token", "jupyter/", "previous.ckpt", f"/{INITIAL}", "*.pkl", "*.tmp", ".nfs*")


def pull_runs(host: Host, words: Sequence[str], target: Path, checkpoints: bool, as_json: bool) -> int:
    """Bring runs to `target`/runs and print their folders.

    What is there already and unchanged is not sent again; a file that was cut is continued.

    Args:
        host: where the runs are.
        words: names of the runs, and workspace= if it is typed.
        target: a folder that becomes a workspace, for report and jobs.
        checkpoints: whether to bring checkpoints.
        as_json: whether to print JSON objects instead of lines.

    Returns:
        The exit code.

    Raises:
        UserError: the host cannot be reached, or a transfer failed.
    """
    code, output = output_on_host(host, ["pull", *words])
    if code != 0:
        return code
    rows = json.loads(output.splitlines()[-1])  # start-up files of the host may print before
    shell = open_connection(host)
    left = [*_LEFT, *([] if checkpoints else ["checkpoints/"])]
    options = ["-zp", "--partial-dir=.partial", *(f"--exclude={name}" for name in left)]
    for row in rows:
        folder = target / "runs" / Path(row["run"]).name
        folder.mkdir(parents=True, exist_ok=True)
        connection = SshConnection(f"{host.address}:{row['folder']}", "cluster.host", shell)
        connection.rsync(
            f"bringing {row['run']}",
            [*options, f"{connection.rsync_path('')}", f"{folder}/"],
            _progress(row["run"]),
            changing=True,  # and a session's link to its datastore leads to all images
        )
        if sys.stderr.isatty():
            print("\x1b[K", end="", file=sys.stderr, flush=True)
        row["folder"] = str(folder)
        if not as_json:
            print(f"pulled  {row['run']}  {folder}", flush=True)
    if as_json:
        print(json.dumps(rows, indent=2))
    return 0


def _progress(run: str) -> Callable[[int], None]:
    """Return a callback that shows the MB of a transfer on a terminal."""

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            print(f"{run}  {done / 1e6:,.1f} MB\x1b[K", end="\r", file=sys.stderr, flush=True)

    return progress
