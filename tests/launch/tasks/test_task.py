"""The outcome that a task writes, and when it writes none."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_runs import create_run

from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch.tasks import task
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.stages.work import download


@pytest.mark.slow
@pytest.mark.parametrize("error", [FileNotFoundError(2, "no such file", "x"), OSError(28, "full", "x")])
def test_failure_of_an_old_copy_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    run = create_run(RunStore(tmp_path), "+stage=download")
    attempt = run.new_attempt()

    def fail_after_a_restart(*_: object) -> None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        lease.acquire(run.folder, attempt.number)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        raise error

    monkeypatch.setattr(download, "run", fail_after_a_restart)
    with pytest.raises((OSError, SystemExit)):
        task.run_task(run.folder, attempt.number)
    assert attempt.outcome is None
    assert attempt.end(FINISHED)


def test_start_records_what_earlier_starts_have_done(tmp_path: Path) -> None:
    run = RunStore(tmp_path).create(
        "0-x", {"cluster": {"executor": "local"}, "stage": {"name": "download"}}, {}
    )
    attempt = run.new_attempt()
    task._start_attempt(run, attempt)
    assert "done" not in attempt.started
    write_json(run.folder / "progress.json", {"done": 7, "total": 9})
    task._start_attempt(run, run.new_attempt())
    assert run.attempt
    assert run.attempt.started["done"] == 7
