"""The cache of ended runs: the same rows with and without it, whatever happens to runs and file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import change, record_run, settle

from hpc_imagenet.report.jobs_table import job_rows, workspace_rows
from hpc_imagenet.runs import ended_cache
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, QUEUED
from hpc_imagenet.runs.run_records import RecordCache
from hpc_imagenet.runs.store import Run, RunStore


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = RunStore(tmp_path)
    record_run(store, 1, FINISHED, result={"top1": 0.5}, sweeps=("a",), progress={"top1": 0.6})
    record_run(store, 2, FAILED, "größer \x1b[2J", started={"nodes": "n[1-2]"})
    record_run(store, 3, CANCELLED)
    record_run(store, 4)
    for run in store.all():
        settle(run)
    return store


def rows(store: RunStore) -> list[dict[str, Any]]:
    """Return the rows by a new cache, as a command reads them, without what changes with time."""
    read = workspace_rows(store, RecordCache(store))
    return [{key: value for key, value in row.items() if key not in ("age", "seconds")} for row in read]


def reads(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the runs whose records a command reads from their folders."""
    read: list[Run] = []
    real = RecordCache.read_run
    monkeypatch.setattr(RecordCache, "read_run", lambda cache, run: read.append(run) or real(cache, run))
    rows(store)
    monkeypatch.setattr(RecordCache, "read_run", real)
    return {run.id[7] for run in read}


def test_ended_runs_are_read_once(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows(store)
    assert [row["state"] for row in first] == [FINISHED, FAILED, CANCELLED, QUEUED]
    assert (store.own_folder / RecordCache.file).exists()
    assert reads(store, monkeypatch) == {"4"}
    assert rows(store) == first
    assert [row["run"] for row in job_rows(store.all())] == [row["run"] for row in first]


def test_changed_runs_are_read_again(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(store)
    one, two, three, four = store.all()
    one.new_attempt().submit("local", host="elsewhere")  # a retry
    two.join_sweep("later")
    shutil.rmtree(three.folder)
    assert four.attempt
    four.attempt.end(FINISHED)
    settle(four)
    assert [(row["run"], row["state"]) for row in rows(store)] == [
        *((one.id, QUEUED), (two.id, FAILED), (four.id, FINISHED))
    ]
    assert rows(store)[1]["sweeps"] == ["later"]
    assert CANCELLED not in (store.own_folder / RecordCache.file).read_text()


def test_run_that_has_just_changed_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path)
    record_run(store, 1, FAILED)
    rows(store)
    assert reads(store, monkeypatch) == {"1"}


@pytest.mark.slow
def test_lost_or_damaged_cache_is_made_anew(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, path = rows(store), store.own_folder / RecordCache.file
    whole = path.read_bytes()
    rng = random.Random(0)
    damages = [whole[:size] for size in (0, 1, 8, 9, 10, len(whole) // 2, len(whole) - 1)]
    for _ in range(20):
        at = rng.randrange(len(whole))
        damages.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    for damaged in damages:
        path.write_bytes(damaged)
        assert rows(store) == expected
        assert reads(store, monkeypatch) == {"4"}
    path.unlink()
    assert rows(store) == expected
    assert path.read_bytes() == whole


def test_cache_of_another_version_is_made_anew(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows(store)
    monkeypatch.setattr(RecordCache, "version", RecordCache.version + 1)
    assert reads(store, monkeypatch) == {"1", "2", "3", "4"}
    assert rows(store) == expected
    path = store.own_folder / RecordCache.file
    content = json.dumps({"version": RecordCache.version, "runs": {store.all()[0].id: [1, 2, 3]}}).encode()
    path.write_bytes(b"%08x\n" % ended_cache.zlib.crc32(content) + content)  # of another form
    assert rows(store) == expected


def test_cache_that_cannot_be_written_is_no_error(store: RunStore) -> None:
    expected = rows(store)
    (store.own_folder / RecordCache.file).unlink()
    (store.own_folder / RecordCache.file).mkdir()
    assert rows(store) == expected


def test_moved_workspace_keeps_its_cache(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(store)
    moved = RunStore(store.folder.rename(tmp_path / "moved").parent)
    moved.folder = tmp_path / "moved"
    assert reads(moved, monkeypatch) == {"4"}
    assert rows(moved)[0]["dir"].startswith(str(moved.folder))


def test_run_that_is_deleted_while_it_is_listed_is_left_out(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [*store.unsorted(), store.run("0000000a-deleted")]
    monkeypatch.setattr(store, "unsorted", lambda: runs)
    assert len(rows(store)) == 4


@pytest.mark.slow
def test_few_new_runs_do_not_rewrite_a_large_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path)
    for number in range(220):
        settle(record_run(store, number, FINISHED))
    rows(store)
    path = store.own_folder / RecordCache.file
    before = path.stat().st_ino
    settle(record_run(store, 999, FINISHED))
    change(store.all()[0].folder / "run.json", sweeps=["x"])
    settle(store.all()[0])
    assert len(rows(store)) == 221
    assert path.stat().st_ino == before
    for number in range(1000, 1003):
        settle(record_run(store, number, FINISHED))
    rows(store)
    assert path.stat().st_ino != before
