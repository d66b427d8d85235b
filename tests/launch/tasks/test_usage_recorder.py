"""What a task records about itself, and what its attempt has used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Cli, eventually
from recorded_runs import create_run

from hpc_imagenet.cluster import gpus
from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.cluster.gpu_meter import GpuMeter, open_meter
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch.tasks.task import run_task
from hpc_imagenet.launch.tasks.usage_recorder import UsageRecorder, write_intervals
from hpc_imagenet.runs.attempt import Attempt
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.runs.usage_records import read_usage, usage_path
from hpc_imagenet.stages import STAGES


class Nvml:
    """A replacement of the module pynvml: GPUs with counter (mJ), power (mW) and use (%)."""

    class NVMLError(Exception):
        pass

    def __init__(self, counters: bool = True) -> None:
        self.counters, self.counter, self.power, self.use = counters, 5_000.0, 100_000, 50

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise self.NVMLError
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        return int(name.rpartition("-")[2])

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return b"GPU-%d" % handle

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> float:
        if not self.counters:
            raise self.NVMLError
        return self.counter

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self.power

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=self.use)


def attempt_of(folder: Path) -> Attempt:
    attempt = Attempt(folder / "attempts" / "1")
    attempt.folder.mkdir(parents=True)
    return attempt


def test_tasks_of_a_job_write_at_most_ten_files_a_second_together() -> None:
    assert list(islice(write_intervals(1), 8)) == [1, 2, 4, 8, 16, 32, 60, 60]
    for tasks in (8, 600, 8000):
        assert all(tasks / every <= 10 for every in islice(write_intervals(tasks), 20))
    assert next(write_intervals(8000)) == 800


def test_energy_is_the_difference_of_the_counter() -> None:
    nvml = Nvml()
    meter = GpuMeter(nvml, ["0", "GPU-1", "7"], now=100.0)
    nvml.counter, nvml.use = 25_000.0, 100
    meter.sample(104.0)
    nvml.use = 0
    meter.sample(108.0)
    expected = {"seconds": 8, "joules": 20, "use": 0.5}
    assert meter.totals() == {"GPU-0": expected, "GPU-1": expected}


def test_without_a_counter_power_is_integrated() -> None:
    nvml = Nvml(counters=False)
    meter = GpuMeter(nvml, ["0"], now=0.0)
    nvml.power = 300_000
    meter.sample(10.0)
    assert meter.totals()["GPU-0"]["joules"] == pytest.approx(2000)


def test_a_counter_that_jumps_back_is_not_subtracted() -> None:
    nvml = Nvml()
    meter = GpuMeter(nvml, ["0"], now=0.0)
    nvml.counter = 10.0  # the driver was loaded again
    meter.sample(10.0)
    assert meter.totals()["GPU-0"]["joules"] == pytest.approx(1000)


def test_nothing_is_measured_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert open_meter(0.0) is None


def test_a_task_records_cpu_time_memory_and_energy(tmp_path: Path) -> None:
    attempt, nvml = attempt_of(tmp_path), Nvml()
    with UsageRecorder(attempt, DistEnv(), lambda now: GpuMeter(nvml, ["0"], now)):
        nvml.counter += 3_600_000
        sum(range(3_000_000))
    usage = read_usage(attempt)
    assert usage.joules == pytest.approx(3600)
    assert usage.cpu_seconds
    assert usage.available_cpu_seconds
    assert usage.memory_bytes
    assert usage.memory_bytes > 10 * 2**20
    assert (usage.gpu_use, usage.gpus) == (0.5, 1)


def test_a_stage_that_fails_leaves_its_record(tmp_path: Path) -> None:
    attempt = attempt_of(tmp_path)
    with pytest.raises(ValueError, match="broken"), UsageRecorder(attempt, DistEnv(), lambda _: None):
        raise ValueError("broken")
    assert read_usage(attempt).cpu_seconds


@pytest.mark.slow
def test_a_task_that_is_killed_leaves_its_last_record(tmp_path: Path) -> None:
    attempt = attempt_of(tmp_path)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from hpc_imagenet.cluster.dist_env import DistEnv\n"
        "from hpc_imagenet.launch.tasks.usage_recorder import UsageRecorder\n"
        "from hpc_imagenet.runs.attempt import Attempt\n"
        "with UsageRecorder(Attempt(Path(sys.argv[1])), DistEnv(rank=3), lambda _: None): time.sleep(600)"
    )
    task = subprocess.Popen([sys.executable, "-c", code, str(attempt.folder)])
    try:
        eventually(lambda: read_usage(attempt).cpu_seconds is not None)
    finally:
        task.kill()
        task.wait()
    assert usage_path(attempt, 0, 3).exists()


def test_a_deleted_folder_fails_no_stage(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "gone" / "1")
    with UsageRecorder(attempt, DistEnv(), lambda _: None):
        pass
    assert read_usage(attempt).cpu_seconds is None


def record(attempt: Attempt, restarts: int, rank: int, host: str, **gpus: float) -> None:
    path = usage_path(attempt, restarts, rank)
    path.parent.mkdir(exist_ok=True)
    measured = {uuid: {"seconds": 10, "joules": joules, "use": 0.5} for uuid, joules in gpus.items()}
    values = {"seconds": 10, "cpus": 2, "cpu_seconds": 10, "memory_bytes": 100, "gpus": measured}
    write_json(path, {"restarts": restarts, "rank": rank, "host": host, **values})


def test_starts_and_nodes_add_up_and_a_gpu_counts_once(tmp_path: Path) -> None:
    attempt = attempt_of(tmp_path)
    for restarts in (0, 1):
        for rank, host in enumerate(("n1", "n1", "n2")):
            record(attempt, restarts, rank, host, a=50, b=70)  # each rank sees both GPUs of its node
    usage = read_usage(attempt)
    assert usage.joules == 2 * 2 * 120
    assert usage.cpu_seconds == 60
    assert usage.available_cpu_seconds == 120
    assert usage.cpus == 6  # of one start
    assert usage.memory_bytes == 300  # of the tasks of one start, as of what the job was given
    assert (usage.gpu_use, usage.gpus) == (0.5, 4)


def test_gpus_of_a_job_that_goes_on_elsewhere_are_those_of_a_start(tmp_path: Path) -> None:
    attempt = attempt_of(tmp_path)
    record(attempt, 0, 0, "n1", a=50)
    record(attempt, 1, 0, "n2", b=70, c=70)
    usage = read_usage(attempt)
    assert (usage.joules, usage.gpus) == (190, 2)


@pytest.mark.parametrize("content", ["{", "[]", '{"restarts": 0, "seconds": "x"}', ""])
def test_damaged_records_are_left_out(tmp_path: Path, content: str) -> None:
    attempt = attempt_of(tmp_path)
    record(attempt, 0, 0, "n1", a=1)
    usage_path(attempt, 0, 1).write_text(content)
    assert read_usage(attempt).joules == 1


@pytest.mark.slow
def test_a_job_of_the_command_line_shows_what_it_used(cli: Cli) -> None:
    cli("+stage=download", "dataset=digits", "cluster=foreground")
    (run,) = cli.runs()
    (found,) = json.loads(cli("show", run, "--json").stdout)["attempts"]
    used = found["resources"]
    assert used["cpu_efficiency"] > 0
    assert used["used_memory_bytes"] > 10 * 2**20
    assert (used["kwh"], found["diagnosis"]) == (None, None)
    shown = cli("show", run).stdout
    assert "energy unknown" in shown
    assert used["cpus"] == int(used["cpus"]) >= 1


NVML = """
import time
from types import SimpleNamespace

