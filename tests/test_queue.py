"""This machine's queue, with jobs that wait at a gate: downloads from a server that does not answer yet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from door import Door, Gate, eventually

from hpc_imagenet.launch import local_queue
from hpc_imagenet.launch.local_worker import Worker
from hpc_imagenet.runs.store import RunStore

pytestmark = pytest.mark.slow

WAITS = ("cluster=local", "download.retries=0", "download.timeout=120")
DOWNLOAD = ("+stage=download", "dataset=ilsvrc", *WAITS)


def send(door: Door, url: str, *names: str, settings: tuple[str, ...] = ()) -> None:
    """Send one waiting download a name, in that order."""
    sources = [f"dataset.source={url}/${{dataset.name}}", f"dataset.name={','.join(names)}"]
    door("-m", *DOWNLOAD, *sources, *settings)


def test_one_at_a_time_in_order_and_the_rest_is_queued(door: Door, gate: tuple[Gate, str]) -> None:
    held, url = gate
    send(door, url, "c", "a", "b")
    eventually(lambda: held.waiting == ["c"])
    door.until("running", "queued", "queued")
    time.sleep(1)  # a second job would have come by now
    assert held.waiting == ["c"]
    held.open.set()
    rows = door.until("failed", "failed", "failed")
    assert held.waiting == ["c", "a", "b"]
    assert all("404" in row["reason"] for row in rows)


def test_as_many_at_a_time_as_asked(door: Door, gate: tuple[Gate, str]) -> None:
    held, url = gate
    send(door, url, "a", "b", "c", settings=("cluster.parallel=2",))
    eventually(lambda: len(held.waiting) == 2)
    assert sorted(door.states()) == ["queued", "running", "running"]


def test_nobody_overtakes_who_waits_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setenv(
        local_queue.CPUS_VARIABLE, ""
    )  # a worker sets it for what it starts, here for all later tests
    store = RunStore(tmp_path)
    attempts = []
    for name, gpus in (("0-first", 1), ("1-large", 2), ("2-small", 1)):
        cluster = {"executor": "local", "parallel": 3, "gpus_per_node": gpus}
        config = {"cluster": cluster, "stage": {"name": "train"}}
        run = store.create(name, config, {"stage": "train", "needs": []})
        attempts.append((run, run.new_attempt()))
    local_queue.enqueue(store, attempts)
    (_, first), (_, large), (_, small) = attempts
    local_queue.record_process(first, gpus=["GPU-a"])
    Worker(store).step()
    assert not local_queue.process_record(large)
    assert not local_queue.process_record(small)


def test_a_gpu_is_handed_out_by_the_name_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setenv(
        local_queue.CPUS_VARIABLE, ""
    )  # a worker sets it for what it starts, here for all later tests
    store = RunStore(tmp_path)
    config = {
        "cluster": {"executor": "local", "setup": [f"env > {tmp_path}/env"]},
        "stage": {"name": "train"},
    }
    run = store.create("0-x", config, {"stage": "train", "needs": []})
    attempt = run.new_attempt()
    local_queue.enqueue(store, [(run, attempt)])
    worker = Worker(store)
    worker.step()
    eventually(lambda: not worker.step())
    assert local_queue.process_record(attempt)["gpus"] == ["GPU-a"]
    assert "CUDA_VISIBLE_DEVICES=GPU-a\n" in (tmp_path / "env").read_text()


def test_the_terminal_may_close(door: Door, gate: tuple[Gate, str]) -> None:
    held, url = gate
    command = [sys.executable, "-m", "hpc_imagenet", *DOWNLOAD, "dataset.name=a", f"dataset.source={url}/a"]
    terminal = subprocess.Popen(
        ["sh", "-c", f"{' '.join(command)}; sleep 60"], env=door.env, cwd=door.cwd, start_new_session=True
    )
    eventually(lambda: held.waiting == ["a"])
    os.killpg(terminal.pid, signal.SIGHUP)
    terminal.wait()
    time.sleep(0.5)
    assert door.states() == ["running"]


def test_the_same_asked_twice_is_under_way_already(door: Door, gate: tuple[Gate, str]) -> None:
    held, url = gate
    send(door, url, "a", "b")
    eventually(lambda: held.waiting == ["a"])
    again = door("-m", *DOWNLOAD, f"dataset.source={url}/${{dataset.name}}", "dataset.name=a,b")
    assert again.stdout.count("already running") == 2
    assert [row["attempt"] for row in door.jobs()] == [1, 1]


def test_cancel_a_queued_and_a_running_job(door: Door, gate: tuple[Gate, str]) -> None:
    held, url = gate
    send(door, url, "a", "b", "c")
    eventually(lambda: held.waiting == ["a"])
    door("cancel", "download-b", "download-a")
    eventually(lambda: held.waiting == ["a", "c"])
    assert door.states() == ["cancelled", "cancelled", "running"]
    assert door.processes("download-a") == []
    assert "was cancelled already" in door("cancel", "download-a").stdout


def test_a_killed_job_has_failed_and_retry_takes_it_up(door: Door, gate: tuple[Gate, str]) -> None:
    held, url = gate
    send(door, url, "a")
    eventually(lambda: held.waiting == ["a"])
    (attempt,) = RunStore(door.workspace).find("download-a").attempts()
    psutil.Process(attempt.started["pid"]).kill()
    (row,) = door.until("failed")
    assert "without a word" in row["reason"]
    held.waiting.clear()
    door("retry", "download-a")
    eventually(lambda: held.waiting == ["a"])
    (row,) = door.jobs()
    assert (row["state"], row["attempt"]) == ("running", 2)


def test_a_killed_worker_takes_no_job_along_and_asking_again_goes_on(
    door: Door, gate: tuple[Gate, str]
) -> None:
    held, url = gate
    send(door, url, "a", "b")
    eventually(lambda: held.waiting == ["a"])
    worker = json.loads((local_queue.queue_folder(RunStore(door.workspace)) / "worker.json").read_text())
    psutil.Process(worker["pid"]).kill()
    eventually(lambda: "nobody works on the queue" in door.jobs()[1]["reason"])
    assert door.states() == ["running", "queued"]
    send(door, url, "a", "b")
    held.open.set()
    rows = door.until("failed", "failed")
    assert held.waiting == ["a", "b"]
    assert [row["attempt"] for row in rows] == [1, 1]


def test_a_submission_that_was_cut_off_is_not_run_twice(door: Door, gate: tuple[Gate, str]) -> None:
    held, url = gate
    send(door, url, "a")
    eventually(lambda: held.waiting == ["a"])
    send(door, url, "b")
    store = RunStore(door.workspace)
    (attempt,) = store.find("download-b").attempts()
    (attempt.folder / "submitted.json").unlink()  # as if the door had been killed before it wrote that
    os.utime(attempt.folder, (1, 1))
    assert "cut off" in door.jobs()[1]["reason"]
    send(door, url, "b")
    held.open.set()
    rows = door.until("failed", "failed")
    assert "404" in rows[1]["reason"]
    first, second = store.find("download-b").attempts()
    assert first.outcome
    assert "took its place" in first.outcome.reason
    assert not first.started
    assert second.started


def test_after_a_reboot_nothing_is_called_running_and_retry_takes_all_up(
    door: Door, gate: tuple[Gate, str]
) -> None:
    held, url = gate
    send(door, url, "a", "b")
    eventually(lambda: held.waiting == ["a"])
    door.close()  # every process dies at once
    door.until("failed", "queued")
    held.waiting.clear()
    door("retry", "download-a", "download-b")
    held.open.set()
    rows = door.until("failed", "failed")
    assert sorted(held.waiting) == ["a", "b"]
    assert all("404" in row["reason"] for row in rows)


def test_what_needs_a_failed_run_is_cancelled_with_the_reason(door: Door, gate: tuple[Gate, str]) -> None:
    held, url = gate
    door("+stage=pipeline", "dataset=ilsvrc", "dataset.name=x", f"dataset.source={url}/x", *WAITS)
    eventually(lambda: held.waiting == ["x"])
    assert door.states() == ["running", "queued", "queued", "queued"]
    held.open.set()
    rows = door.until("failed", "cancelled", "cancelled", "cancelled")
    assert "needs" in rows[1]["reason"]
    assert rows[0]["run"] in rows[1]["reason"]
    # Taking up the last one takes up what it needs, too.
    assert door("retry", rows[3]["run"]).stdout.count("submitted") == 4


def test_wait_says_each_change_and_exits_with_1(door: Door, gate: tuple[Gate, str]) -> None:
    held, url = gate
    held.open.set()
    done = door(*DOWNLOAD, "dataset.name=a", f"dataset.source={url}/a", "wait=true", code=1)
    assert "failed" in done.stdout
    assert "404" in done.stdout


def test_a_pid_that_another_process_has_now_is_not_the_job(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    attempt = store.run("0-x").new_attempt()
    local_queue.record_process(attempt)
    assert local_queue.is_alive(attempt)
    note = json.loads((attempt.folder / "process.json").read_text())
    (attempt.folder / "process.json").write_text(json.dumps({**note, "born": note["born"] - 60}))
    assert not local_queue.is_alive(attempt)


def test_a_job_finds_what_a_relative_pythonpath_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its working directory is another one: its worker could not even start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["here", "", "/there", "."]))
    paths = local_queue.job_environment()["PYTHONPATH"].split(os.pathsep)
    assert paths[1:] == [f"{tmp_path}/here", "/there", str(tmp_path)]
    assert (Path(paths[0]) / "hpc_imagenet").is_dir()
