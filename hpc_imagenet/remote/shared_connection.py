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
    shell = " ".join([shell, *_sharing_options(shell, host)])
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


def _sharing_options(shell: str, host: Host) -> list[str]:
    """Return the options that the user's own configuration lacks to share a connection to the host."""
    shown = subprocess.run([*shlex.split(shell), "-G", host.address], capture_output=True, check=False)
    lines = shown.stdout.decode(errors="replace").lower().splitlines()
    paths = [line for line in lines if line.startswith("controlpath ")]
    options = []
    if "controlmaster false" in lines or all(line == "controlpath none" for line in paths):
        options = ["-o ControlMaster=auto", f"-o ControlPath={shlex.quote(_control_path())}"]
    if options or "controlpersist no" in lines:  # without it the connection ends with the login
        options.append(f"-o ControlPersist={_PERSIST}")
    return options


def _control_path() -> str:
    # Private to the user, and short: the path of a Unix socket has at most 108 bytes.
    folder = os.environ.get("XDG_RUNTIME_DIR")
    if not folder or not Path(folder).is_dir() or foreign_writer(Path(folder)):
        folder = str(Path.home() / ".ssh")
        make_own_folder(Path(folder), private=True)
    return f"{folder}/hpc-%C"
