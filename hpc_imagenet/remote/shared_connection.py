"""One ssh connection to the host that all commands share, so that a login prompts once.

ssh keeps it open in the background (ControlMaster, ControlPersist in ssh_config(5)) for an hour after the
last command. A shared connection that ~/.ssh/config sets up is used instead. RSYNC_RSH names another ssh.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from hpc_imagenet.config.host import Host
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.ownership import foreign_writer, make_own_folder

CONNECTION_LOST = 255  # exit code of ssh(1) for its own errors
_ALIVE = "-o ConnectTimeout=60 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
_PERSIST = 3600  # s without a command until the connection is closed


def open_connection(host: Host) -> str:
    """Connect to the host unless a connection is open, with prompts of ssh on the terminal.

    Returns:
        The ssh command of the connection, as shell words.

    Raises:
        UserError: ssh or rsync is missing, or the host cannot be reached.
    """
    shell = os.environ.get("RSYNC_RSH") or f"ssh {_ALIVE}"
    for program in (shlex.split(shell)[0], "rsync"):
        if not shutil.which(program):
            raise UserError(f"cluster.host={host.address}: {program} is missing on this machine: install it")
    if not _is_shared(shell, host):
        options = f"-o ControlMaster=auto -o ControlPersist={_PERSIST}"
        shell = f"{shell} {options} -o ControlPath={shlex.quote(_control_path())}"
    command = shlex.split(shell)
    check = subprocess.run([*command, "-O", "check", host.address], capture_output=True, check=False)
    if check.returncode != 0:
        # Standard input stays the terminal's, for prompts; the start-up files of the host may print.
        done = subprocess.run([*command, host.address, "exit 0"], stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise UserError(
                f"cluster.host={host.address}: ssh cannot connect, for the reason above; jobs there go on. "
                f"Try ssh {host.address}"
            )
    return shell


def _is_shared(shell: str, host: Host) -> bool:
    """Whether the user's own configuration shares connections to the host."""
    shown = subprocess.run([*shlex.split(shell), "-G", host.address], capture_output=True, check=False)
    lines = shown.stdout.decode(errors="replace").lower().splitlines()
    paths = [line for line in lines if line.startswith("controlpath ")]
    return any(line != "controlpath none" for line in paths) and "controlmaster false" not in lines


def _control_path() -> str:
    # Private to the user, and short: the path of a Unix socket has at most 108 bytes.
    folder = os.environ.get("XDG_RUNTIME_DIR")
    if not folder or not Path(folder).is_dir() or foreign_writer(Path(folder)):
        folder = str(Path.home() / ".ssh")
        make_own_folder(Path(folder), private=True)
    return f"{folder}/hpc-%C"
