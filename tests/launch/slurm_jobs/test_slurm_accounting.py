"""sacct's lines, most of them recorded from Slurm 22.05, and what `show` makes of them."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import write_command
from recorded_runs import create_run, set_times

from hpc_imagenet.cluster import slurm_accounting
from hpc_imagenet.cluster.slurm_accounting import parse_usage
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.report.show.resources import slurm_usage
from hpc_imagenet.runs.attempt import FAILED
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.runs.usage_records import usage_path

TRES = "billing=4,cpu=4,gres/gpu=2,mem=1000M,node=2"
ENDS = "2026-11-29T13:06:04"
# Two nodes with a task each, which held 200 MiB and computed for 6 s.
JOB = f"""\
77|13|00:06.357|4|||{TRES}|{TRES}|||0|60|{ENDS}
77.batch|13|00:00.012|2|1|11164K||cpu=2,mem=500M,node=1|cpu=00:00:00,energy=0,mem=11164K|mem=11164K|0||{ENDS}
77.0|12|00:06.344|4|2|218236K||{TRES}|cpu=00:00:05,energy=0,mem=436344K|cpu=00:00:02,mem=218172K|0||{ENDS}
"""
assert len(JOB.splitlines()[0].split("|")) == len(slurm_accounting._FIELDS)


def test_usage_of_a_recorded_job() -> None:
    usage = parse_usage(JOB, ["77"])["77"]
    assert (usage.cpus, usage.gpus, usage.memory_bytes) == (4, 2, 1000 * 2**20)
    assert (usage.seconds, usage.limit_seconds, usage.ended) == (13, 3600, True)
    assert usage.used_cpu_seconds == pytest.approx(6.357)
    assert usage.available_cpu_seconds == 52
    assert usage.used_memory_bytes == 436344 * 1024
    assert (usage.joules, usage.gpu_use) == (None, None)


def test_the_starts_of_a_requeued_job_add_up() -> None:
    running = JOB.replace(ENDS, "Unknown").replace("436344K", "10K").replace("11164K", "10K")
    usage = parse_usage(JOB + running, ["77"])["77"]
    assert usage.seconds == 26
    assert usage.used_cpu_seconds == pytest.approx(2 * 6.357)
    assert usage.used_memory_bytes == 436344 * 1024
    assert not usage.ended


def test_one_step_of_an_allocation() -> None:
    usage = parse_usage(JOB, ["77.0"])["77.0"]
    assert usage.seconds == 12
    assert usage.used_cpu_seconds == pytest.approx(6.344)
    assert parse_usage(JOB, ["77.5"])["77.5"].used_cpu_seconds is None


def test_a_step_of_a_requeued_allocation_may_be_of_another_run_in_each_start() -> None:
    usage = parse_usage(JOB + JOB.replace("|0|60|", "|900|60|"), ["77.0"])["77.0"]
    assert (usage.used_cpu_seconds, usage.used_memory_bytes, usage.joules) == (None, None, None)
    assert (usage.cpus, usage.gpus, usage.limit_seconds) == (4, 2, 3600)


def test_cpu_time_that_slurm_did_not_measure_is_unknown() -> None:
    unmeasured = re.sub(r"\|00:\d\d\.\d+\|", "|00:00:00|", JOB)
    usage = parse_usage(unmeasured, ["77"])["77"]
    assert (usage.used_cpu_seconds, usage.available_cpu_seconds) == (None, None)
    usage = parse_usage(unmeasured + JOB, ["77"])["77"]  # the first start lost its node
    assert usage.used_cpu_seconds == pytest.approx(6.357)
    assert usage.available_cpu_seconds == 52


def test_energy_of_a_node_counts_once() -> None:
    lines = JOB.splitlines()
    steps = [
        f"{line.rpartition('|0||')[0]}|{energy}||{ENDS}"
        for line, energy in zip(lines[1:], (900, 2000), strict=True)
    ]
    assert parse_usage("\n".join([lines[0], *steps]), ["77"])["77"].joules == 2000  # not batch and step
    whole = lines[0].replace("|0|60|", "|2100|60|")
    assert parse_usage("\n".join([whole, *steps]), ["77"])["77"].joules == 2100
    unknown = lines[0].replace("|0|60|", "|4294967294|60|")
    assert parse_usage(unknown, ["77"])["77"].joules is None


def test_gpu_use_and_memory_without_tres() -> None:
    line = f"5.0|10|01:00:00|8|4|2G|||||0||{ENDS}"
    usage = parse_usage(f"5|10|1-00:00:01|8|||{TRES}||||0|UNLIMITED|{ENDS}\n{line}", ["5"])["5"]
    assert usage.used_memory_bytes == 4 * 2 * 2**30
    assert (usage.used_cpu_seconds, usage.limit_seconds, usage.cpus) == (86_401, None, 4)
    busy = line.replace("|||||0", "|||cpu=1|gres/gpuutil=85|0")
    assert parse_usage(f"5|10|00:01|8|||||||0|1|{ENDS}\n{busy}", ["5"])["5"].gpu_use == 0.85


@pytest.mark.parametrize("output", ["", "garbage", "77", "||||", "77|x|y|z||||||||||"])
def test_output_that_is_no_record(output: str) -> None:
    for usage in parse_usage(output, ["77", "78.0"]).values():
        assert (usage.seconds, usage.cpus, usage.joules) == (0, None, None)


def run_of_job(cli: Cli, folder: Path, lines: str) -> Run:
    """Record a failed run of job 77 in a cluster whose sacct prints these lines."""
    folder.mkdir(exist_ok=True)
    (folder / "lines").write_text(lines)
    write_command(folder, "sacct", 'echo "$@" >> $here/queries; cat $here/lines')
    cli.env["PATH"] = f"{folder}:{cli.env['PATH']}"
    settings = ("cluster=slurm", "cluster.time=60", "cluster.memory_gb=2", "cluster.gpus_per_node=2")
    run = create_run(RunStore(cli.workspace), "+stage=train", "datastore.version=1", *settings)
    attempt = run.new_attempt()
    attempt.submit("slurm", job_id="77", code={"commit": "abc"})
    attempt.start(nodes="n[1-2]")
    attempt.end(FAILED, "out of host memory: raise cluster.memory_gb")
    return run


@pytest.mark.slow
def test_show_of_a_slurm_job(cli: Cli, tmp_path: Path) -> None:
    run = run_of_job(cli, tmp_path / "bin", JOB)
    details = json.loads(cli("show", run.id, "--json").stdout)
    (found,) = details["attempts"]
    used = found["resources"]
    assert (used["cpus"], used["gpus"], used["limit_seconds"]) == (4, 2, 3600)
    assert used["cpu_efficiency"] == pytest.approx(6.357 / 52)
    assert used["used_memory_bytes"] / used["memory_bytes"] == pytest.approx(0.426, abs=0.001)
    assert (used["gpu_use"], used["kwh"], details["kwh"]) == (None, None, None)
    assert found["diagnosis"]["class"] == "host_memory"
    assert found["diagnosis"]["remedy"] == {"cluster.memory_gb": 3}
    text = " ".join(cli("show", run.id).stdout.split())
    for part in (
        f"remedy retry {run.id} sets cluster.memory_gb=3",
        "attempt 1 failed · job 77 on n[1-2]",
        "CPU 12% of 4 CPUs · memory 0.416 GiB of 0.977 GiB (43%) · GPU unknown of 2 GPUs",
    ):
        assert part in text


@pytest.mark.slow
@pytest.mark.parametrize("end", ["Unknown", ENDS])  # running, or on a cluster that measures no jobs
def test_job_that_slurm_does_not_measure_is_measured_by_its_tasks(cli: Cli, tmp_path: Path, end: str) -> None:
    # sacct adds up the CPU time of the steps that have ended, and knows no memory of the others.
    columns = [line.split("|") for line in JOB.splitlines()]
    for line in columns:
        line[2], line[5], line[8], line[9], line[-1] = "00:00:00", "", "", "", end
    run = run_of_job(cli, tmp_path / "bin", "\n".join("|".join(line) for line in columns))
    attempt = run.attempt
    assert attempt
    usage_path(attempt, 0, 0).parent.mkdir()
    for rank, host in enumerate(("n1", "n2")):
        values = {"restarts": 0, "host": host, "seconds": 13, "cpus": 2, "cpu_seconds": 10, "gpus": {}}
        write_json(usage_path(attempt, 0, rank), {**values, "memory_bytes": 400 * 2**20})
    (found,) = json.loads(cli("show", run.id, "--json").stdout)["attempts"]
    used = found["resources"]
    assert used["cpu_efficiency"] == pytest.approx(20 / 52)
    assert used["used_memory_bytes"] / used["memory_bytes"] == 0.8


@pytest.mark.slow
def test_attempts_add_up(cli: Cli, tmp_path: Path) -> None:
    run = run_of_job(cli, tmp_path / "bin", JOB.replace("|0|60|", "|3600000|60|"))
    first = run.attempt
    assert first
    set_times(run, started=timedelta(hours=3), outcome=timedelta(hours=0))
    second = run.new_attempt()
    second.submit("slurm", job_id="77", code={"commit": "abc", "difference": "/patch"})
    second.start(nodes="n3")
    second.end(FAILED, "Slurm: timeout (exit code 0:0)")
    shown = " ".join(cli("show", run.id).stdout.split())
    assert "total 6.00 GPU-hours · 2 kWh" in shown
    assert "attempt 2 failed · job 77 on n3" in shown
    assert "code abc · changed by /patch" in shown
    details = json.loads(cli("show", run.id, "--json").stdout)
    assert [each["diagnosis"]["class"] for each in details["attempts"]] == ["host_memory", "time_limit"]
    assert (details["kwh"], round(details["gpu_hours"], 2)) == (2, 6)


@pytest.mark.slow
def test_answers_about_ended_jobs_are_kept(cli: Cli, tmp_path: Path) -> None:
    run = run_of_job(cli, tmp_path / "bin", JOB)
    first = cli("show", run.id, "--json").stdout
    (tmp_path / "bin" / "lines").write_text("")  # the cluster has deleted its records
    assert json.loads(cli("show", run.id, "--json").stdout)["attempts"] == json.loads(first)["attempts"]
    assert len((tmp_path / "bin" / "queries").read_text().splitlines()) == 1
    assert run.attempt
    (run.attempt.folder / "accounting.json").write_text("{")
    assert slurm_usage(run.attempts()) == {}


@pytest.mark.slow
def test_a_cluster_without_sacct(cli: Cli, tmp_path: Path) -> None:
    run = run_of_job(cli, tmp_path / "bin", JOB)
    (tmp_path / "bin" / "sacct").unlink()
    cli.env["PATH"] = "/usr/bin:/bin"
    (found,) = json.loads(cli("show", run.id, "--json").stdout)["attempts"]
    assert found["resources"]["cpu_efficiency"] is None
    assert found["resources"]["memory_bytes"] == 4 * 2**30 / 2  # as requested
