"""What would be submitted, in full, and nothing written."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpc_imagenet import check
from hpc_imagenet.plan import Job
from hpc_imagenet.runs import Record
from hpc_imagenet.states import states


def describe(plan: Sequence[Job], record: Record, executor: str) -> None:
    """Print every job of a plan: its run, what it waits for, its command and, on Slurm, its script."""
    told = states(record.run(run) for run in {name for job in plan for name in (job.run, *job.needs)})
    planned = {job.run for job in plan}
    for job in plan:
        run, was = record.run(job.run), told[job.run]
        if was.active:
            verdict = f"is {was.name} already"
        elif was.finished and check.stands(job):
            verdict = "is finished already"
        else:
            verdict = "would be submitted"
        print(f"\n{job.run} {verdict}")
        print(f"  folder   {run.folder}")
        if needs := [need for need in job.needs if need in planned or told[need].active]:
            print(f"  after    {' '.join(needs)}")
        if verdict != "would be submitted":
            continue
        number = run.attempt.number + 1 if run.attempt else 1
        print(f"  command  {sys.executable} -u -m hpc_imagenet.job {run.folder} {number}")
        if executor == "slurm":
            from hpc_imagenet.submit import script

            print("  script   " + script(job, record).strip().replace("\n", "\n           "))
    print("\nnothing was submitted (dry_run=true)")
