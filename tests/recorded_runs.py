"""Run folders with the records of a job, without the job: what tables and logs are made of."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from hpc_imagenet.config.compose import compose
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.runs.store import Run, RunStore

LONG_AGO = 1_700_000_000  # s since 1970; a run that changed then is settled


def create_run(store: RunStore, *overrides: str) -> Run:
    """Create the folder of a run of the digits without submitting it."""
    (job,) = make_plan(
        compose(["dataset=digits", f"workspace={store.folder.parent}", *overrides]), lambda _: None
    )
    info = {"stage": job.stage, "label": job.label, "model": job.model, "needs": []}
    return store.create(job.run_id, job.frozen(), info)


def record_run(
    store: RunStore,
    number: int,
    state: str | None = None,
    reason: str = "",
    result: dict[str, Any] | None = None,
    stage: str = "train",
    label: str = "resnet18",
    sweeps: tuple[str, ...] = (),
    started: dict[str, Any] | None = None,
    progress: dict[str, Any] | None = None,
) -> Run:
    """Write a run with one attempt of a job on another machine; without `state` it is queued, or running."""
    info = {"stage": stage, "label": label, "model": label, "needs": [], "sweeps": list(sweeps)}
    run = store.create(f"{number:08x}-{re.sub(r'[^A-Za-z0-9_.-]', '', label)}", {}, info)
    attempt = run.new_attempt()
    attempt.submit("local", host="elsewhere")
    if started is not None or state:
        attempt.start(**(started or {}))
    if progress is not None:
        write_json(run.folder / "progress.json", progress)
    if state:
        attempt.end(state, reason, result)
    return run


def settle(run: Run) -> None:
    """Set the modification times of a run's folders to long ago, after which its records may be cached."""
    for folder in (run.folder / "attempts", run.folder):
        os.utime(folder, (LONG_AGO, LONG_AGO))


def set_times(run: Run, **ago: timedelta) -> None:
    """Set `created` in run.json, or `time` in submitted, started or outcome of the newest attempt."""
    for name, delta in ago.items():
        path = run.folder / "run.json"
        if name != "created":
            assert run.attempt
            path = run.attempt.folder / f"{name}.json"
        key = "created" if name == "created" else "time"
        change(path, **{key: (datetime.now(timezone.utc) - delta).isoformat()})


def change(path: Path, **values: Any) -> None:
    """Change values of a record."""
    write_json(path, {**json.loads(path.read_text()), **values})
