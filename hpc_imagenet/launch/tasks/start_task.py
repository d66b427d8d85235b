"""What submitit starts on a node: read the task of this job and call it.

submitit's own start unpickles whatever is in the job's folder. Here the pickle is only data: it is read from
a folder and a file that no other user may write, and can name no other function than those in `_NAMES`.

    python -m hpc_imagenet.launch.tasks.start_task FOLDER
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import shlex
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from hpc_imagenet.cluster import slurm
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.ownership import read_own, set_job_umask

_WAIT = 60.0  # s: submitit writes the pickle after sbatch has replied, and a file system may show it late
_NAMES = {  # module and name of all that a pickle may contain, besides plain values
    ("hpc_imagenet.launch.tasks.task", "Task"),
    ("hpc_imagenet.launch.tasks.shared_task", "SharedTask"),
    ("hpc_imagenet.doctor.probe", "run_probe"),
}


class _Submission:
    """The attributes of submitit's DelayedSubmission, without its code."""

    function: Any


class _TaskUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("submitit.core.utils", "DelayedSubmission"):
            return _Submission
        if (module, name) == ("functools", "partial"):
            return functools.partial
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return getattr(import_module(module), name)


def start_command(python: str, folder: Path) -> str:
    """Return the shell words that start a task of a job. `python`: shell words too."""
    return f"{python} -u -m hpc_imagenet.launch.tasks.start_task {shlex.quote(str(folder))}"


def read_task(folder: Path) -> Any:
    """Return the callable of this job from the pickle in submitit's folder of the job.

    Raises:
        UserError: another user could have written it, it names another function, or it is missing.
    """
    job = os.environ.get("SUBMITIT_LOCAL_JOB_ID") or slurm.this_job()
    path = folder / f"{job}_submitted.pkl"
    begin = time.monotonic()
    while not path.exists() and time.monotonic() - begin < _WAIT:
        time.sleep(0.2)
    try:
        content = read_own(path, folder, "the job is not started")
        return _TaskUnpickler(io.BytesIO(content)).load().function
    except FileNotFoundError:
        raise UserError(f"{path} is missing: retry the run") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path} is not the task of a job ({error}): retry the run") from None


def main() -> None:
    """Call the task of this job; its folder is on the command line."""
    set_job_umask(shares=False)
    try:
        task = read_task(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    task()


if __name__ == "__main__":
    main()
