"""What is disturbed of the local queue: downloads that are submitted, cancelled and retried."""

from __future__ import annotations

import contextlib
import random
from typing import Any

from command_line import Cli, eventually
from scenarios import ARCHIVES, Scenario
from test_process import write_small

from hpc_imagenet.data.download import receipt
from hpc_imagenet.io.atomic_files import read_json
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.runs.attempt import Attempt
from hpc_imagenet.runs.store import RunStore

ATTEMPTS = 9  # of a run that is killed again and again
LIMIT = 300.0  # s in which runs end


class Queue(Scenario):
    """Two downloads on the local queue: the command, the worker and the jobs are killed, one at a time."""

    survives = True
    turns, disturbances = 2, 3
    runs = 2

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Write the archives."""
        self.source = self.folder / "source"
        self.source.mkdir(parents=True)
        write_small(self.source, random.Random(3))

    @property
    def cli(self) -> Cli:
        """The command line of the workspace."""
        return Cli(self.state)

    def reset(self) -> None:
        """End all processes of the workspace, and remove it."""
        self.cli.close()
        super().reset()

    def submit(self, *words: str) -> None:
        """Submit both, unless they are queued, running or finished."""
        names = ("dataset.name=a,b", f"dataset.source={self.source}")
        self.cli("-m", "+stage=download", "dataset=ilsvrc", *names, "cluster=local", *words, code=None)

    def work(self) -> None:
        """Submit both until both have finished; a job that was killed counts as failed."""
        for _ in range(ATTEMPTS):
            self.submit("wait=true")
            if self.cli.states() == ["finished"] * self.runs:
                return
        raise ChildProcessError(f"the runs are {self.cli.jobs()}")

    def victims(self, pid: int) -> list[int]:
        """Return the command, the worker and the jobs."""
        return [pid, *(process.pid for process in self.cli.processes())]

    def check(self) -> None:
        """Compare every archive with a receipt; of a run, at most one attempt may be without an outcome."""
        for folder in (self.state / "archives").glob("*"):
            for file in ARCHIVES:
                if receipt.load_receipt(folder / file):
                    assert (folder / file).read_bytes() == (self.source / file).read_bytes(), file
        for run in RunStore(self.state).unsorted():
            assert sum(attempt.outcome is None for attempt in run.attempts()) <= 1, f"{run.id} runs twice"

    def result(self) -> Any:
        """Return the runs and their archives, when a last worker has ended.

        A worker that was killed leaves the entries of attempts that have ended; the next one removes them.
        """
        eventually(lambda: not self.cli.processes())
        store = RunStore(self.state)
        for path in self.state.rglob("*.entry"):
            entry = read_json(path) or {}
            assert Attempt(self.state / f"runs/{entry['run']}/attempts/{entry['attempt']}").outcome, entry
        local_queue.ensure_worker(store)
        eventually(lambda: not self.cli.processes())
        runs = sorted(run.id for run in store.unsorted())
        entries = [path.name for path in self.state.rglob("*.entry")]
        return runs, self.cli.states(), entries, self.outputs()

    def outputs(self) -> dict[str, bytes]:
        """Return the archives, and the names of all files beside them."""
        return {
            str(path.relative_to(self.state)): path.read_bytes() if path.name in ARCHIVES else b""
            for path in sorted((self.state / "archives").rglob("*"))
            if path.is_file()
        }


class CancelRetry(Queue):
    """Two downloads that are cancelled and retried on the local queue."""

    def work(self) -> None:
        """Submit and cancel both, then retry them until both have finished."""
        if not self.cli.runs():
            self.submit()
        self.all("cancel")
        for _ in range(ATTEMPTS):
            self.all("retry", "--again")
            eventually(lambda: not {"queued", "running"}.intersection(self.cli.states()), LIMIT)
            if self.cli.states() == ["finished"] * self.runs:
                return
            self.submit()  # a run of which the killed command had not made the folder
        raise ChildProcessError(f"the runs are {self.cli.jobs()}")

    def all(self, command: str, *options: str) -> None:
        """Cancel or retry all runs; it may fail, as nothing may be left to do, but not by its options."""
        done = self.cli(command, "--stage", "download", *options, code=None)
        assert f"{command}: give RUN" not in done.stderr, done.stderr