class NVMLError(Exception):
    pass

nvmlInit = lambda: None
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetUUID = lambda handle: f"GPU-{handle}"
nvmlDeviceGetTotalEnergyConsumption = lambda handle: 3.6e9 * time.time()  # mJ
nvmlDeviceGetPowerUsage = lambda handle: 3.6e9
nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=75)
nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=7)
"""


@pytest.mark.slow
def test_a_job_of_the_command_line_shows_the_energy_that_nvml_reports(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/pynvml.py").write_text(NVML)
    cli.env |= {
        "PYTHONPATH": os.pathsep.join([f"{tmp_path}/modules", *sys.path]),
        "CUDA_VISIBLE_DEVICES": "0",
    }
    cli("+stage=download", "dataset=digits", "cluster=foreground")
    (run,) = cli.runs()
    (found,) = json.loads(cli("show", run, "--json").stdout)["attempts"]
    record = json.loads(next((cli.workspace / "runs" / run).rglob("usage/*.json")).read_text())
    assert found["resources"]["kwh"] == record["gpus"]["GPU-0"]["joules"] / 3.6e6 > 0
    assert found["resources"]["energy_of"] == "GPUs"
    assert "GPU 75% of 1 GPU ·" in " ".join(cli("show", run).stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "environment", "measured"),
    [
        (["+stage=train"], {}, 1),  # in the foreground: the others may have other jobs
        (["+stage=train"], {"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        (["+stage=train", "cluster.gpus_per_node=0"], {}, 0),
        (["+stage=download"], {"SLURM_JOB_ID": "7"}, 0),  # on a node that shows all GPUs to every job
        (["+stage=download", "cluster.gpus_per_node=1"], {}, 1),
        (["+stage=session"], {"SLURM_JOB_ID": "7"}, 0),
        (["+stage=session", "session.gpus=2"], {"SLURM_JOB_ID": "7"}, 2),
    ],
)
def test_energy_is_that_of_the_gpus_that_the_job_uses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    environment: dict[str, str],
    measured: int,
) -> None:
    for number in range(2):
        (tmp_path / f"nvidia{number}").touch()
    monkeypatch.setattr(gpus, "available_gpus", partial(gpus.available_gpus, tmp_path))
    nvml = Nvml()
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    for name in ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = create_run(RunStore(tmp_path), "cluster=foreground", *words)
    attempt = run.new_attempt()
    monkeypatch.setattr(type(STAGES[run.info["stage"]]), "run", lambda *_: {})
    run_task(run.folder, attempt.number)
    assert read_usage(attempt).gpus == measured


@pytest.mark.slow
def test_an_attempt_without_records_is_unknown(cli: Cli) -> None:
    run = create_run(RunStore(cli.workspace), "+stage=download")
    attempt = run.new_attempt()
    attempt.submit("local", host="elsewhere")
    attempt.start()
    attempt.end("failed", "MemoryError: no page-locked memory")
    shown = cli("show", run.id).stdout
    assert "CPU unknown" in shown
    assert "memory unknown" in shown
    assert "diagnosis out of host memory" in " ".join(shown.split())


def test_the_functions_that_are_called_are_those_of_nvidia_ml_py() -> None:
    pynvml = pytest.importorskip("pynvml")
    names = [name for name in vars(Nvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) == 7
    assert [name for name in (*names, "nvmlInit") if not hasattr(pynvml, name)] == []
    assert {"gpu"} <= {name for name, _ in pynvml.c_nvmlUtilization_t._fields_}
