"""The record: claims and outcomes under concurrency, states when nobody left a word."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import yaml
from filelock import FileLock

from hpc_imagenet.config.compose import compose
from hpc_imagenet.demo import digits
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import atomic_files
from hpc_imagenet.launch import local_queue
from hpc_imagenet.launch.states import state
from hpc_imagenet.launch.submission import cancel_run, plan_actions
from hpc_imagenet.report import jobs_table, leaderboard, logs
from hpc_imagenet.runs.plan import make_plan
from hpc_imagenet.runs.store import CANCELLED, FAILED, FINISHED, QUEUED, RUNNING, Progress, Run, RunStore


def at_once(act: Callable[[int], object], times: int = 16) -> list[object]:
    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(act, range(times)))


def made(store: RunStore, *overrides: str) -> Run:
    (job,) = make_plan(
        compose(["dataset=digits", f"workspace={store.folder.parent}", *overrides]), lambda _: None
    )
    info = {"stage": job.stage, "label": job.label, "model": job.model, "needs": []}
    return store.create(job.run_id, job.frozen(), info)


@pytest.mark.parametrize("links", [True, False])
def test_of_many_writers_one_creates(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    won = at_once(lambda i: atomic_files.write_json_once(tmp_path / "x.json", i))
    assert won.count(True) == 1
    assert atomic_files.read_json(tmp_path / "x.json") == won.index(True)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_exception_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    atomic_files.write_json(tmp_path / "x.json", 1)

    def fail_halfway() -> None:
        with atomic_files.atomic_write(tmp_path / "x.json") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert atomic_files.read_json(tmp_path / "x.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_umask_decides_who_reads_and_is_never_set(tmp_path: Path) -> None:
    """It is the whole process's: a file that another thread makes meanwhile would have another one."""
    real, before = os.umask, os.umask(0o027)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(os, "umask")
            atomic_files.write_json(tmp_path / "x.json", 1)
            with atomic_files.atomic_write(tmp_path / "y", secret=True):
                pass
            digits.write_digits(tmp_path / "digits")
    finally:
        real(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"x.json": 0o640, "y": 0o600, "digits": 0o750}


def test_attempts_are_claimed_once_each(tmp_path: Path) -> None:
    run = RunStore(tmp_path).run("00000000-x")
    numbers = at_once(lambda _: run.new_attempt().number)
    assert sorted(map(int, map(str, numbers))) == list(range(1, 17))
    (run.folder / "attempts" / ".nfs0001").touch()  # as file systems leave them
    assert [attempt.number for attempt in run.attempts()] == list(range(1, 17))


def test_the_first_outcome_stands(tmp_path: Path) -> None:
    attempt = RunStore(tmp_path).run("00000000-x").new_attempt()
    assert attempt.end(CANCELLED, "by hand")
    assert not attempt.end(FINISHED)
    assert attempt.outcome is not None
    assert attempt.outcome.state == CANCELLED


def test_the_frozen_config_is_plain_yaml_and_comes_back(tmp_path: Path) -> None:
    run = made(RunStore(tmp_path), "seed=7")
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["seed"] == 7
    assert run.config().seed == 7
    assert run.config().recipe == compose(["dataset=digits"])[0].recipe


