"""Processes that are forked from a server with torch imported, so that they start fast.

`CONTEXT.Process` calls a function in one. In `forking_environment` the processes of jobs are forked too,
whether a command, a worker or Slurm starts them. forked_start/sitecustomize.py is their side of it.
conftest.py calls `listen` and `stop`; without them, as in the soak, processes start in the ordinary way.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import fcntl
import gc
import io
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "hpc_imagenet.stages.work.download",
        "hpc_imagenet.stages.work.process",
        "hpc_imagenet.stages.work.train",
        "hpc_imagenet.launch.tasks.start_task",
        "hpc_imagenet.training.fit",
        "scipy.io",
        "torch._dynamo",  # imported at the first step of an optimizer
    ]
)

_HOOK = Path(__file__).parent / "forked_start"
_READ_AT_IMPORT = ("OMP_", "MKL_", "KMP_", "TORCH", "PYTHON", "LC_", "LD_", "MALLOC_")
_NAMESPACES = {  # those of a node of the lab, besides its processes
    "mnt": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "net": 0x40000000,
}
_NEW_PROCESSES = 0x20000000
_HIGH = 500  # files of a process have lower numbers
_resources = contextlib.ExitStack()  # of the server, in reverse order
_address = ""


def listen() -> None:
    """Let processes of jobs be forked from now on; the server starts when the first of them connects."""
    global _address
    _address = f"{_resources.enter_context(tempfile.TemporaryDirectory(prefix='fork-'))}/socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(_address)
    listener.listen(64)
    threading.Thread(target=_start_server, args=(listener,), daemon=True).start()


def stop() -> None:
    """End the server and remove its socket; xdist's processes run no exit handlers."""
    _resources.close()


def forking_environment() -> dict[str, str]:
    """Return the variables with which processes of jobs are forked; none before `listen`."""
    if not _address:
        return {}
    paths = [str(_HOOK), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"FORK_SERVER": _address, "PYTHONPATH": os.pathsep.join(paths)}


def _start_server(listener: socket.socket) -> None:
    select.select([listener], [], [])
    ours, theirs = CONTEXT.Pipe()
    server = CONTEXT.Process(target=_serve, args=(listener, theirs))
    server.start()
    theirs.close()
    listener.close()
    _resources.callback(server.join)
    _resources.callback(ours.close)  # which ends it


def _serve(listener: socket.socket, parent: Connection) -> None:
    """Fork a process for each connection, until the tests end."""
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for those that `_supervise`
    while parent not in select.select([listener, parent], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        try:
            _supervise(connection)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(1)


def _supervise(connection: socket.socket) -> None:
    """Fork the process of a job in the namespaces of its proxy, pass signals to it, reply with its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, messages, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(4 * 250), socket.MSG_WAITALL)
    files = array.array("i")
    for _, _, content in messages:
        files.frombytes(content)
    request = json.loads(connection.recv(struct.unpack("<I", length)[0], socket.MSG_WAITALL))
    proxy, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    # What the server was started with; its modules may have set more since.
    pairs = (line.partition("=") for line in Path("/proc/self/environ").read_text().split("\0"))
    started_with = {name: value for name, _, value in pairs}
    same_user = _is_shared("user", proxy)
    if not same_user or _import_variables(request["environment"]) != _import_variables(started_with):
        connection.send(b"n")
        return
    connection.send(b"y")
    imported = {name: value for name, value in os.environ.items() if name not in started_with}
    request["environment"] = imported | request["environment"]
    handle = os.pidfd_open(proxy)
    if not _is_shared("pid", proxy):
        _enter(handle, _NEW_PROCESSES)  # for the next fork
    others = sum(flag for name, flag in _NAMESPACES.items() if not _is_shared(name, proxy))
    if not (pid := os.fork()):
        connection.close()
        if others:
            _enter(handle, others)
        _run(request, files)
    for file in files:
        os.close(file)
    process = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([connection, process], [], [])
        if process in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(OSError):
                connection.send(struct.pack("<i", status))
            return
        for number in connection.recv(64) or [signal.SIGKILL]:  # nothing: the proxy was killed
            os.kill(pid, number)


def _is_shared(namespace: str, other: int) -> bool:
    first, second = (Path(f"/proc/{pid}/ns/{namespace}").readlink() for pid in ("self", other))
    return first == second


def _enter(process: int, namespaces: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(process, namespaces):
        raise OSError(ctypes.get_errno(), f"setns {namespaces:#x}")


def _import_variables(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that a library may have read when it was imported."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_IMPORT) and name != "PYTHONPATH"
    }


def _run(request: dict[str, Any], files: array.array[int]) -> None:
    """Take over the files, environment and arguments of the proxy; run its module, and exit."""
    import numpy

    status = 1
    try:
        os.setsid()
        high = [fcntl.fcntl(file, fcntl.F_DUPFD, _HIGH) for file in files]
        os.closerange(0, _HIGH)
        for file, target in zip(high, request["files"], strict=True):
            os.dup2(file, target)
        os.closerange(_HIGH, max(high) + 1)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        os.umask(request["umask"])
        os.sched_setaffinity(0, request["cpus"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(file, "wb", 0, closefd=False), write_through=True) for file in (1, 2)
        )
        sys.argv = ["", *request["arguments"]]
        numpy.random.seed()
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        os._exit(status)
