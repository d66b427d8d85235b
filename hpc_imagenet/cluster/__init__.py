"""The machines of jobs: Slurm's commands, rank and CPUs of a task, GPUs of this machine."""
