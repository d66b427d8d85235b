"""Load one workspace with many runs, queued jobs, array tasks and clients at once.

    python benchmarks/load.py [--only runs,queue,worker,clients,lab] [--divide 1] [--folder FOLDER]

runs      commands in a workspace of 10,000 runs
queue     2,000 downloads queued on this machine: submit, jobs, cancel; CPU time of the worker per pass
worker    memory and CPU time of the worker over 10,000 jobs, each of them the program `true`
clients   50 clients at once on one workspace: each submits, lists and cancels; then all add one run to a
          sweep of their own, and the number of sweeps lost is printed
lab       an array of 1,000 tasks on the Slurm lab with MaxArraySize=100

Commands are started as a user does, interpreter and imports included. CPU seconds are shown as well, since
they vary less on a busy machine. It uses a temporary workspace and deletes everything.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from jobs import make_run, measure
from lab_site import LAB

from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.local_jobs.local_worker import Worker
from hpc_imagenet.runs.attempt import CANCELLED
from hpc_imagenet.runs.store import RunStore

LIMIT = 2.0  # s that an answer may take
PROGRAM = (sys.executable, "-m", "hpc_imagenet")


class Workspace:
    """An empty workspace, and commands on it."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None) -> None:
        self.folder = folder / "workspace"
        (self.folder / "runs").mkdir(parents=True)
        self.store = RunStore(self.folder)
        inherited = {k: v for k, v in (env or os.environ).items() if k != "SLURM_JOB_ID"}
        self.env = {**inherited, "HPC_IMAGENET_WORKSPACE": str(self.folder), "HPC_IMAGENET_CLUSTER": "local"}

    def show(self, name: str, *words: str) -> None:
        """Run a command and print how long it took."""
        seconds, cpu = measure([*PROGRAM, *words], self.env)
        print_line(name, seconds, cpu)

    def quietly(self, *words: str) -> float:
        """Run a command and return how long it took, in s."""
        return measure([*PROGRAM, *words], self.env)[0]


def print_line(name: str, seconds: float, cpu: float | None = None) -> None:
    """Print a duration in s, and mark an answer over the limit."""
    shown = "" if cpu is None else f"{cpu:9.2f}"
    print(f"  {name:56}{seconds:9.2f}{shown}{'  over 2 s' if seconds > LIMIT else ''}", flush=True)


@contextlib.contextmanager
def no_worker(workspace: Workspace) -> Iterator[None]:
    """Hold the lock of the queue, as a worker does that starts nothing."""
    from filelock import FileLock

    with FileLock(local_queue.make_queue_folder(workspace.store) / "worker.lock"):
        yield


def download(first: int, end: int, *words: str) -> tuple[str, ...]:
    """Return the words of a command that submits downloads of datasets by number, up to `end`."""
    names = ",".join(f"d{number}" for number in range(first, end))
    sweep = ("-m",) if end > first + 1 else ()
    dataset = ("dataset=ilsvrc", f"dataset.name={names}", "dataset.source=/nowhere")
    return *sweep, "+stage=download", *dataset, *words


def many_runs(folder: Path, count: int) -> None:
    """Time commands in a workspace of many runs."""
    workspace, draw = Workspace(folder), random.Random(0)
    for number in range(count):
        make_run(workspace.folder / "runs", number, number < 100, draw)
    last = max(path.name for path in (workspace.folder / "runs").iterdir())
    with no_worker(workspace):
        workspace.show("jobs, the first time", "jobs")
        workspace.show("jobs", "jobs")
        workspace.show("jobs --json", "jobs", "--json")
        workspace.show("report", "report")
        workspace.show("report --json", "report", "--json")
        workspace.show("show RUN", "show", last)
        workspace.show("logs RUN", "logs", last)
        workspace.show("submit one", *download(0, 1))
        workspace.show("cancel RUN", "cancel", "download-d0")


def queued(folder: Path, count: int) -> None:
    """Queue many jobs, and time commands and one pass of the worker."""
    workspace = Workspace(folder)
    with no_worker(workspace):
        workspace.show("submit all", *download(0, count))
        workspace.show("jobs", "jobs")
        workspace.show("submit one more", *download(count, count + 1))
        run = workspace.store.unsorted()[0].id
        workspace.show("cancel RUN", "cancel", run)
        worker = Worker(workspace.store)
        with mock.patch.object(Worker, "_start", return_value=False):  # as if it waited for GPUs
            for name in ("first pass of the worker", "second pass of the worker"):
                begin = time.process_time()
                worker.step()
                print_line(name, time.process_time() - begin)
        workspace.show("cancel all", "cancel", "--stage", "download")


class _True:
    """A submitit executor whose jobs do nothing."""

    def __init__(self, folder: Path) -> None:
        self.parameters: dict[str, Any] = {}

    def update_parameters(self, **_: Any) -> None:
        """Take any parameters."""

    def submit(self, task: Any) -> Any:
        """Start a program that ends at once."""
        process = subprocess.Popen(["true"])
        job = mock.Mock(spec=["job_id", "done"], job_id=str(process.pid))
        job.done = lambda: process.poll() is not None
        return job


