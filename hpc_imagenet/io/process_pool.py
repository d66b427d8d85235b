"""Work on all CPUs of a job: a pool of processes that dies with the process that began it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from hpc_imagenet.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order, worked on by so many processes.

    One worker, or one item, needs no process but this one. Function and items are pickled.

    Raises:
        UserError: a process was killed, or the function raised it.
    """
    if min(workers, len(items)) <= 1:
        yield from map(function, items)
        return
    # Started afresh, not forked: a fork copies locks that other threads hold.
    pool = ProcessPoolExecutor(
        min(workers, len(items)), multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        for future in [pool.submit(function, item) for item in items]:
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, probably for its memory: set process.workers lower, "
            "or cluster.memory_gb higher"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Leave no worker behind: a parent that gets SIGKILL cannot end its children."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    with contextlib.suppress(Exception):
        if parent is not None:
            parent.join()
    os._exit(1)
