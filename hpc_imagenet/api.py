"""Python API: the same functions as the command line, with handles on runs.

    import hpc_imagenet
    (run,) = hpc_imagenet.submit("dataset=digits model=resnet18")
    run.state(), run.result()["top1"]

The names in `__all__` can be imported from `hpc_imagenet`, which loads this module on first use.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_imagenet.config.stored_settings import stored_value
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import Run, RunStore

__all__ = ["Handle", "UserError", "command", "jobs", "submit"]

_POLL_INTERVAL = 0.5  # s


class Handle:
    """A run and its newest attempt. Two handles of the same run are equal.

    Attributes:
        id: the run's id, such as `c0ffee00-resnet18`.
        folder: the run's folder, with its frozen config, logs, metrics and checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self._run = Run(folder)
        self._since = time.monotonic()
        self.id = self._run.id
        self.folder = folder

    def __repr__(self) -> str:
        return f"<{self.id}: {self.state()}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other.folder == self.folder

    def __hash__(self) -> int:
        return hash(self.folder)

    def state(self) -> str:
        """Return queued, running, finished, failed or cancelled.

        Slurm's reply is cached, for longer the older the handle is (at most 15 s); the end of a run is
        visible immediately.
        """
        from hpc_imagenet.launch.states import state

        return state(self._run, self._since).name

    def reason(self) -> str:
        """Return the reason for the state in one line, such as a Slurm reason or an error; may be empty."""
        from hpc_imagenet.launch.states import state

        return state(self._run, self._since).reason

    def progress(self) -> dict[str, Any]:
        """Return the progress: done, total, unit, rate (per second), note, time; empty at first."""
        return self._run.progress

    def result(self, seconds: float | None = None) -> dict[str, Any]:
        """Wait for the end of the run and return its result, such as top1 and top5 (0 to 1) of a training.

        Args:
            seconds: timeout in s; None: no timeout.

        Raises:
            UserError: the run failed or was cancelled; contains the reason.
            TimeoutError: the run has not ended in time; it keeps running.
        """
        from hpc_imagenet.launch.states import state

        began = time.monotonic()
        end = None if seconds is None else began + seconds
        while (current := state(self._run, began)).active:
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"{self.id} is {current.name} after {seconds:g} s")
            time.sleep(_POLL_INTERVAL)
        if not current.finished:
            raise UserError(f"{self.id} {current.name}: {current.reason}")
        attempt = self._run.attempt
        outcome = attempt.outcome if attempt else None
        return (outcome.result if outcome else None) or {}

    def logs(self) -> str:
        """Return the output of the newest attempt so far, stdout before stderr."""
        attempt = self._run.attempt
        return "".join(log.read_text(errors="replace") for log in attempt.logs()) if attempt else ""

    def cancel(self) -> None:
        """Stop the run if it is queued or running.

        Raises:
            UserError: it is a Slurm job, and Slurm cannot be reached from this machine.
        """
        from hpc_imagenet.launch.submission import cancel_run

        cancel_run(self._run)

    def retry(self) -> None:
        """Continue the run from where it stopped, and the failed or cancelled runs that it needs.

        Raises:
            UserError: the run was not submitted to a queue, or Slurm refused it.
        """
        from hpc_imagenet.launch.submission import retry_run

        retry_run(RunStore(self.folder.parents[1]), self._run)


def submit(overrides: str | Sequence[str], config_dir: str | None = None) -> list[Handle]:
    """Submit jobs as the command line does, and return at once; commas in overrides make a sweep.

    Args:
        overrides: settings, such as `"+stage=pipeline dataset=digits"`, or a list of them.
        config_dir: a folder with config groups in addition to conf/.

    Returns:
        A handle per job, each before those that need it, including runs that were finished or running
        already. With `cluster=foreground` or `wait=true` the runs have ended (sessions are running). With
        `dry_run=true` the list is empty and the jobs are printed.

    Raises:
        UserError: invalid input; nothing was submitted.
    """
    from hpc_imagenet.cli.connect import wait_until_running
    from hpc_imagenet.cli.submit import prepare
    from hpc_imagenet.config.compose import compose

    overrides = shlex.split(overrides) if isinstance(overrides, str) else overrides
    prepared = prepare(compose(overrides, multirun=True, config_dir=config_dir))
    if prepared.first.dry_run:
        from hpc_imagenet.report.dry_run import print_dry_run

        print_dry_run(prepared.jobs, prepared.store, prepared.executor, prepared.state_of)
        return []
    runs = [entry.run for entry in prepared.submit()]
    handles = [Handle(run.folder) for run in runs]
    if prepared.first.wait:
        for run, handle in zip(runs, handles, strict=True):
            with contextlib.suppress(UserError):  # a failure is visible in the state
                if run.info.get("stage") == "session" and prepared.in_background:
                    wait_until_running(run)
                else:
                    handle.result()
    return handles


def jobs(name: str | None = None, workspace: str | Path | None = None) -> list[Handle]:
    """Return the runs of a workspace, oldest first.

    Args:
        name: id or label of one run, or a prefix of one; None: all runs.
        workspace: folder of the workspace; None: the stored one (HPC_IMAGENET_WORKSPACE), else ./workspace.

    Raises:
        UserError: no run, or more than one, has that name.
    """
    folder = Path(workspace or stored_value("workspace") or "workspace").expanduser().absolute()
    store = RunStore(folder)
    runs = store.all() if name is None else [store.find(name)]
    return [Handle(run.folder) for run in runs]


def command(name: str, *arguments: str) -> Any:
    """Run a command of the command line, such as `command("report", "--json")`.

    Args:
        name: the command.
        arguments: its arguments, one string each.

    Returns:
        With `--json` the parsed objects, else the printed text.

    Raises:
        UserError: the command failed or, such as `verify`, found an error; its `printed` holds the output.
    """
    from hpc_imagenet.cli.commands import COMMANDS, run_command_line
    from hpc_imagenet.errors import did_you_mean

    if name not in COMMANDS:
        raise UserError(f"{name} is an unknown command{did_you_mean(name, COMMANDS)}")
    out, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out):
            code = run_command_line(name, arguments)
    except SystemExit as end:  # --help
        code = int(end.code or 0)
    except UserError as error:
        error.printed = out.getvalue()
        raise
    printed = out.getvalue()
    if "--json" in arguments:
        return json.loads(printed)
    if code:
        failure = UserError(f"{name}: {(printed.strip().splitlines() or ['it failed'])[-1].strip()}")
        failure.printed = printed
        raise failure
    return printed