def worker_memory(folder: Path, count: int) -> None:
    """Let a worker start many jobs, 100 of them queued at a time; print its memory."""
    workspace = Workspace(folder)
    with no_worker(workspace):
        workspace.quietly(*download(0, 100, "cluster.parallel=50"))
        for path in local_queue.queue_folder(workspace.store).glob("*.entry"):
            path.unlink()
    runs = workspace.store.all()
    worker, process, done, begin = Worker(workspace.store), psutil.Process(), 0, time.process_time()
    patched = mock.patch("hpc_imagenet.launch.local_jobs.local_worker._LocalJobs", _True)
    with patched:
        while done < count:
            for run in runs:
                if last := run.attempt:
                    last.end(CANCELLED)
            attempts = [(run, run.new_attempt()) for run in runs]
            local_queue.enqueue(workspace.store, [[each] for each in attempts])
            while worker.step():
                pass
            done += len(runs)
            if done in (count // 10, count // 5, count // 2) or done >= count:
                used = time.process_time() - begin
                print(
                    f"  after {done:6,} jobs: {process.memory_info().rss / 2**20:7.1f} MiB, "
                    f"{1e3 * used / done:6.1f} ms of CPU a job, {len(worker.handles)} handles, "
                    f"{len(worker.entries)} entries",
                    flush=True,
                )


def many_clients(folder: Path, count: int) -> None:
    """Let many clients use one workspace at the same time."""
    workspace = Workspace(folder)
    with no_worker(workspace), ThreadPoolExecutor(count) as clients:

        def at_once(name: str, words: Any) -> None:
            before = os.times()
            times = sorted(clients.map(lambda number: workspace.quietly(*words(number)), range(count)))
            after = os.times()
            cpu = (after.children_user + after.children_system) - (
                before.children_user + before.children_system
            )
            print_line(f"{name}: the median", times[count // 2], cpu / count)
            print_line(f"{name}: the slowest", times[-1])

        at_once("submit one each", lambda number: download(number, number + 1))
        at_once("jobs", lambda _: ("jobs",))
        runs = [run.id for run in workspace.store.all()]
        print(f"  runs: {len(runs)} of {count}")
        at_once("add the same run to a sweep each", lambda number: download(0, 1, f"sweep=s{number}"))
        sweeps = {name for run in workspace.store.all() for name in run.info.get("sweeps", ())}
        print(f"  sweeps: {len(sweeps)} of {count}")
        at_once("cancel one each", lambda number: ("cancel", runs[number]))
        states = [attempt.outcome for run in workspace.store.all() if (attempt := run.attempt)]
        print(f"  cancelled: {sum(outcome is not None for outcome in states)} of {count}")


def array_tasks(folder: Path, count: int) -> None:
    """Submit many tasks to the lab, in arrays of at most 100."""
    lab = folder / "lab"
    env = {**os.environ, "PATH": f"{lab}/bin:{os.environ['PATH']}", "SLURM_CONF": f"{lab}/etc/slurm.conf"}
    workspace = Workspace(folder, env)
    try:
        settings = ("--set", "MaxArraySize=101", "--set", "MaxJobCount=20000")
        subprocess.run([LAB, "--dir", lab, "up", *settings, f"--end-with={os.getpid()}"], check=True)
        held = "+cluster.sbatch.hold=true"
        workspace.show("submit all", *download(0, count, "cluster=lab", held))
        arrays = subprocess.run(
            ["squeue", "--noheader", "--format=%A"], env=env, capture_output=True, text=True, check=True
        )
        print(f"  arrays in squeue: {len(arrays.stdout.split())}")
        workspace.show("jobs", "jobs")
        workspace.show("cancel RUN", "cancel", workspace.store.unsorted()[0].id)
        workspace.show("cancel all", "cancel", "--stage", "download")
        workspace.show("jobs, all cancelled", "jobs")
    finally:
        subprocess.run([LAB, "--dir", lab, "down"], check=False)


ITEMS = {
    "runs": (many_runs, 10_000),
    "queue": (queued, 2_000),
    "worker": (worker_memory, 10_000),
    "clients": (many_clients, 50),
    "lab": (array_tasks, 1_000),
}


def main() -> None:
    """Play the items, each in a workspace of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(ITEMS), help="items, separated by commas")
    parser.add_argument("--divide", type=int, default=1, help="divide all numbers by this, to try it out")
    parser.add_argument("--folder", type=Path, help="folder for the temporary workspaces")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory(prefix="load-", dir=options.folder) as folder:
            play, count = ITEMS[name]
            head = f"{name}, {count // options.divide:,}"
            print(f"{head:58}{'seconds':>9}{'CPU':>9}   (load {os.getloadavg()[0]:.1f})", flush=True)
            play(Path(folder).resolve(), count // options.divide)


if __name__ == "__main__":
    main()
