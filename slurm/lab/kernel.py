"""Linux system calls that Python 3.10 lacks: namespaces, mounts, capabilities."""

from __future__ import annotations

import ctypes
import os

NEW_PID, NEW_NET, NEW_UTS, NEW_IPC, NEW_MOUNTS = 0x20000000, 0x40000000, 0x04000000, 0x08000000, 0x00020000
_BIND, _MOVE, _RECURSIVE = 4096, 8192, 16384
_AMBIENT, _CLEAR_ALL = 47, 4

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Move this process (for pids: its children) into new namespaces."""
    _checked(_libc.unshare(flags), "unshare")


def bind(source: str, target: str) -> None:
    """Bind-mount `source` with everything below it at `target`, in this mount namespace."""
    _checked(_libc.mount(source.encode(), target.encode(), None, _BIND | _RECURSIVE, None), target)


def mount(kind: str, target: str) -> None:
    """Mount a new file system, such as tmpfs or proc."""
    _checked(_libc.mount(kind.encode(), target.encode(), kind.encode(), 0, None), target)


def enter_root(root: str) -> None:
    """Make `root` the / of this mount namespace, as an initramfs does, without a visible chroot."""
    os.chdir(root)
    _checked(_libc.mount(b".", b"/", None, _MOVE, None), root)
    os.chroot(".")
    os.chdir("/")


def drop_capabilities() -> None:
    """Drop the ambient capabilities that `unshare --keep-caps` passes on to the next program."""
    _checked(_libc.prctl(_AMBIENT, _CLEAR_ALL, 0, 0, 0), "prctl")


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
