"""Train backbones on ImageNet, from the archives to a leaderboard, on a Slurm cluster or one machine.

Python API: `submit`, `jobs`, `open_datastore`, `evaluate`, `predict`, `export` …; see `hpc_imagenet.api`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