def test_a_run_is_found_by_what_is_unique_of_it(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    first, second = made(store, "model=resnet18"), made(store, "model=resnet18", "seed=1")
    other = made(store, "model=resnet50")
    assert store.find(first.id).id == first.id
    assert store.find(first.id[:6]).id == first.id
    assert store.find("resnet50").id == other.id
    with pytest.raises(UserError, match=f"{second.id}|{first.id}"):
        store.find("resnet18")
    with pytest.raises(UserError, match="no run nowhere"):
        store.find("nowhere")


def test_what_another_command_is_just_sending_is_not_sent_again(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    asked = make_plan(compose(["dataset=digits", f"workspace={tmp_path}"]), lambda _: None)
    assert [what for _, what, _ in plan_actions(asked, store)] == ["submitted"]
    run = made(store)
    assert [(job.run_id, what) for job, what, _ in plan_actions(asked, store)] == [(run.id, "active")]
    os.utime(run.folder, (1, 1))  # it was cut off
    assert [what for _, what, _ in plan_actions(asked, store)] == ["submitted"]


def test_states_without_a_word(tmp_path: Path) -> None:
    run = made(RunStore(tmp_path))
    assert state(run).name == QUEUED  # the folder was made, and somebody may be about to send it
    with pytest.raises(UserError, match="is being submitted: cancel it in a moment"):
        cancel_run(run)
    os.utime(run.folder, (1, 1))
    assert (state(run).name, "never submitted" in state(run).reason) == (FAILED, True)
    assert not state(RunStore(tmp_path).run("00000000-nobody")).active
    attempt = run.new_attempt()
    assert state(run).name == QUEUED  # it may be sent in a moment
    os.utime(attempt.folder, (1, 1))
    assert (state(run).name, "cut off" in state(run).reason) == (FAILED, True)
    attempt.submit("local", host=socket.gethostname())
    assert state(run).name == QUEUED
    local_queue.record_process(attempt)
    assert state(run).name == RUNNING
    note = json.loads((attempt.folder / "process.json").read_text())
    atomic_files.write_json(attempt.folder / "process.json", {**note, "born": 1.0})
    assert (state(run).name, "without a word" in state(run).reason) == (FAILED, True)
    attempt.end(FINISHED, result={"top1": 0.5})
    assert state(run).name == FINISHED
    assert run.new_attempt().number == 2
    assert state(run).name == QUEUED


def test_an_attempt_that_another_process_carries_out_is_left_alone(tmp_path: Path) -> None:
    run = made(RunStore(tmp_path))
    attempt = run.new_attempt()
    attempt.start(**local_queue.process_identity(os.getpid()))
    child = [sys.executable, "-m", "hpc_imagenet.launch.task", str(run.folder), "1"]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "leaving it alone" in done.stderr
    assert attempt.started["pid"] == os.getpid()
    assert attempt.outcome is None


def test_a_job_of_another_host_is_not_judged_from_here(tmp_path: Path) -> None:
    run = made(RunStore(tmp_path))
    attempt = run.new_attempt()
    attempt.submit("local", host="elsewhere")
    assert state(run).name == QUEUED
    attempt.start()
    assert (state(run).name, "elsewhere" in state(run).reason) == (RUNNING, True)
    with pytest.raises(UserError, match="runs on elsewhere: cancel it there"):
        cancel_run(run)
    assert attempt.outcome is None  # it goes on, and tells its own
    waits = run.new_attempt()
    waits.submit("local", host="elsewhere")
    cancel_run(run)
    assert waits.outcome


def test_a_character_that_is_half_written_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(RunStore(tmp_path))
    attempt = run.new_attempt()
    attempt.submit("local", host="elsewhere")
    log, written = attempt.folder / "1_0_log.out", "größer\n".encode()
    log.write_bytes(written[:3])

    def goes_on(_: float) -> None:
        log.write_bytes(written)
        attempt.end(FINISHED)

    monkeypatch.setattr(logs.time, "sleep", goes_on)
    logs.show_logs(run, follow=True)
    assert capsys.readouterr().out == "größer\n"


@pytest.mark.parametrize(
    ("visible", "devices", "told"),
    [
        (None, (), []),
        (None, (3,), ["0"]),  # of a container that has this one
        (None, (0, 1, 10), ["0", "1", "2"]),
        ("2,0", (), ["2", "0"]),
        ("GPU-1a2b, MIG-3c", (0,), ["GPU-1a2b", "MIG-3c"]),
        ("", (0,), []),
        ("1,-1,2", (0,), ["1"]),
        ("NoDevFiles", (0,), []),
    ],
)
def test_gpus_are_those_that_cuda_would_show(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    devices: tuple[int, ...],
    told: list[str],
) -> None:
    monkeypatch.setattr(local_queue, "_DEVICES", tmp_path)
    for name in (*(f"nvidia{number}" for number in devices), "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_queue.available_gpus() == told


def test_who_looks_for_a_worker_is_not_taken_for_one(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert not local_queue.is_worker_alive(store)
    lock = local_queue.queue_folder(store) / "worker.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        assert local_queue.is_worker_alive(store)
    real = fcntl.flock

    def meanwhile(*arguments: int) -> None:
        real(*arguments)
        with mock.patch.object(fcntl, "flock", real):
            assert not local_queue.is_worker_alive(store)

    with mock.patch.object(fcntl, "flock", meanwhile):
        assert not local_queue.is_worker_alive(store)


def test_progress_is_throttled_but_the_end_is_told(tmp_path: Path) -> None:
    progress = Progress(Run(tmp_path), every=3600)
    for done in range(11):
        progress(done, 10, "images", "note")
    told = atomic_files.read_json(tmp_path / "progress.json")
    assert told is not None
    assert (told["done"], told["total"], told["unit"]) == (10, 10, "images")
    assert told["rate"] > 0


def test_rows_and_leaderboard(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for seed, top1 in enumerate((0.5, None, 0.9)):
        attempt = made(store, f"seed={seed}").new_attempt()
        attempt.submit("local", host=socket.gethostname())
        attempt.start()
        if top1 is not None:
            attempt.end(FINISHED, result={"top1": top1, "images_per_second": 10.0, "seconds": 75.0})
    rows = jobs_table.job_rows(store.all())
    assert [row["top1"] for row in rows] == [0.5, None, 0.9]
    assert {"run", "stage", "model", "state", "top1", "dir"} <= rows[0].keys()
    old = store.all()[0].folder / "config.yaml"  # of a version that had other settings
    old.write_text(old.read_text().replace("recipe:\n", "recipe:\n  gone: 1\n"))
    board = leaderboard.leaderboard_rows(store.all())
    assert [row["top1"] for row in board] == [0.9, 0.5, None]
    assert [row["seed"] for row in board] == [2, 0, 1]
    console = jobs_table.terminal()
    with console.capture() as drawn:
        console.print(leaderboard.render_leaderboard([{**row, "dir": "/a/[b]/c"} for row in board]))
        console.print(jobs_table.render_jobs(rows))
    assert "90.00" in drawn.get()
    assert drawn.get().count("/a/[b]/c") == 3
    assert "1:15" in drawn.get()


def test_a_thousand_runs_are_listed_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path)
    first = made(store)
    attempt = first.new_attempt()
    attempt.end(FINISHED, result={"top1": 0.5})
    for number in range(999):
        folder = store.folder / f"{number:08x}-resnet18"
        (folder / "attempts" / "1").mkdir(parents=True)
        for name in ("run.json", "attempts/1/outcome.json"):
            (folder / name).hardlink_to(first.folder / name)
    looked: list[Path] = []

    def watched(real: Callable[[Path], object]) -> Callable[[Path], object]:
        return lambda path: looked.append(Path(path)) or real(path)

    monkeypatch.setattr(os, "listdir", watched(os.listdir))
    monkeypatch.setattr(os, "scandir", watched(os.scandir))
    assert len(jobs_table.job_rows(store.all())) == 1000
    assert looked.count(store.folder) == 1
