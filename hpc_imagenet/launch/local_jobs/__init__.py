"""Jobs of this machine: the local queue, its worker and their executor."""
