"""Train backbones on ImageNet, from the archives to a leaderboard, on a Slurm cluster or one machine.

Python API: `submit`, `jobs`, `open_datastore`, `evaluate`, `predict`, `export` …; see `hpc_imagenet.api`.
"""

import os
import sys


def _forget_current_folder() -> None:
    """Import nothing from the current folder if another user can write it; `python -m` searches it first.

    Only modules that Python has loaded before may be used here.
    """
    try:
        first, package = sys.path[:1], os.path.dirname(__path__[0])  # noqa: PTH120
        if sys.argv[:1] != ["-m"] or first != [os.getcwd()] or first == [package]:  # noqa: PTH109
            return
        status = os.stat(first[0])  # noqa: PTH116
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            del sys.path[0]
    except OSError:  # the folder was removed
        return


_forget_current_folder()

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from hpc_imagenet.api import (
        Handle,
        command,
        evaluate,
        export,
        jobs,
        open_datastore,
        predict,
        prototype,
        submit,
    )
    from hpc_imagenet.errors import UserError

    __version__: str

__all__ = [
    "Handle",
    "UserError",
    "command",
    "evaluate",
    "export",
    "jobs",
    "open_datastore",
    "predict",
    "prototype",
    "submit",
]


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that importing the package is cheap.
    if name in __all__:
        return getattr(import_module("hpc_imagenet.api"), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__} has no attribute {name}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hpc-imagenet")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0.0.0"
