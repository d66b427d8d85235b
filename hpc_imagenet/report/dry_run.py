"""Dry run: print all jobs of a plan without submitting them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpc_imagenet.launch.sbatch import ArrayTask, group_into_arrays, sbatch_script, test_only
from hpc_imagenet.launch.submission import plan_actions
from hpc_imagenet.runs.plan import Job
from hpc_imagenet.runs.store import RunStore

_ACTION_LABELS = {
    "submitted": "would be submitted",
    "finished": "already finished",
    "active": "already running",
}


def print_dry_run(plan: Sequence[Job], store: RunStore, executor: str) -> None:
    """Print each job of a plan: its run, dependencies and command; on Slurm also the sbatch scripts."""
    tasks = []
    for job, action, needs in plan_actions(plan, store):
        run = store.run(job.run_id)
        print(f"\n{job.run_id} {_ACTION_LABELS[action]}\n  folder   {run.folder}")
        if action != "submitted":
            continue
        number = run.attempt.number + 1 if run.attempt else 1
        if needs:
            print(f"  after    {' '.join(needs)}")
        print(f"  command  {sys.executable} -u -m hpc_imagenet.launch.task {run.folder} {number}")
        tasks.append(ArrayTask(job.run_id, job.stage, job.label, job.cluster, tuple(needs)))
    for array in group_into_arrays(tasks) if executor == "slurm" else ():
        print(f"\nsbatch script of {' '.join(task.run_id for task in array)}:")
        run = store.run(array[0].run_id)
        number = run.attempt.number + 1 if run.attempt else 1
        script = sbatch_script(array, run.folder / "attempts" / str(number))
        print("  " + script.strip().replace("\n", "\n  "))
        print(f"sbatch --test-only: {test_only(script)}")
    print("\nnothing was submitted (dry_run=true)")
