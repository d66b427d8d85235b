"""Dry run: print all jobs of a plan without submitting them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.executors import EXECUTORS
from hpc_imagenet.launch.shared_jobs import group_by_loader
from hpc_imagenet.launch.submission import Submitted, plan_actions
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import RunStore


def print_dry_run(plan: Sequence[Job], store: RunStore, executor: str, state_of: Mapping[str, State]) -> None:
    """Print each job of a plan: its run, dependencies and command; on Slurm also the sbatch scripts."""
    jobs = []
    for job, action, needs in plan_actions(plan, store, state_of):
        run = store.run(job.run_id)
        label = "would be submitted" if action == "submitted" else Submitted(run, action).label
        print(f"\n{job.run_id} {label}\n  folder   {run.folder}")
        if action != "submitted":
            continue
        number = run.attempt.number + 1 if run.attempt else 1
        if needs:
            print(f"  after    {' '.join(needs)}")
        print(f"  command  {sys.executable} -u -m hpc_imagenet.launch.tasks.task {run.folder} {number}")
        jobs.append((job, needs))
    for group in group_by_loader(jobs, lambda item: (item[0].config, item[1])):
        if len(group) > 1:
            print(f"\none job with one loader: {' '.join(job.run_id for job, _ in group)}")
    for line in EXECUTORS[executor].preview(store, jobs):
        print(line)
    print("\nnothing was submitted (dry_run=true)")
