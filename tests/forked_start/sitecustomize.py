"""Let a job's process be forked from a server with torch imported, which saves 5 s of CPU time at its start.

In the environment of forked.py this folder is on the PYTHONPATH, and Python imports this module first. The
process becomes a proxy of the forked one: it passes on its environment, files and signals, and ends as that
one does.
"""

from __future__ import annotations

import os
import sys

MODULES = ("task", "start_task", "shared_task")  # of hpc_imagenet.launch.tasks


def start_forked(address: str) -> None:
    """Wait for the process that the server forks, and end like it; return if it forks none."""
    words = sys.orig_argv
    at = words.index("-m") if "-m" in words[:-1] else 0
    package, _, module = words[at + 1].rpartition(".") if at else ("", "", "")
    if words[1:at] != ["-u"] or package != "hpc_imagenet.launch.tasks" or module not in MODULES:
        return
    import array
    import json
    import signal
    import socket
    import struct

    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:  # another user's process, or the tests have ended
        return
    files = [file for file in range(250) if file != connection.fileno() and is_open(file)]
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
    umask = os.umask(0o077)
    os.umask(umask)
    request = {
        "module": f"{package}.{module}",
        "arguments": words[at + 2 :],
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109 (pathlib would be imported at each start)
        "umask": umask,
        "cpus": list(os.sched_getaffinity(0)),
        "files": files,
        "ignored": ignored,
    }
    content = json.dumps(request).encode()
    handles = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
    connection.sendmsg([struct.pack("<I", len(content))], handles)
    connection.sendall(content)
    if connection.recv(1) != b"y":
        return

    def forward(number: int, frame: object) -> None:
        connection.send(bytes([number]))

    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
        if (number := getattr(signal, name)) not in ignored:
            signal.signal(number, forward)
    for file in files:
        if file > 2:
            os.close(file)
    answer = connection.recv(4, socket.MSG_WAITALL)
    status = struct.unpack("<i", answer)[0] if len(answer) == 4 else -signal.SIGKILL
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def is_open(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


if server := os.environ.get("FORK_SERVER"):
    start_forked(server)
