"""Is this cluster set up? Asks Slurm, sends a probe as a run's job would be sent, and says what to set."""
