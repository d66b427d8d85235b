"""Jobs of Slurm: their options, scripts and containers, their submission, their limits and their requeues."""
