"""What would be submitted, in full, and nothing written."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpc_imagenet.plan import Job
from hpc_imagenet.runs import Record
from hpc_imagenet.sbatch import Part, arrays, script, verdict
from hpc_imagenet.submission import intend

_VERDICTS = {
    "submitted": "would be submitted",
    "finished": "is finished already",
    "active": "is under way already",
}


def describe(plan: Sequence[Job], record: Record, executor: str) -> None:
    """Print every job of a plan: its run, what it waits for, its command; and on Slurm each script."""
    parts = []
    for job, what, needs in intend(plan, record):
        run = record.run(job.run)
        print(f"\n{job.run} {_VERDICTS[what]}\n  folder   {run.folder}")
        if what != "submitted":
            continue
        number = run.attempt.number + 1 if run.attempt else 1
        if needs:
            print(f"  after    {' '.join(needs)}")
        print(f"  command  {sys.executable} -u -m hpc_imagenet.job {run.folder} {number}")
        parts.append(Part(job.run, job.stage, job.label, job.cluster, tuple(needs)))
    for array in arrays(parts) if executor == "slurm" else ():
        print(f"\nsbatch would get, for {' '.join(part.run for part in array)}:")
        run = record.run(array[0].run)
        text = script(array, run.folder / "attempts" / str(run.attempt.number + 1 if run.attempt else 1))
        print("  " + text.strip().replace("\n", "\n  "))
        print(f"sbatch --test-only: {verdict(text)}")
    print("\nnothing was submitted (dry_run=true)")
