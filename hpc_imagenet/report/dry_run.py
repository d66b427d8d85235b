"""What would be submitted, in full, and nothing written."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpc_imagenet.launch.sbatch import ArrayTask, group_into_arrays, sbatch_script, test_only
from hpc_imagenet.launch.submission import plan_actions
from hpc_imagenet.runs.plan import Job
from hpc_imagenet.runs.store import RunStore

_VERDICTS = {
    "submitted": "would be submitted",
    "finished": "already finished",
    "active": "already running",
}


def print_dry_run(plan: Sequence[Job], store: RunStore, executor: str) -> None:
    """Print every job of a plan: its run, what it waits for, its command; and on Slurm each script."""
    parts = []
    for job, what, needs in plan_actions(plan, store):
        run = store.run(job.run_id)
        print(f"\n{job.run_id} {_VERDICTS[what]}\n  folder   {run.folder}")
        if what != "submitted":
            continue
        number = run.attempt.number + 1 if run.attempt else 1
        if needs:
            print(f"  after    {' '.join(needs)}")
        print(f"  command  {sys.executable} -u -m hpc_imagenet.launch.task {run.folder} {number}")
        parts.append(ArrayTask(job.run_id, job.stage, job.label, job.cluster, tuple(needs)))
    for array in group_into_arrays(parts) if executor == "slurm" else ():
        print(f"\nsbatch would get, for {' '.join(part.run_id for part in array)}:")
        run = store.run(array[0].run_id)
        text = sbatch_script(
            array, run.folder / "attempts" / str(run.attempt.number + 1 if run.attempt else 1)
        )
        print("  " + text.strip().replace("\n", "\n  "))
        print(f"sbatch --test-only: {test_only(text)}")
    print("\nnothing was submitted (dry_run=true)")
