"""Run several trainings on one node, each in its own process, with one loader for all of them.

This process decodes their images and watches them. Each training is an ordinary attempt that task.py runs: it
has its own record, log and checkpoints, resumes by itself, and goes on if this process dies. It ends alone:
when it finishes, fails, is killed or is cancelled, the others go on. A signal that stops the job is passed to
all, which save their checkpoints and exit.

Without submitit: `python -m hpc_imagenet.launch.tasks.shared_task RUN_FOLDER ATTEMPT RUN_FOLDER ATTEMPT …`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpc_imagenet.cluster import gpus, slurm
from hpc_imagenet.cluster.dist_env import SHARED_LOADER_VARIABLE
from hpc_imagenet.errors import EXIT_REQUEUE, UserError
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.retries.error_logs import error_logs
from hpc_imagenet.launch.tasks import notification
from hpc_imagenet.launch.tasks.task import end_failed, on_slurm
from hpc_imagenet.runs.attempt import CANCELLED, FINISHED, Attempt
from hpc_imagenet.runs.store import Run, attempt_of

_POLL = 0.2  # s between two looks at the processes
_OUTCOMES = 1.0  # s between two looks at the outcomes, for a cancellation
_SETTLED = 2.0  # s after which a process was killed alone, and not together with this one


@dataclass(frozen=True)
class SharedTask:
    """The callable that submitit pickles: run folders and numbers of attempts."""

    attempts: tuple[tuple[str, int], ...]

    def __call__(self) -> None:
        """Run the attempts; see `run_shared_task`."""
        run_shared_task([attempt_of(folder, number) for folder, number in self.attempts])


def run_shared_task(attempts: Sequence[tuple[Run, Attempt]]) -> None:
    """Run attempts that share a loader, until all have ended.

    Args:
        attempts: attempts with their runs; those that have an outcome are left out.

    Raises:
        SystemExit: not all have finished; EXIT_REQUEUE if some have no outcome and the job is to be requeued.
    """
    pending = [(run, attempt) for run, attempt in attempts if attempt.outcome is None]
    print(f"{len(pending)} runs with one loader: {' '.join(run.id for run, _ in pending)}", flush=True)
    with StopSignal() as stop, contextlib.ExitStack() as stack:
        memory = os.memfd_create("shared loader")
        stack.callback(os.close, memory)
        members = [_start(run, attempt, number, memory) for number, (run, attempt) in enumerate(pending)]
        decoder = threading.Thread(target=_decode, args=(members, memory))
        decoder.start()
        try:
            _watch(members, stop)
        finally:
            for member in members:
                member.disconnect()
            decoder.join()
    outcomes = [attempt.outcome for _, attempt in attempts]
    if on_slurm() and None in outcomes:
        raise SystemExit(EXIT_REQUEUE)
    if any(outcome is None or outcome.state != FINISHED for outcome in outcomes):
        raise SystemExit(1)


@dataclass
class _Member:
    """A run and its process.

    Attributes:
        connection: this side of the connection between its loader and the decoder.
        stopped: when it was requested to stop (s, monotonic).
        ended: when its process was seen to have ended (s, monotonic).
        recorded: whether its end needs no further attention.
    """

    run: Run
    attempt: Attempt
    process: subprocess.Popen[bytes]
    connection: socket.socket
    stopped: float | None = None
    ended: float | None = None
    recorded: bool = False

    def disconnect(self) -> None:
        """Let the run go on with its own loader."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Request the process to save and exit; kill it if that takes longer than the grace period."""
        if self.stopped is None:
            self.stopped = time.monotonic()
            self.process.terminate()
        elif time.monotonic() - self.stopped > local_queue.GRACE:
            self.process.kill()


def _start(run: Run, attempt: Attempt, number: int, memory: int) -> _Member:
    """Start the process of a run, on one of the GPUs of this job, with logs in the folder of its attempt."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, SHARED_LOADER_VARIABLE: f"{there.fileno()},{memory}"}
    most = run.cluster().gpus_per_node  # null: all, as cluster.sbatch requests them
    devices = gpus.available_gpus()[:most]
    if len(devices) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    job = os.environ.get("SUBMITIT_LOCAL_JOB_ID") or slurm.this_job() or os.getpid()
    command = [sys.executable, "-u", "-m", "hpc_imagenet.launch.tasks.task"]
    command += [str(run.folder), str(attempt.number)]
    with contextlib.ExitStack() as stack:
        out, err = (
            stack.enter_context((attempt.folder / f"{job}_0_log.{end}").open("ab")) for end in ("out", "err")
        )
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=(there.fileno(), memory),
        )
    there.close()  # so that the end of the process ends the connection
    return _Member(run, attempt, process, here)


def _decode(members: Sequence[_Member], memory: int) -> None:
    """Decode for all members; whatever goes wrong here, they go on with their own loaders."""
    try:
        from hpc_imagenet.stages.work import train

        connections = {member.run.id: member.connection for member in members}
        train.decode_for([member.run.own_config() for member in members], connections, memory)
    except UserError as error:
        print(f"no shared loader: {error}", file=sys.stderr, flush=True)
    except Exception:
        traceback.print_exc()
    for member in members:
        member.disconnect()


def _watch(members: Sequence[_Member], stop: StopSignal) -> None:
    """Wait until all processes have ended; pass a signal on, stop cancelled runs, record sudden ends."""
    looked, passed = time.monotonic(), None
    while not all(member.recorded for member in members):
        time.sleep(_POLL)
        now = time.monotonic()
        if stop.signal is not None and passed is None:
            passed = stop.signal
            print(f"stopping all runs: {passed.name}", flush=True)
            for member in members:
                member.disconnect()  # none of them must wait for another one now
                if member.process.poll() is None:
                    member.process.send_signal(passed)
        look, looked = now - looked > _OUTCOMES, now if now - looked > _OUTCOMES else looked
        for member in members:
            if member.recorded:
                continue
            if member.process.poll() is None:
                if look and (outcome := member.attempt.outcome) and outcome.state == CANCELLED:
                    member.stop()
                continue
            member.ended = member.ended or now
            if member.attempt.outcome or passed or now - member.ended > _SETTLED:
                _record_end(member, stopping=passed is not None)
                member.recorded = True


def _record_end(member: _Member, stopping: bool) -> None:
    """Write the outcome of a process that has ended without one, unless the job is being stopped."""
    code, attempt = member.process.returncode, member.attempt
    saved = code == EXIT_REQUEUE and on_slurm()  # the end of the job requeues it
    if attempt.outcome is None and not stopping and not saved and not local_queue.started_elsewhere(attempt):
        if code < 0:
            name = signal.Signals(-code).name
            reason = f"ended without an outcome ({name}: killed, or out of memory): retry resumes it"
        else:
            logs = error_logs(attempt)
            line = logs.last_error() or logs.last_line() or "none, its error log is empty"
            reason = f"exit code {code} without an outcome; last error line: {line}"
        end_failed(attempt, reason)
        print(f"{member.run.id} {reason}; the other runs go on", file=sys.stderr, flush=True)
    if attempt.outcome:
        notification.run_ended(member.run, attempt)


def main(words: Sequence[str]) -> Any:
    """Run the attempts named on the command line: run folder and number, in turn."""
    run_shared_task([attempt_of(words[i], int(words[i + 1])) for i in range(0, len(words), 2)])


if __name__ == "__main__":
    main(sys.argv[1:])
