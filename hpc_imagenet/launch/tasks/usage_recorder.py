"""Record CPU time, memory and GPU energy of a task while it runs, by a thread in its process."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import psutil

from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus
from hpc_imagenet.cluster.gpu_meter import GpuMeter, open_meter
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.io.ownership import make_own_folder
from hpc_imagenet.runs.attempt import Attempt
from hpc_imagenet.runs.lease import restart_count
from hpc_imagenet.runs.usage_records import usage_path

_SAMPLE = 5.0  # s between two samples
_WRITE = 60.0  # s at most between two writes of a small job; shorter at first
_WRITES = 10.0  # per second over all tasks: they are in one folder of the shared file system


class UsageRecorder:
    """Context manager that records what this task uses in its attempt's folder."""

    def __init__(
        self, attempt: Attempt, dist_env: DistEnv, meter: Callable[[float], GpuMeter | None] = open_meter
    ) -> None:
        """Prepare to record.

        Args:
            attempt: the attempt of this task.
            dist_env: the task's rank, and its share of the node.
            meter: opens the meter of the GPUs.
        """
        self._path = usage_path(attempt, restart_count(), dist_env.rank)
        self._fixed = {
            "restarts": restart_count(),
            "host": socket.gethostname(),
            "cpus": available_cpus(dist_env),
        }
        self._open_meter = meter
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="usage", daemon=True)
        self._lock = threading.Lock()  # a sample is taken by the thread or at the end, never by both
        self._memory = 0
        self._has_folder = False
        self._intervals = write_intervals(dist_env.size)

    def __enter__(self) -> UsageRecorder:
        self._began = time.monotonic()
        self._meter = self._open_meter(self._began)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(_SAMPLE)
        self._write()

    def _work(self) -> None:
        written, every = self._began, next(self._intervals)
        while not self._ended.wait(min(_SAMPLE, every)):
            now = self._sample()
            if now - written >= every:
                self._write()
                written, every = now, next(self._intervals)

    def _sample(self) -> float:
        with self._lock:
            now = time.monotonic()
            if self._meter:
                self._meter.sample(now)
            return now

    def _write(self) -> None:
        now = self._sample()
        self._memory = max(self._memory, _memory_of_tree())  # only here: it reads all of /proc
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # between samples
        record: dict[str, Any] = {
            **self._fixed,
            "seconds": now - self._began,
            "cpu_seconds": _cpu_seconds_of_tree(),
            "memory_bytes": max(self._memory, peak),
            "gpus": self._meter.totals() if self._meter else {},
        }
        # A full disk, or a folder that was deleted or is another user's: it must not end the job.
        with contextlib.suppress(OSError, UserError):
            if not self._has_folder:
                make_own_folder(self._path.parent)
                self._has_folder = True
            write_json(self._path, record)


def write_intervals(tasks: int) -> Iterator[float]:
    """Yield the seconds between two writes of one of so many tasks: 1, 2, 4 … 60, or more in a large job."""
    every = 1.0
    while True:
        yield max(every, tasks / _WRITES)
        every = min(_WRITE, 2 * every)


def _cpu_seconds_of_tree() -> float:
    """Return the CPU s of this process, of children that have ended, and of those that are running."""
    times = os.times()
    seconds = times.user + times.system + times.children_user + times.children_system
    for child in _children():
        with contextlib.suppress(psutil.Error):
            used = child.cpu_times()
            seconds += used.user + used.system + used.children_user + used.children_system
    return seconds


def _memory_of_tree() -> int:
    """Return the resident bytes of this process and its children; shared pages count in each of them."""
    total = 0
    for process in (psutil.Process(), *_children()):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def _children() -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process().children(recursive=True)
    return []
