"""The outcome that a task writes, and when it writes none."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_runs import create_run

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
