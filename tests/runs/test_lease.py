"""The lease of a run: of two copies of its job only the one started last may write."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_imagenet.errors import Superseded
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.store import Progress, Run


def started(folder: Path, attempt: int, restart: int) -> lease.Lease:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_RESTART_COUNT", str(restart))
        return lease.acquire(folder, attempt)


def test_later_start_takes_over_the_lease(tmp_path: Path) -> None:
    first = started(tmp_path, 1, 0)
    first.check()
    second = started(tmp_path, 1, 1)
    second.check()
    with pytest.raises(Superseded, match="attempt 1, started 2 times"):
        first.check()
    third = started(tmp_path, 2, 0)
    third.check()
    with pytest.raises(Superseded, match="attempt 2"):
        second.check()


def test_older_start_cannot_take_over_the_lease(tmp_path: Path) -> None:
    newest = started(tmp_path, 2, 1)
    for attempt, restart in ((1, 7), (2, 0)):
        with pytest.raises(Superseded, match="attempt 2 has taken over"):
            started(tmp_path, attempt, restart)
    newest.check()


def test_lease_of_equal_starts_is_held_by_the_second(tmp_path: Path) -> None:
    first, second = started(tmp_path, 1, 0), started(tmp_path, 1, 0)
    second.check()
    with pytest.raises(Superseded):
        first.check()


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=8))
def test_exactly_the_newest_start_holds_the_lease(
    tmp_path_factory: pytest.TempPathFactory, starts: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    taken: list[tuple[tuple[int, int], lease.Lease]] = []
    for attempt, restart in starts:
        try:
            taken.append(((attempt, restart), started(folder, attempt, restart)))
        except Superseded:
            assert (attempt, restart) < max(order for order, _ in taken)
    holding = []
    for order, acquired in taken:
        try:
            acquired.check()
        except Superseded:
            continue
        holding.append((order, acquired))
    assert holding == [taken[-1]]
    assert taken[-1][0] == max(starts)


def test_superseded_process_replaces_no_file(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.lease = started(tmp_path, 1, 0)
    progress = Progress(run, every=0)
    progress(1, 10)
    started(tmp_path, 1, 1)
    with pytest.raises(Superseded):
        progress(2, 10)
    assert run.progress["done"] == 1
    path = tmp_path / "last.ckpt"
    path.write_text("the new copy's")

    def write() -> None:
        with atomic_write(path, run.lease.check if run.lease else None) as file:
            file.write(b"the old copy's")

    with pytest.raises(Superseded):
        write()
    assert path.read_text() == "the new copy's"
    assert not list(tmp_path.glob(".*.tmp"))


def test_only_an_older_start_is_superseded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not lease.is_superseded(tmp_path, 1)
    started(tmp_path, 2, 1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lease.is_superseded(tmp_path, 1)
    assert not lease.is_superseded(tmp_path, 2)
    assert not lease.is_superseded(tmp_path, 3)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert lease.is_superseded(tmp_path, 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert not lease.is_superseded(tmp_path, 2)


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"{}", b"\xff", b'{"attempt": "1", "token": 2}', b"[" * 99_999]
)
def test_damaged_lease_is_no_lease(tmp_path: Path, damaged: bytes) -> None:
    """A power failure can leave half a file: the run must be able to start again."""
    first = started(tmp_path, 1, 0)
    (tmp_path / lease.LEASE_FILE).write_bytes(damaged)
    first.check()
    assert not lease.is_superseded(tmp_path, 1)
    started(tmp_path, 1, 0).check()
