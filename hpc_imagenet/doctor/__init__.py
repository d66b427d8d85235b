"""Check whether a cluster is set up: query Slurm, send a probe job, report what to fix."""
