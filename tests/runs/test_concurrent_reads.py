"""Many reads: all results in order, and threads only where reads wait."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.runs import concurrent_reads
from hpc_imagenet.runs.concurrent_reads import read_concurrently


class Clock:
    """Clocks of reads that need 1 ms of CPU time each, and wait `waited` ms."""

    def __init__(self, waited: float) -> None:
        self._waited, self._reads = waited, 0
        self.threads: set[int] = set()

    def read(self, item: int) -> int:
        self._reads += 1
        self.threads.add(threading.get_ident())
        return -item

    def perf_counter(self) -> float:
        return 1e-3 * self._reads * (1 + self._waited)

    def thread_time(self) -> float:
        return 1e-3 * self._reads


@pytest.mark.parametrize(("waited", "threads"), [(0, 1), (0.4, 1), (1, 2), (4, 5), (15, 16), (1000, 16)])
def test_threads_read_where_reads_wait(waited: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, threads: int) -> None:
            pools.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(concurrent_reads, "time", clock := Clock(waited))
    monkeypatch.setattr(concurrent_reads, "ThreadPoolExecutor", Pool)
    assert read_concurrently(clock.read, range(500)) == [-item for item in range(500)]
    assert pools == ([threads] if threads > 1 else [])
    assert (len(clock.threads) > 1) == (threads > 1)


@given(st.lists(st.integers(), max_size=100), st.sampled_from([0.0, 3.0, 50.0]))
def test_all_results_come_in_order(items: list[int], waited: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concurrent_reads, "time", clock := Clock(waited))
        assert read_concurrently(clock.read, items) == [-item for item in items]


@pytest.mark.parametrize("at", [0, 60])
@pytest.mark.parametrize("waited", [0.0, 50.0])
def test_an_error_of_a_read_is_raised(at: int, waited: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(item: int) -> int:
        if item == at:
            raise OSError("cannot be read")
        return clock.read(item)

    monkeypatch.setattr(concurrent_reads, "time", clock := Clock(waited))
    with pytest.raises(OSError, match="cannot be read"):
        read_concurrently(read, range(100))
