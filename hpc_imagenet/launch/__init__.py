"""From planned jobs to processes: validate, submit to Slurm or the local queue, run, requeue."""
