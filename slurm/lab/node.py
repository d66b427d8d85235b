"""A node of the lab: slurmd in its own namespaces for processes, mounts, network, name and IPC."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import kernel
from files import ADDRESS, Folder

_OWN = ("proc", "scratch")  # not shared with the machine, besides /dev/shm


def start_node(folder: Folder, name: str) -> tuple[int, Callable[[], None]]:
    """Start the init of a node; return its pid, and a function to call once its network is connected."""
    pid_reader, pid_writer = os.pipe()  # the pid, from the middle process
    plugged, plug = os.pipe()
    if os.fork() == 0:
        # A middle process, so that only its child enters the new pid namespace.
        try:
            flags = kernel.NEW_PID | kernel.NEW_NET | kernel.NEW_UTS | kernel.NEW_IPC | kernel.NEW_MOUNTS
            kernel.unshare(flags)
            pid = os.fork()
            if pid == 0:
                os.close(plug)
                _init(folder, name, plugged)
            os.write(pid_writer, str(pid).encode())
        finally:
            os._exit(0)
    os.close(pid_writer)
    os.close(plugged)
    with os.fdopen(pid_reader) as file:
        pid = int(file.read() or 0)
    if pid == 0:
        os.close(plug)
        raise OSError(f"{name} did not start: see log/lab.log")

    def connected() -> None:
        os.write(plug, b"!")
        os.close(plug)

    return pid, connected


def _init(folder: Folder, name: str, plugged: int) -> None:
    """Run as process 1 of the node, forever."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.setsid()
        log = os.open(folder / f"log/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, plugged)
        os.closerange(plugged + 1, 4096)
        socket.sethostname(name)
        _mount(folder, name)
        os.read(plugged, 1)
        os.close(plugged)
        setup = f"link set lo up\naddr add {ADDRESS[name]}/24 dev eth0\nlink set eth0 addrgenmode none\n"
        subprocess.run(["ip", "-batch", "-"], input=f"{setup}link set eth0 up\n", text=True, check=True)
        subprocess.Popen(
            ["slurmd", "-D"],
            stdin=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            preexec_fn=kernel.drop_capabilities,
        )
        while True:
            try:
                os.wait()  # reaps orphans as well
            except ChildProcessError:
                signal.pause()
    except BaseException as error:
        os.write(2, f"{name}: {error!r}\n".encode())
    finally:
        os._exit(1)


def _mount(folder: Folder, name: str) -> None:
    """Build the root of a node: the files of the machine, with its own /proc, /dev/shm and /scratch.

    It is a new root, since nothing may be created in the machine's.
    """
    root = folder / "root"
    kernel.mount("tmpfs", str(root))
    for entry in Path("/").iterdir():
        target = root / entry.name
        if entry.name in _OWN:
            continue
        if entry.is_symlink():
            target.symlink_to(entry.readlink())
        elif entry.is_dir():
            target.mkdir()
            kernel.bind(str(entry), str(target))
        else:
            target.touch()
            kernel.bind(str(entry), str(target))
    (root / "proc").mkdir()
    kernel.mount("proc", str(root / "proc"))
    kernel.mount("tmpfs", str(root / "dev/shm"))
    (root / "dev/shm").chmod(0o1777)
    (root / "scratch").mkdir()
    kernel.bind(str(folder.scratch(name)), str(root / "scratch"))
    kernel.enter_root(str(root))
