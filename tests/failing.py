"""Ways in which a job fails: functions for dataset.make, which the download stage calls."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path


def bug(folder: Path) -> None:
    raise RuntimeError("\x1b[2Jan unexpected value \x07 of <b>4</b>")


def memory(folder: Path) -> None:
    bytearray(1 << 60)


def full(folder: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def missing(folder: Path) -> None:
    (folder / "labels.csv").read_bytes()


def module(folder: Path) -> None:
    import a_module_that_is_not_installed  # type: ignore[import-not-found] # noqa: F401


def killed(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def wait(folder: Path) -> None:
    time.sleep(3600)


def one_of_two(folder: Path) -> None:
    """Write the digits, unless the folder is named `broken`."""
    from hpc_imagenet.demo.digits import write_digits

    if folder.name == "broken":
        raise RuntimeError("as intended")
    write_digits(folder)
