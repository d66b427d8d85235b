"""One node: namespaces of its own for processes, mounts, network, name and shared memory; slurmd in them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import kernel
from files import ADDRESS, Folder

_OWN = ("proc", "scratch")  # what a node does not share with the machine, beside /dev/shm


def start_node(folder: Folder, name: str) -> tuple[int, Callable[[], None]]:
    """Start a node's init; return its pid, and what to call once its cable is plugged in."""
    told, tell = os.pipe()  # the pid, from the middle process
    plugged, plug = os.pipe()
    if os.fork() == 0:
        # A middle process, so that the new pid namespace is for its child alone.
        try:
            flags = kernel.NEW_PID | kernel.NEW_NET | kernel.NEW_UTS | kernel.NEW_IPC | kernel.NEW_MOUNTS
            kernel.unshare(flags)
            pid = os.fork()
            if pid == 0:
                os.close(plug)
                _init(folder, name, plugged)
            os.write(tell, str(pid).encode())
        finally:
            os._exit(0)
    os.close(tell)
    os.close(plugged)
    with os.fdopen(told) as file:
        pid = int(file.read() or 0)
    if pid == 0:
        os.close(plug)
        raise OSError(f"{name} did not start: see log/lab.log")

    def connected() -> None:
        os.write(plug, b"!")
        os.close(plug)

    return pid, connected


def _init(folder: Folder, name: str, plugged: int) -> None:
    """Be process 1 of the node for ever."""
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
                os.wait()  # also for what lost its parent
            except ChildProcessError:
                signal.pause()
    except BaseException as error:
        os.write(2, f"{name}: {error!r}\n".encode())
    finally:
        os._exit(1)


def _mount(folder: Folder, name: str) -> None:
    """Make the node's /: everything of the machine, and a /proc, /dev/shm and /scratch of its own.

    A new root is built for it, since nothing may be made in the machine's.
    """
    root = folder / "root"
    kernel.mount("tmpfs", str(root))
    for entry in Path("/").iterdir():
        place = root / entry.name
        if entry.name in _OWN:
            continue
        if entry.is_symlink():
            place.symlink_to(entry.readlink())
        elif entry.is_dir():
            place.mkdir()
            kernel.bind(str(entry), str(place))
        else:
            place.touch()
            kernel.bind(str(entry), str(place))
    (root / "proc").mkdir()
    kernel.mount("proc", str(root / "proc"))
    kernel.mount("tmpfs", str(root / "dev/shm"))
    (root / "dev/shm").chmod(0o1777)
    (root / "scratch").mkdir()
    kernel.bind(str(folder.scratch(name)), str(root / "scratch"))
    kernel.enter_root(str(root))
