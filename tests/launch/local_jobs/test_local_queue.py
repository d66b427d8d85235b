"""The local queue, tested with downloads from a server (`Gate`) that answers only when the test opens it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
import pytest
from command_line import Cli, Gate, eventually
from recorded_runs import record_run, set_times

from hpc_imagenet.api import Handle
from hpc_imagenet.cluster import dist_env
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.io.ownership import UMASK
from hpc_imagenet.launch import watched_runs
from hpc_imagenet.launch.executors import start_queued
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.local_jobs.local_worker import Worker
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.runs.usage_records import usage_path

pytestmark = pytest.mark.slow

WAITING = ("cluster=local", "download.retries=0", "download.timeout=120")
DOWNLOAD = ("+stage=download", "dataset=ilsvrc", *WAITING)


def submit(cli: Cli, url: str, *names: str, settings: tuple[str, ...] = ()) -> None:
    """Submit one waiting download per dataset name, in this order."""
    sources = [f"dataset.source={url}/${{dataset.name}}", f"dataset.name={','.join(names)}"]
    cli("-m", *DOWNLOAD, *sources, *settings)


def worker_of(cli: Cli) -> psutil.Process:
    record = local_queue.queue_folder(RunStore(cli.workspace)) / "worker.json"
    return psutil.Process(json.loads(record.read_text())["pid"])


def kill_worker(cli: Cli) -> None:
    """Kill the worker while the second run is queued."""
    worker_of(cli).kill()
    eventually(lambda: "no worker is running" in cli.jobs()[1]["reason"])


def test_jobs_run_one_at_a_time_in_order(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    submit(cli, url, "c", "a", "b")
    eventually(lambda: held.waiting == ["c"])
    cli.until("running", "queued", "queued")
    time.sleep(1)  # a second job would have started by now
    assert held.waiting == ["c"]
    held.open.set()
    rows = cli.until("failed", "failed", "failed")
    assert held.waiting == ["c", "a", "b"]
    assert all("404" in row["reason"] for row in rows)


def test_cluster_parallel_limits_running_jobs(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    submit(cli, url, "a", "b", "c", settings=("cluster.parallel=2",))
    eventually(lambda: len(held.waiting) == 2)
    assert sorted(cli.states()) == ["queued", "running", "running"]


def test_job_that_waits_for_gpus_is_not_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    # A worker sets this variable for the jobs it starts; undo that for later tests.
    monkeypatch.setenv(dist_env.CPUS_VARIABLE, "")
    store = RunStore(tmp_path)
    attempts = []
    for name, gpus in (("0-first", 1), ("1-large", 2), ("2-small", 1)):
        cluster = {"executor": "local", "parallel": 3, "gpus_per_node": gpus}
        config = {"cluster": cluster, "stage": {"name": "train"}}
        run = store.create(name, config, {"stage": "train", "needs": []})
        attempts.append((run, run.new_attempt()))
    local_queue.enqueue(store, [[each] for each in attempts])
    (_, first), (_, large), (_, small) = attempts
    local_queue.record_process(first, gpus=["GPU-a"])
    Worker(store).step()
    assert not local_queue.process_record(large)
    assert not local_queue.process_record(small)


def test_a_pass_of_the_worker_reads_no_job_before_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path)
    attempts = []
    for number in range(40):
        config = {"cluster": {"executor": "local", "parallel": 1}, "stage": {"name": "train"}}
        run = store.create(f"{number:02}-x", config, {"stage": "train", "needs": []})
        attempts.append((run, run.new_attempt()))
    local_queue.enqueue(store, [[each] for each in attempts])
    local_queue.record_process(attempts[0][1])  # it runs, and is the only one that may
    worker, read = Worker(store), []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    worker.step()
    assert any(run.folder in path.parents for run, _ in attempts[2:] for path in read)
    read.clear()
    assert worker.step()
    assert not [path for run, _ in attempts[2:] for path in read if run.folder in path.parents]


def test_gpu_uuid_is_passed_as_cuda_visible_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    # A worker sets this variable for the jobs it starts; undo that for later tests.
    monkeypatch.setenv(dist_env.CPUS_VARIABLE, "")
    store = RunStore(tmp_path)
    config = {
        "cluster": {"executor": "local", "setup": [f"env > {tmp_path}/env"]},
        "stage": {"name": "train"},
    }
    run = store.create("0-x", config, {"stage": "train", "needs": []})
    attempt = run.new_attempt()
    local_queue.enqueue(store, [[(run, attempt)]])
    worker = Worker(store)
    worker.step()
    eventually(lambda: not worker.step())
    assert local_queue.process_record(attempt)["gpus"] == ["GPU-a"]
    assert "CUDA_VISIBLE_DEVICES=GPU-a\n" in (tmp_path / "env").read_text()


def test_job_survives_closing_the_terminal(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    command = [sys.executable, "-m", "hpc_imagenet", *DOWNLOAD, "dataset.name=a", f"dataset.source={url}/a"]
    terminal = subprocess.Popen(
        ["sh", "-c", f"{' '.join(command)}; sleep 60"], env=cli.env, cwd=cli.cwd, start_new_session=True
    )
    eventually(lambda: held.waiting == ["a"])
    os.killpg(terminal.pid, signal.SIGHUP)
    terminal.wait()
    time.sleep(0.5)
    assert cli.states() == ["running"]


def test_second_submission_reports_already_running(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    submit(cli, url, "a", "b")
    eventually(lambda: held.waiting == ["a"])
    second = cli("-m", *DOWNLOAD, f"dataset.source={url}/${{dataset.name}}", "dataset.name=a,b")
    assert second.stdout.count("already running") == 2
    assert [row["attempt"] for row in cli.jobs()] == [1, 1]


def test_cancel_queued_and_running_job(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    submit(cli, url, "a", "b", "c")
    eventually(lambda: held.waiting == ["a"])
    cli("cancel", "download-b", "download-a")
    eventually(lambda: held.waiting == ["a", "c"])
    assert cli.states() == ["cancelled", "cancelled", "running"]
    assert cli.processes("download-a") == []
    assert "already cancelled" in cli("cancel", "download-a").stdout


def test_killed_job_fails_and_retry_restarts_it(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    submit(cli, url, "a")
    eventually(lambda: held.waiting == ["a"])
    (attempt,) = RunStore(cli.workspace).find("download-a").attempts()
    psutil.Process(attempt.started["pid"]).kill()
    (row,) = cli.until("failed")
    assert "without an outcome" in row["reason"]
    held.waiting.clear()
    cli("retry", "download-a")
    eventually(lambda: held.waiting == ["a"])
    (row,) = cli.jobs()
    assert (row["state"], row["attempt"]) == ("running", 2)


def test_killed_worker_ends_no_job_and_resubmitting_starts_a_worker(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    submit(cli, url, "a", "b")
    eventually(lambda: held.waiting == ["a"])
    kill_worker(cli)
    assert cli.states() == ["running", "queued"]
    submit(cli, url, "a", "b")
    held.open.set()
    rows = cli.until("failed", "failed")
    assert held.waiting == ["a", "b"]
    assert [row["attempt"] for row in rows] == [1, 1]


@pytest.mark.parametrize("words", [("--stage", "download"), ("download-b",)], ids=["a selection", "a name"])
def test_retry_starts_a_worker_for_runs_that_are_queued(
    cli: Cli, gate: tuple[Gate, str], words: tuple[str, ...]
) -> None:
    held, url = gate
    submit(cli, url, "a", "b")
    eventually(lambda: held.waiting == ["a"])
    kill_worker(cli)
    cli("retry", "--dry-run", *words)
    assert "no worker is running" in cli.jobs()[1]["reason"]
    cli("retry", *words)
    held.open.set()
    cli.until("failed", "failed")
    assert held.waiting == ["a", "b"]


def test_waiting_for_a_result_in_python_starts_a_worker(
    cli: Cli, gate: tuple[Gate, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, url = gate
    submit(cli, url, "a", "b")
    eventually(lambda: held.waiting == ["a"])
    kill_worker(cli)
    held.open.set()
    monkeypatch.setattr(watched_runs, "_WORKER_INTERVAL", 0)
    with pytest.raises(UserError, match="404"):
        Handle(RunStore(cli.workspace).find("download-b").folder).result(60)


def test_a_worker_that_is_started_later_knows_the_umask_for_shared_data(
    cli: Cli, gate: tuple[Gate, str]
) -> None:
    held, url = gate
    submit(cli, url, "a", "b")
    eventually(lambda: held.waiting == ["a"])
    kill_worker(cli)
    store = RunStore(cli.workspace)
    start_queued(store, [store.find("download-b")])
    assert UMASK in worker_of(cli).environ()


def test_interrupted_submission_is_not_run_twice(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    submit(cli, url, "a")
    eventually(lambda: held.waiting == ["a"])
    submit(cli, url, "b")
    store = RunStore(cli.workspace)
    (attempt,) = store.find("download-b").attempts()
    (attempt.folder / "submitted.json").unlink()  # as if the command had been killed before writing it
    os.utime(attempt.folder, (1, 1))
    assert "interrupted" in cli.jobs()[1]["reason"]
    submit(cli, url, "b")
    held.open.set()
    rows = cli.until("failed", "failed")
    assert "404" in rows[1]["reason"]
    first, second = store.find("download-b").attempts()
    assert first.outcome
    assert "replaced by attempt 2" in first.outcome.reason
    assert not first.started
    assert second.started


def test_after_a_reboot_no_job_is_running_and_retry_restarts_all(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    submit(cli, url, "a", "b")
    eventually(lambda: held.waiting == ["a"])
    cli.close()  # every process dies at once
    cli.until("failed", "queued")
    held.waiting.clear()
    cli("retry", "download-a", "download-b")
    held.open.set()
    rows = cli.until("failed", "failed")
    assert sorted(held.waiting) == ["a", "b"]
    assert all("404" in row["reason"] for row in rows)


def test_jobs_that_need_a_failed_run_are_cancelled_with_the_reason(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    cli("+stage=pipeline", "dataset=ilsvrc", "dataset.name=x", f"dataset.source={url}/x", *WAITING)
    eventually(lambda: held.waiting == ["x"])
    assert cli.states() == ["running", "queued", "queued", "queued"]
    held.open.set()
    rows = cli.until("failed", "cancelled", "cancelled", "cancelled")
    assert "needs" in rows[1]["reason"]
    assert rows[0]["run"] in rows[1]["reason"]
    # Retrying the last run also retries the runs it needs.
    assert cli("retry", rows[3]["run"]).stdout.count("submitted") == 4


def test_wait_prints_state_changes_and_exits_with_1_on_failure(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    held.open.set()
    done = cli(*DOWNLOAD, "dataset.name=a", f"dataset.source={url}/a", "wait=true", code=1)
    assert "failed" in done.stdout
    assert "404" in done.stdout


def test_waiting_command_starts_a_worker_when_its_worker_was_killed(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    submit(cli, url, "a", "b")
    eventually(lambda: held.waiting == ["a"])
    worker = worker_of(cli)
    words = (*DOWNLOAD, "dataset.name=b", f"dataset.source={url}/b", "wait=true")
    waiting = subprocess.Popen(
        [sys.executable, "-m", "hpc_imagenet", *words],
        env=cli.env,
        cwd=cli.cwd,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert waiting.stdout
    assert any(line.startswith("queued") for line in waiting.stdout)  # it waits now
    worker.kill()
    held.open.set()
    waiting.communicate(timeout=120)
    assert waiting.returncode == 1  # the server has no such file
    assert held.waiting == ["a", "b"]


def test_reused_pid_is_not_taken_for_the_job(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    attempt = store.run("0-x").new_attempt()
    local_queue.record_process(attempt)
    assert local_queue.is_alive(attempt)
    process = json.loads((attempt.folder / "process.json").read_text())
    path = attempt.folder / "process.json"
    path.write_text(json.dumps({**process, "born": process["born"] - 60, "ticks": process["ticks"] - 6000}))
    assert not local_queue.is_alive(attempt)
    path.write_text(json.dumps({**process, "boot": "another"}))
    assert not local_queue.is_alive(attempt)
    # Where there is no /proc
    path.write_text(json.dumps({"pid": process["pid"], "born": process["born"] - 60}))
    assert not local_queue.is_alive(attempt)


def test_job_is_still_the_same_process_after_the_clock_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = RunStore(tmp_path).run("0-x").new_attempt()
    local_queue.record_process(attempt)
    born = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: born + 3600)
    assert local_queue.is_alive(attempt)


def test_relative_pythonpath_is_made_absolute_for_jobs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker's working directory is another one, where a relative path finds no package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["relative", "", "/absolute", "."]))
    paths = local_queue.job_environment()["PYTHONPATH"].split(os.pathsep)
    assert paths[1:] == [f"{tmp_path}/relative", "/absolute", str(tmp_path)]
    assert (Path(paths[0]) / "hpc_imagenet").is_dir()


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"run": 1, "attempt": "x"}', b"\xff"])
def test_damaged_entry_does_not_end_the_worker(tmp_path: Path, damaged: bytes) -> None:
    store = RunStore(tmp_path)
    queue = local_queue.queue_folder(store)
    queue.mkdir(parents=True)
    (queue / "1.entry").write_bytes(damaged)
    assert Worker(store).step() is False
    assert not list(queue.glob("*.entry"))


def test_damaged_config_fails_its_run_only(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = store.create("abc-x", {}, {"stage": "train", "model": "", "label": "x", "needs": []})
    attempt = run.new_attempt()
    attempt.submit("local")
    (run.folder / "config.yaml").write_bytes(b"a: [")
    local_queue.queue_folder(store).mkdir(parents=True)
    (local_queue.queue_folder(store) / "1.entry").write_text(json.dumps({"run": run.id, "attempt": 1}))
    assert Worker(store).step() is False
    assert attempt.outcome
    assert "config.yaml is missing or damaged: submit the run again" in attempt.outcome.reason


def test_job_of_before_a_reboot_has_ended_with_its_last_record(tmp_path: Path) -> None:
    run = record_run(RunStore(tmp_path), 1, started={"pid": 1 << 30, "born": 0})
    set_times(run, started=timedelta(hours=10))
    attempt = run.attempt
    assert attempt
    write_json(attempt.folder / "process.json", {"pid": 1 << 30, "born": 0})
    usage_path(attempt, 0, 0).parent.mkdir()
    write_json(usage_path(attempt, 0, 0), {"seconds": 3600 * 3})
    queue = local_queue.queue_folder(RunStore(tmp_path))
    queue.mkdir(parents=True)
    (queue / "1.entry").write_text(json.dumps({"run": run.id, "attempt": 1}))
    assert Worker(RunStore(tmp_path)).step() is False
    assert attempt.outcome
    assert attempt.outcome.state == "failed"
    ago = datetime.now(timezone.utc) - datetime.fromisoformat(attempt.outcome.time)
    assert round(ago / timedelta(hours=1)) == 7
