"""`cancel` of many jobs: one scancel for all that Slurm accepts, and an error for each that it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_slurm import queue_row, write_command

from hpc_imagenet.cli.main import main
from hpc_imagenet.launch.slurm_jobs import slurm_executor
from hpc_imagenet.runs.attempt import Attempt
from hpc_imagenet.runs.store import Run, RunStore

# Job 12_1 cannot be cancelled, and no job 12_2 is known.
REFUSING = """
echo "$@" >> $here/cancelled
code=0
for job in "$@"; do
  case $job in
    12_1) echo "scancel: error: Kill job error on job id 12_1: Access/permission denied" >&2; code=1 ;;
    12_2) echo "scancel: error: Kill job error on job id 12_2: Invalid job id specified" >&2; code=1 ;;
  esac
done
exit $code
"""


@pytest.fixture
def store(commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.setenv("HPC_IMAGENET_WORKSPACE", str(tmp_path))
    return RunStore(tmp_path)


def submitted(store: RunStore, commands: Path, jobs: list[str]) -> dict[str, Run]:
    """Return the run of each job, all of them queued."""
    runs: dict[str, Run] = {}
    for number, job in enumerate(jobs):
        config = {"cluster": {"executor": "slurm"}}
        run = store.create(f"{number}-download-x", config, {"stage": "download", "label": "download-x"})
        attempt = run.new_attempt()
        attempt.submit("slurm", job_id=job)
        runs[job] = run
    (commands / "queue").write_text("".join(f"{queue_row(job, 'PENDING')}\n" for job in jobs))
    return runs


def cancel(*words: str) -> object:
    """Return the exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        main(["cancel", *words])
    return ended.value.code


def scancels(commands: Path) -> list[str]:
    return (commands / "cancelled").read_text().splitlines()


def newest(run: Run) -> Attempt:
    assert run.attempt
    return run.attempt


def test_many_jobs_are_cancelled_with_few_commands(
    store: RunStore, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_executor, "_JOBS_PER_COMMAND", 3)
    runs = submitted(store, commands, [f"12_{number}" for number in range(7)])
    newest(runs["12_6"]).end("finished")
    assert cancel("--stage", "download") == 0
    assert sorted(len(line.split()) for line in scancels(commands)) == [3, 3]
    assert sorted(" ".join(scancels(commands)).split()) == [f"12_{number}" for number in range(6)]
    states = {newest(run).outcome.state for run in runs.values()}  # type: ignore[union-attr]
    assert states == {"cancelled", "finished"}


def test_refused_job_is_named_and_the_others_are_cancelled(
    store: RunStore, commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_command(commands, "scancel", REFUSING)
    runs = submitted(store, commands, ["12_0", "12_1", "12_2"])
    assert cancel("--stage", "download") == 2
    assert "scancel 12_1: scancel: error: Kill job error" in capsys.readouterr().err
    assert {job: newest(run).outcome is not None for job, run in runs.items()} == {
        "12_0": True,
        "12_1": False,
        "12_2": True,
    }


def test_job_that_has_just_ended_does_not_count_as_refused(store: RunStore, commands: Path) -> None:
    write_command(commands, "scancel", REFUSING)
    submitted(store, commands, ["12_0", "12_2"])
    assert cancel("--stage", "download") == 0
    assert scancels(commands) == ["12_0 12_2"]


def test_shared_job_and_damaged_config_are_left_to_single_requests(
    store: RunStore, commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = submitted(store, commands, ["12", "13", "14", "15"])
    newest(runs["12"]).submit("slurm", job_id="12", shares_with=[runs["13"].id])
    (runs["14"].folder / "config.yaml").write_text("[")
    assert cancel(*(run.id for run in runs.values())) == 2
    assert "missing or damaged" in capsys.readouterr().err
    assert "13 15" in scancels(commands)
    assert newest(runs["12"]).outcome
    assert newest(runs["14"]).outcome is None
