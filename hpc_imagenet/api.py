"""The package from Python: what the command line does, with handles on the runs instead of their names.

    import hpc_imagenet
    (run,) = hpc_imagenet.submit("dataset=digits model=resnet18")
    run.state(), run.result()["top1"]

`hpc_imagenet` itself has the five names of this module, and imports none of it before one is asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import Run, RunStore

__all__ = ["Handle", "UserError", "command", "jobs", "submit"]

_EVERY = 0.5  # s


class Handle:
    """One run: a thing to be made, in its newest attempt. Two handles of the same run are equal.

    Attributes:
        id: of the run, such as `c0ffee00-resnet18`.
        folder: its record: frozen config, logs, metrics, checkpoints.
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

        A handle that is asked for long asks Slurm less and less often, every 15 s in the end; how a run has
        ended is known at once.
        """
        from hpc_imagenet.launch.states import state

        return state(self._run, self._since).name

    def reason(self) -> str:
        """Return in one line why it is in that state: what it waits for, why it failed; else nothing."""
        from hpc_imagenet.launch.states import state

        return state(self._run, self._since).reason

    def progress(self) -> dict[str, Any]:
        """Return how far it is: done, total, unit, rate (a second), note, time; empty at first."""
        return self._run.progress

    def result(self, seconds: float | None = None) -> dict[str, Any]:
        """Wait until it has ended and return what came out: of a training top1 and top5 (0 to 1) and more.

        Args:
            seconds: to wait at most; None: as long as it takes.

        Raises:
            UserError: it failed or was cancelled, and why.
            TimeoutError: it has not ended by then; it goes on.
        """
        from hpc_imagenet.launch.states import state

        began = time.monotonic()
        end = None if seconds is None else began + seconds
        while (was := state(self._run, began)).active:
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"{self.id} is {was.name} after {seconds:g} s")
            time.sleep(_EVERY)
        if not was.finished:
            raise UserError(f"{self.id} {was.name}: {was.reason}")
        attempt = self._run.attempt
        outcome = attempt.outcome if attempt else None
        return (outcome.result if outcome else None) or {}

    def logs(self) -> str:
        """Return what its newest attempt has printed so far, stdout before stderr."""
        attempt = self._run.attempt
        return "".join(log.read_text(errors="replace") for log in attempt.logs()) if attempt else ""

    def cancel(self) -> None:
        """Stop it, queued or running; one that has ended stays as it is.

        Raises:
            UserError: it is a Slurm job, and Slurm cannot be asked from here.
        """
        from hpc_imagenet.launch.submission import cancel_run

        cancel_run(self._run)

    def retry(self) -> None:
        """Take it up again from where it stopped, with the runs it needs that did not end well.

        Raises:
            UserError: it was no job of a queue, or Slurm refused it.
        """
        from hpc_imagenet.launch.submission import retry_run

        retry_run(RunStore(self.folder.parents[1]), self._run)


def submit(overrides: str | Sequence[str], config_dir: str | None = None) -> list[Handle]:
    """Submit what overrides ask for, as the command line does; commas sweep. Returns at once.

    Args:
        overrides: such as `"+stage=pipeline dataset=digits"`, or a list of them.
        config_dir: a folder of your own conf/ beside ours.

    Returns:
        One run a job, each before those that need it: new ones, those that go on, and those that were
        finished or already running. With `cluster=foreground` they have ended by then, and with `wait=true`;
        sessions then run. With `dry_run=true` there are none: what would be submitted is printed.

    Raises:
        UserError: one line that says what is wrong; nothing was submitted.
    """
    from hpc_imagenet.cli.submit import prepare
    from hpc_imagenet.config.compose import compose
    from hpc_imagenet.session.connect import wait_until_running

    words = shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
    wanted = prepare(compose(words, multirun=True, config_dir=config_dir))
    if wanted.first.dry_run:
        from hpc_imagenet.report.dry_run import print_dry_run

        print_dry_run(wanted.jobs, wanted.store, wanted.executor)
        return []
    runs = [entry.run for entry in wanted.submit()]
    handles = [Handle(run.folder) for run in runs]
    if wanted.first.wait:
        for run, handle in zip(runs, handles, strict=True):
            with contextlib.suppress(UserError):  # its state says so
                if run.info.get("stage") == "session" and wanted.executor != "foreground":
                    wait_until_running(run)
                else:
                    handle.result()
    return handles


def jobs(name: str | None = None, workspace: str | Path | None = None) -> list[Handle]:
    """Return the runs of a workspace, oldest first.

    Args:
        name: of one run, as `jobs` shows it, or the beginning of its id or label; None: all.
        workspace: its folder; None: HPC_IMAGENET_WORKSPACE, else ./workspace.

    Raises:
        UserError: no run is called so, or several are.
    """
    folder = Path(workspace or os.environ.get("HPC_IMAGENET_WORKSPACE", "workspace")).expanduser().absolute()
    store = RunStore(folder)
    found = store.all() if name is None else [store.find(name)]
    return [Handle(run.folder) for run in found]


def command(name: str, *words: str) -> Any:
    """Carry out a verb of the command line, such as `verb("report", "--json")` or `verb("jobs", "--help")`.

    Returns:
        With `--json` the list of objects, else the text that it printed.

    Raises:
        UserError: what was wrong, in one line; also where the verb finds something wrong, such as `verify`.
            Its `printed` is the text until then.
    """
    from hpc_imagenet.cli.commands import COMMANDS, run_command_line
    from hpc_imagenet.errors import did_you_mean

    if name not in COMMANDS:
        raise UserError(f"{name} is an unknown command{did_you_mean(name, COMMANDS)}")
    out, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out):
            code = run_command_line(name, words)
    except SystemExit as end:  # --help
        code = int(end.code or 0)
    except UserError as error:
        error.printed = out.getvalue()
        raise
    printed = out.getvalue()
    if "--json" in words:
        return json.loads(printed)
    if code:
        wrong = UserError(f"{name}: {(printed.strip().splitlines() or ['it failed'])[-1].strip()}")
        wrong.printed = printed
        raise wrong
    return printed
