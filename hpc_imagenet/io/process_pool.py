"""A pool of worker processes for CPU work; the workers exit when the parent process dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from hpc_imagenet.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order, computed in parallel.

    With one worker or one item everything runs in this process. Function and items must be picklable.

    Args:
        function: called with one item in a worker process.
        items: the arguments, one a call.
        workers: number of processes.

    Raises:
        UserError: a worker process was killed, or `function` raised it.
    """
    if min(workers, len(items)) <= 1:
        yield from map(function, items)
        return
    # spawn, not fork: a fork copies locks that other threads hold.
    pool = ProcessPoolExecutor(
        min(workers, len(items)), multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        futures = deque(pool.submit(function, item) for item in items)
        while futures:
            yield futures.popleft().result()  # a future that is kept keeps its result
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, probably out of memory: lower process.workers, "
            "or raise cluster.memory_gb"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Exit this worker when its parent ends: a parent that gets SIGKILL cannot end its children."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    with contextlib.suppress(Exception):
        if parent is not None:
            parent.join()
    os._exit(1)
