"""The run store: attempts and outcomes under concurrency, states of runs, listings of runs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from filelock import FileLock
from recorded_runs import create_run

from hpc_imagenet.cluster import gpus
from hpc_imagenet.config.compose import compose
from hpc_imagenet.demo import digits
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import access, atomic_files
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.states import state, states
from hpc_imagenet.launch.submission import cancel_run, plan_actions
from hpc_imagenet.launch.tasks import task
from hpc_imagenet.report import jobs_table, leaderboard, logs, terminal_text
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, QUEUED, RUNNING
from hpc_imagenet.runs.store import Progress, Run, RunStore
from hpc_imagenet.stages.work import download


def run_concurrently(function: Callable[[int], object], times: int = 16) -> list[object]:
    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(function, range(times)))


@pytest.mark.parametrize("links", [True, False])
def test_write_json_once_has_one_winner_among_concurrent_writers(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    won = run_concurrently(lambda i: atomic_files.write_json_once(tmp_path / "x.json", i))
    assert won.count(True) == 1
    assert atomic_files.read_json(tmp_path / "x.json") == won.index(True)
    assert not list(tmp_path.glob("*.tmp"))


def test_concurrent_commands_add_a_run_to_all_their_sweeps(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = store.create("0-x", {}, {"stage": "train", "needs": []})

    def command(number: int) -> None:
        store.create("0-x", {}, {"stage": "train", "needs": []})
        run.join_sweep(f"s{number}")

    run_concurrently(command)
    assert sorted(run.info["sweeps"]) == sorted(f"s{number}" for number in range(16))


def test_atomic_write_keeps_the_old_file_after_an_exception(tmp_path: Path) -> None:
    atomic_files.write_json(tmp_path / "x.json", 1)

    def fail_halfway() -> None:
        with atomic_files.atomic_write(tmp_path / "x.json") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert atomic_files.read_json(tmp_path / "x.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.slow
def test_file_modes_follow_the_umask_which_is_never_set(tmp_path: Path) -> None:
    """The umask belongs to the process: setting it would change the modes of files of other threads."""
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


def test_concurrent_attempts_get_different_numbers(tmp_path: Path) -> None:
    run = RunStore(tmp_path).run("00000000-x")
    numbers = run_concurrently(lambda _: run.new_attempt().number)
    assert sorted(map(int, map(str, numbers))) == list(range(1, 17))
    (run.folder / "attempts" / ".nfs0001").touch()  # as file systems leave them
    assert [attempt.number for attempt in run.attempts()] == list(range(1, 17))


def test_an_attempt_ends_whatever_its_record_of_the_start_holds(tmp_path: Path) -> None:
    attempt = RunStore(tmp_path).run("00000000-x").new_attempt()
    attempt.start(restarts=None)
    assert attempt.end(FAILED)


def test_first_outcome_of_an_attempt_is_kept(tmp_path: Path) -> None:
    attempt = RunStore(tmp_path).run("00000000-x").new_attempt()
    assert attempt.end(CANCELLED, "by hand")
    assert not attempt.end(FINISHED)
    assert attempt.outcome is not None
    assert attempt.outcome.state == CANCELLED


@pytest.mark.slow
def test_frozen_config_round_trips_through_yaml(tmp_path: Path) -> None:
    run = create_run(RunStore(tmp_path), "seed=7")
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["seed"] == 7
    assert run.config().seed == 7
    assert run.config().recipe == compose(["dataset=digits"])[0].recipe


@pytest.mark.slow
def test_run_is_found_by_a_unique_prefix_of_id_or_label(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    first, second = create_run(store, "model=resnet18"), create_run(store, "model=resnet18", "seed=1")
    other = create_run(store, "model=resnet50")
    assert store.find(first.id).id == first.id
    assert store.find(first.id[:6]).id == first.id
    assert store.find("resnet50").id == other.id
    with pytest.raises(UserError, match=f"{second.id}|{first.id}"):
        store.find("resnet18")
    with pytest.raises(UserError, match="no run nowhere"):
        store.find("nowhere")


@pytest.mark.slow
def test_run_that_is_being_submitted_is_not_submitted_again(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    plan = make_plan(compose(["dataset=digits", f"workspace={tmp_path}"]), lambda _: None)

    def actions() -> list[tuple[str, str]]:
        state_of = states([store.run(name) for job in plan for name in (job.run_id, *job.needs)])
        return [(job.run_id, action) for job, action, _ in plan_actions(plan, store, state_of)]

    (job,) = plan
    assert actions() == [(job.run_id, "submitted")]
    run = create_run(store)
    assert actions() == [(run.id, "active")]
    os.utime(run.folder, (1, 1))  # the submission was interrupted
    assert actions() == [(run.id, "submitted")]


@pytest.mark.slow
def test_states_without_an_outcome(tmp_path: Path) -> None:
    run = create_run(RunStore(tmp_path))
    assert state(run).name == QUEUED  # the folder exists, and another process may be submitting it
    with pytest.raises(UserError, match="is being submitted: try again in a moment"):
        cancel_run(run)
    os.utime(run.folder, (1, 1))
    assert (state(run).name, "never submitted" in state(run).reason) == (FAILED, True)
    assert not state(RunStore(tmp_path).run("00000000-absent")).active
    attempt = run.new_attempt()
    assert state(run).name == QUEUED  # it may be submitted in a moment
    os.utime(attempt.folder, (1, 1))
    assert (state(run).name, "interrupted" in state(run).reason) == (FAILED, True)
    attempt.submit("local", host=socket.gethostname())
    assert state(run).name == QUEUED
    local_queue.record_process(attempt)
    assert state(run).name == RUNNING
    process = json.loads((attempt.folder / "process.json").read_text())
    atomic_files.write_json(attempt.folder / "process.json", {**process, "born": 1.0, "ticks": 1})
    assert (state(run).name, "without an outcome" in state(run).reason) == (FAILED, True)
    attempt.end(FINISHED, result={"top1": 0.5})
    assert state(run).name == FINISHED
    assert run.new_attempt().number == 2
    assert state(run).name == QUEUED


@pytest.mark.slow
def test_attempt_of_another_running_process_is_not_started_again(tmp_path: Path) -> None:
    run = create_run(RunStore(tmp_path))
    attempt = run.new_attempt()
    attempt.start(**local_queue.process_identity(os.getpid()))
    child = [sys.executable, "-m", "hpc_imagenet.launch.tasks.task", str(run.folder), "1"]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"another process (pid {os.getpid()}) already runs this attempt" in done.stderr
    assert attempt.started["pid"] == os.getpid()
    assert attempt.outcome is None


@pytest.mark.slow
def test_stage_that_meets_a_file_of_another_user_ends_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = create_run(RunStore(tmp_path / "workspace"), "+stage=download"), tmp_path / "data.tar"
    attempt, owner = run.new_attempt(), pwd.getpwuid(os.geteuid()).pw_name
    file.touch()
    error = PermissionError(errno.EACCES, "Permission denied", str(file))
    monkeypatch.setattr(download, "run", mock.Mock(side_effect=error))
    uid = file.stat().st_uid + 1
    other = {**vars(os), "access": lambda *_, **__: False, "geteuid": lambda: uid}
    monkeypatch.setattr(access, "os", SimpleNamespace(**other))
    with pytest.raises(PermissionError):
        task.run_task(run.folder, attempt.number)
    assert attempt.outcome is not None
    assert attempt.outcome.reason == (
        f"{file}: permission denied; it is owned by {owner}: have {owner} grant you access"
    )


@pytest.mark.slow
def test_job_of_another_host_is_as_last_recorded_and_cannot_be_cancelled(tmp_path: Path) -> None:
    run = create_run(RunStore(tmp_path))
    attempt = run.new_attempt()
    attempt.submit("local", host="elsewhere")
    assert state(run).name == QUEUED
    attempt.start()
    assert (state(run).name, "elsewhere" in state(run).reason) == (RUNNING, True)
    with pytest.raises(UserError, match="runs on elsewhere: cancel it there"):
        cancel_run(run)
    assert attempt.outcome is None  # the job keeps running and writes its own outcome
    queued = run.new_attempt()
    queued.submit("local", host="elsewhere")
    cancel_run(run)
    assert queued.outcome


@pytest.mark.slow
def test_follow_logs_waits_for_the_rest_of_a_multibyte_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(RunStore(tmp_path))
    attempt = run.new_attempt()
    attempt.submit("local", host="elsewhere")
    log, written = attempt.folder / "1_0_log.out", "größer\n".encode()
    log.write_bytes(written[:3])

    def write_rest(_: float) -> None:
        log.write_bytes(written)
        attempt.end(FINISHED)

    monkeypatch.setattr(logs.time, "sleep", write_rest)
    logs.show_logs(run, follow=True)
    assert capsys.readouterr().out == "größer\n"


@pytest.mark.parametrize(
    ("visible", "devices", "expected"),
    [
        (None, (), []),
        (None, (3,), ["0"]),  # a container with only this device
        (None, (0, 1, 10), ["0", "1", "2"]),
        ("2,0", (), ["2", "0"]),
        ("GPU-1a2b, MIG-3c", (0,), ["GPU-1a2b", "MIG-3c"]),
        ("", (0,), []),
        ("1,-1,2", (0,), ["1"]),
        ("NoDevFiles", (0,), []),
    ],
)
def test_available_gpus_are_those_visible_to_cuda(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    devices: tuple[int, ...],
    expected: list[str],
) -> None:
    for name in (*(f"nvidia{number}" for number in devices), "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.available_gpus(tmp_path) == expected


def test_concurrent_checks_for_a_worker_do_not_see_each_other(tmp_path: Path) -> None:
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


def test_worker_is_found_on_a_file_system_without_flock(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.folder.mkdir()
    lock = local_queue.make_queue_folder(store) / "worker.lock"
    no_flock = OSError(errno.ENOSYS, "Function not implemented")
    with mock.patch.object(fcntl, "flock", side_effect=no_flock), FileLock(lock):
        assert not local_queue.is_worker_alive(store)  # it was killed and left the file
        atomic_files.write_json(lock.with_name("worker.json"), local_queue.process_identity())
        assert local_queue.is_worker_alive(store)
    lock.unlink(missing_ok=True)
    assert not local_queue.is_worker_alive(store)


def test_progress_is_throttled_but_the_last_step_is_written(tmp_path: Path) -> None:
    progress = Progress(Run(tmp_path), every=3600)
    for done in range(11):
        progress(done, 10, "images", "note")
    written = atomic_files.read_json(tmp_path / "progress.json")
    assert written is not None
    assert (written["done"], written["total"], written["unit"]) == (10, 10, "images")
    assert written["rate"] > 0


@pytest.mark.slow
def test_job_rows_and_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore(tmp_path)
    for seed, top1 in enumerate((0.5, None, 0.9)):
        attempt = create_run(store, f"seed={seed}").new_attempt()
        attempt.submit("local", host=socket.gethostname())
        attempt.start()
        if top1 is not None:
            attempt.end(FINISHED, result={"top1": top1, "images_per_second": 10.0, "seconds": 75.0})
    rows = jobs_table.job_rows(store.all())
    assert [row["top1"] for row in rows] == [0.5, None, 0.9]
    assert {"run", "stage", "model", "state", "top1", "dir"} <= rows[0].keys()
    old = store.all()[0].folder / "config.yaml"  # written by a version with other settings
    old.write_text(old.read_text().replace("recipe:\n", "recipe:\n  gone: 1\n"))
    board = leaderboard.leaderboard_rows(store)
    assert [row["top1"] for row in board] == [0.9, 0.5, None]
    assert [row["seed"] for row in board] == [2, 0, 1]
    lines = leaderboard.leaderboard_lines([{**row, "dir": "/a/[b]/c"} for row in board])
    terminal_text.print_lines(lines, jobs_table.terminal())
    shown = capsys.readouterr().out
    assert "90.00" in shown
    assert shown.count("/a/[b]/c") == 3
    assert "1:15" in shown


@pytest.mark.slow
def test_thousand_runs_are_listed_with_one_scan_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path)
    first = create_run(store)
    attempt = first.new_attempt()
    attempt.end(FINISHED, result={"top1": 0.5})
    for number in range(999):
        folder = store.folder / f"{number:08x}-resnet18"
        (folder / "attempts" / "1").mkdir(parents=True)
        for name in ("run.json", "attempts/1/outcome.json"):
            (folder / name).hardlink_to(first.folder / name)
    scanned: list[Path] = []

    def recorded(real: Callable[[Path], object]) -> Callable[[Path], object]:
        return lambda path: scanned.append(Path(path)) or real(path)

    monkeypatch.setattr(os, "listdir", recorded(os.listdir))
    monkeypatch.setattr(os, "scandir", recorded(os.scandir))
    assert len(jobs_table.job_rows(store.all())) == 1000
    assert scanned.count(store.folder) == 1
